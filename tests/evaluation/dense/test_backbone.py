"""Plain Vision Transformers as backbones: what windows, positions and resampling do."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitprobe as vp
from vitprobe.errors import RecipeError
from vitprobe.evaluation.dense.backbone import (
    Backbone,
    BackboneConfig,
    GridAttention,
    encoder_config,
)


def model(**changes):
    torch.manual_seed(0)
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2,
        "num_classes": 0, "class_token": False, "global_pool": "avg", **changes,
    }  # fmt: skip
    module = VisionTransformer(**options).eval()
    size = options["img_size"]
    return vp.wrap(module, name="small", input_size=(3, size, size))


def backbone(wrapped, size=32, **config):
    return Backbone(wrapped, BackboneConfig(**config), encoder_config(wrapped, size)).eval()


def test_a_backbone_is_the_checkpoint_up_to_its_last_block():
    wrapped = model()
    images = torch.randn(2, 3, 32, 32)
    expected = wrapped.module.forward_intermediates(images, indices=[3], intermediates_only=True)
    torch.testing.assert_close(backbone(wrapped)(images), expected[0])


def test_the_class_token_goes_and_the_model_stays_as_it_was():
    wrapped = model(class_token=True, global_pool="token", reg_tokens=2)
    before = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    made = backbone(wrapped, 48, window=3, relative_positions=True)
    made(torch.randn(1, 3, 48, 48)).sum().backward()
    assert made.pos_embed.shape == (1, 36, 16)
    assert all(torch.equal(before[k], v) for k, v in wrapped.module.state_dict().items())
    assert type(wrapped.module.blocks[0].attn) is not GridAttention


def test_which_blocks_are_global():
    config = BackboneConfig(window=14, global_blocks=4)
    assert [i for i in range(12) if config.is_global(i, 12)] == [2, 5, 8, 11]
    assert [i for i in range(24) if config.is_global(i, 24)] == [5, 11, 17, 23]
    assert all(BackboneConfig(window=0).is_global(i, 5) for i in range(5))
    assert not any(BackboneConfig(window=2, global_blocks=0).is_global(i, 5) for i in range(5))


def attention(grid, window, relative=False):
    torch.manual_seed(1)
    inner = model().module.blocks[0].attn
    return GridAttention(inner, grid, window, relative=relative).eval(), inner


def test_a_window_sees_itself_alone():
    made, inner = attention(4, 2)
    x = torch.randn(1, 16, 16)
    grid = x.view(4, 4, 16)
    found = made(x).view(4, 4, 16)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 4)):
            expected = inner(grid[rows, columns].reshape(1, 4, 16)).view(2, 2, 16)
            torch.testing.assert_close(found[rows, columns], expected)


def test_windows_that_do_not_fit_are_filled_up_with_zeros():
    made, inner = attention(3, 2)
    grid = torch.randn(3, 3, 16)
    filled = torch.zeros(4, 4, 16)
    filled[:3, :3] = grid
    found = made(grid.view(1, 9, 16)).view(3, 3, 16)
    expected = inner(filled[2:, 2:].reshape(1, 4, 16)).view(2, 2, 16)[0, 0]
    torch.testing.assert_close(found[2, 2], expected)


def test_a_window_of_the_whole_grid_is_global():
    x = torch.randn(2, 16, 16)
    whole, inner = attention(4, 0)
    torch.testing.assert_close(whole(x), inner(x))
    torch.testing.assert_close(attention(4, 7)[0](x), inner(x))


def test_relative_positions_are_those_of_mvitv2():
    made, inner = attention(3, 0, relative=True)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(made(x), inner(x))  # they start at 0
    with torch.no_grad():
        made.relative_rows.normal_()
        made.relative_columns.normal_()
    q, k, v = made.qkv(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * made.scale
    for i in range(9):
        for j in range(9):
            rows, columns = i // 3 - j // 3, i % 3 - j % 3
            offset = made.relative_rows[rows + 2] + made.relative_columns[columns + 2]
            logits[:, :, i, j] += (q[:, :, i] * offset).sum(dim=-1)
    expected = made.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 9, 16))
    torch.testing.assert_close(made(x), expected)


def test_a_frozen_backbone_learns_nothing():
    made = backbone(model(), frozen=True)
    found = made(torch.randn(1, 3, 32, 32))
    assert not found.requires_grad
    assert not any(p.requires_grad for p in made.parameters())
    assert all(p.requires_grad for p in backbone(model()).parameters())


def test_what_is_no_plain_transformer_is_refused_with_the_reason():
    for module, size, words in (
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (3, 1, 1), "it is a Sequential"),
    ):
        wrapped = model()
        wrapped.module, wrapped.input_size = module, size
        with pytest.raises(RecipeError, match=words):
            encoder_config(wrapped, 32)
    with pytest.raises(RecipeError, match="no absolute position embedding"):
        encoder_config(model(pos_embed="none"), 32)
    with pytest.raises(RecipeError, match=r"multiple of the 8 pixels .* the nearest is 32"):
        encoder_config(model(), 33)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"window": -1}, "backbone.window"),
        ({"global_blocks": -1}, "backbone.global_blocks"),
        ({"drop_path": 1.0}, "backbone.drop_path"),
        ({"frozen": True, "relative_positions": True}, "backbone.frozen"),
    ],
)
def test_settings_that_cannot_be(wrong, words):
    with pytest.raises(RecipeError, match=words):
        BackboneConfig(**wrong)
