"""The MAE loss against values worked out by hand, and encoding some patches only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, encode, take
from vitprobe.training.methods.base import Batch
from vitprobe.training.methods.mae import (
    MAE,
    MAEConfig,
    normalize_patches,
    patchify,
    unpatchify,
)
from vitprobe.training.randomness import Draws

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=16, depth=2, heads=2,
    mean=(0.3,), std=(0.4,), positions="sincos",
)  # fmt: skip


def _mae(mask_ratio: float = 0.75, normalize: bool = True) -> MAE:
    torch.manual_seed(0)
    config = MAEConfig(
        name="mae", decoder_width=8, decoder_depth=1, decoder_heads=2, mask_ratio=mask_ratio,
        normalize_targets=normalize,
    )  # fmt: skip
    return MAE(config, ENCODER, classes=0)


def _batch(n: int = 4, epoch: int = 0) -> Batch:
    images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch((images,), torch.zeros(n, dtype=torch.long), Draws(0, epoch, torch.arange(n)))


def test_patchify_by_hand() -> None:
    image = torch.arange(32.0).view(1, 2, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 8)
    # Rows, then columns, then channels within a patch.
    assert patches[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert patches[0, 2].tolist() == [8, 24, 9, 25, 12, 28, 13, 29]


def test_patch_normalisation_by_hand() -> None:
    patches = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]])
    # Mean 1/2; variance with n - 1: 4 x (1/4) / 3 = 1/3.
    high = 0.5 / math.sqrt(1 / 3 + 1e-6)
    expected = torch.tensor([[[-high, -high, high, high], [0, 0, 0, 0]]])
    torch.testing.assert_close(normalize_patches(patches), expected)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.6, 6), (0.9, 1)])
def test_the_encoder_sees_exactly_the_visible_share(ratio: float, visible: int) -> None:
    mae = _mae(ratio)
    lengths: list[int] = []
    hook = mae.encoder.blocks.register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    mae.loss(_batch())
    hook.remove()
    assert lengths == [1 + visible]


def test_the_mask_is_a_uniform_random_subset() -> None:
    mae, n = _mae(), 8000
    order = mae.order(Draws(0, 0, torch.arange(n)))
    seen = torch.zeros(n, 16).scatter(1, order[:, : mae.visible], 1.0)
    assert (seen.sum(dim=1) == 4).all()
    # Each patch visible with probability 4/16, each pair with 4 x 3 / (16 x 15); four deviations.
    single = seen.mean(dim=0)
    assert (single - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / n)
    pairs = (seen.T @ seen / n)[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - 0.05).abs().max() < 4.5 * math.sqrt(0.05 * 0.95 / n)


def test_masks_differ_by_epoch_and_repeat_by_key() -> None:
    mae = _mae()
    first, again, later = (mae.loss(_batch(epoch=epoch))[0].item() for epoch in (0, 0, 1))
    assert first == again
    assert first != later


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_mean_square_over_masked_patches_only(
    monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    mae, batch = _mae(normalize=normalize), _batch()
    prediction = torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(mae, "decode", lambda tokens, order: prediction)
    loss, _ = mae.loss(batch)
    order = mae.order(batch.draws)
    squares = []
    for i, image in enumerate(batch.views[0]):
        for place, patch in enumerate(order[i, 4:].tolist()):
            row, column = divmod(patch, 4)
            pixels = image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            if normalize:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            squares += ((prediction[i, place] - pixels) ** 2).tolist()
    assert len(squares) == 4 * 12 * 4
    assert loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def test_the_encoder_never_sees_a_masked_patch() -> None:
    mae = _mae()
    images = torch.rand(1, 1, 8, 8)
    visible = torch.tensor([[3, 0, 7, 12]])
    changed = images.clone()
    changed[:, :, 4:6, 4:6] += 1  # patch 10
    assert torch.equal(mae.encode(images, visible), mae.encode(changed, visible))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "class token without a position": {"no_embed_class": True, "reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "norm before the blocks": {"pre_norm": True},
    "two channels, oblong": {"in_chans": 2, "img_size": (8, 12)},
}


def _vit(variant: str) -> tuple[VisionTransformer, Tensor]:
    options = {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "num_classes": 0, **VARIANTS[variant],
    }  # fmt: skip
    torch.manual_seed(0)
    encoder = VisionTransformer(**options).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    size = (8, 12) if "oblong" in variant else (8, 8)
    return encoder, torch.randn(3, options["in_chans"], *size)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_every_patch_visible_encoding_is_timms(variant: str) -> None:
    encoder, images = _vit(variant)
    patches = encoder.patch_embed.num_patches
    everything = torch.arange(patches).expand(3, -1)
    whole = encoder.forward_features(images)
    assert torch.equal(encode(encoder, images), whole)
    torch.testing.assert_close(encode(encoder, images, everything), whole)
    # Tokens come in the order asked for; attention does not mind.
    order = torch.stack([torch.randperm(patches) for _ in range(3)])
    prefix = encoder.num_prefix_tokens
    expected = torch.cat([whole[:, :prefix], take(whole[:, prefix:], order)], dim=1)
    torch.testing.assert_close(encode(encoder, images, order), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visible_patches_enter_the_blocks_as_in_the_whole_image(variant: str) -> None:
    encoder, images = _vit(variant)
    entering: list[Tensor] = []
    encoder.blocks.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    visible = torch.tensor([[3, 0], [7, 12], [15, 2]])
    encode(encoder, images, visible)
    encode(encoder, images)
    some, whole = entering
    prefix = encoder.num_prefix_tokens
    expected = torch.cat([whole[:, :prefix], take(whole[:, prefix:], visible)], dim=1)
    torch.testing.assert_close(some, expected)


def test_the_decoder_gives_every_token_its_own_position() -> None:
    mae = _mae()
    entering: list[Tensor] = []
    mae.decoder_blocks.register_forward_hook(lambda _, args, __: entering.append(args[0]))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))[None]
    tokens = torch.randn(1, 5, 16)
    mae.decode(tokens, order)
    expected = torch.zeros(1, 17, 8)
    expected[0, 0] = mae.decoder_embed(tokens)[0, 0]
    for place, patch in enumerate(order[0].tolist()):
        embedded = mae.decoder_embed(tokens)[0, 1 + place] if place < 4 else mae.mask_token[0, 0]
        expected[0, 1 + patch] = embedded
    expected = expected + mae.decoder_pos_embed
    found = entering[0]
    torch.testing.assert_close(found[0, 0], expected[0, 0])
    torch.testing.assert_close(found[0, 1:], expected[0, 1 + order[0]])


def test_predictions_are_those_of_a_decoder_in_image_order() -> None:
    mae = _mae().eval()
    order = mae.order(Draws(0, 0, torch.arange(3)))
    tokens = torch.randn(3, 5, 16)
    embedded = mae.decoder_embed(tokens)
    patches = mae.mask_token.repeat(3, 16, 1)
    patches.scatter_(1, order[:, :4, None].expand(-1, -1, 8), embedded[:, 1:].detach())
    sequence = torch.cat([embedded[:, :1], patches], dim=1) + mae.decoder_pos_embed
    everywhere = mae.decoder_pred(mae.decoder_norm(mae.decoder_blocks(sequence))[:, 1:])
    torch.testing.assert_close(mae.decode(tokens, order), take(everywhere, order[:, 4:]))


def test_the_loss_is_single_precision_under_autocast() -> None:
    mae, batch = _mae(), _batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mae.loss(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mae.loss(batch)[0], rtol=0.02, atol=0)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_unpatchify_undoes_patchify(images: int, grid: int, channels: int, patch: int) -> None:
    x = torch.randn(images, channels, grid * patch, grid * patch)
    assert torch.equal(unpatchify(patchify(x, patch), patch, channels), x)


@pytest.mark.parametrize("normalize", [True, False])
def test_pictures(monkeypatch: pytest.MonkeyPatch, normalize: bool) -> None:
    mae = _mae(normalize=normalize)
    images = _batch(3).views[0]
    order = mae.order(Draws(0, 0, torch.arange(3)))
    masked = take(patchify(images, 2), order[:, 4:])
    right = normalize_patches(masked) if normalize else masked
    monkeypatch.setattr(mae, "decode", lambda tokens, order: right)
    original, seen, made = mae.pictures(images).values()
    assert torch.equal(original, images)
    # Where the decoder is right, so is the picture.
    torch.testing.assert_close(made, images)
    seen = patchify(seen, 2)
    assert torch.equal(take(seen, order[:, :4]), take(patchify(images, 2), order[:, :4]))
    grey = torch.full((3, 12, 4), (0.5 - 0.3) / 0.4)
    torch.testing.assert_close(take(seen, order[:, 4:]), grey)


def test_pictures_repeat_and_carry_no_gradient() -> None:
    mae, images = _mae(), _batch(2).views[0]
    pictures = mae.pictures(images)
    assert list(pictures) == ["original", "visible", "reconstruction"]
    for title, again in mae.pictures(images).items():
        assert pictures[title].shape == (2, 1, 8, 8)
        assert not pictures[title].requires_grad
        assert torch.equal(pictures[title], again)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((8, 8), "one view"), ((4,), r"not on views of sizes \[4\]"), ((8,), None)],
)
def test_views(sizes: tuple[int, ...], message: str | None) -> None:
    if message is None:
        MAE.check_views(sizes, ENCODER)
        return
    with pytest.raises(RecipeError, match=message):
        MAE.check_views(sizes, ENCODER)


def test_fixed_positions_get_no_gradient_and_everything_else_does() -> None:
    mae = _mae()
    loss, _ = mae.loss(_batch())
    loss.backward()
    without = {name for name, p in mae.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_ratio": 1.0}, "method.mask_ratio"),
        ({"decoder_depth": 0}, "method.decoder_depth"),
        ({"decoder_width": 10}, "method.decoder_width"),
    ],
)
def test_impossible_mae_settings_are_refused(change: dict[str, float], named: str) -> None:
    settings = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2} | change
    with pytest.raises(RecipeError, match=named):
        MAEConfig(name="mae", **settings)


def test_a_mask_that_leaves_nothing_visible_is_refused() -> None:
    with pytest.raises(RecipeError, match="leaves none of the 16 patches visible"):
        _mae(mask_ratio=0.99)


def test_normalising_single_values_is_refused() -> None:
    config = MAEConfig(name="mae", decoder_width=8, decoder_depth=1, decoder_heads=2)
    encoder = EncoderConfig(
        image_size=4, patch_size=1, channels=1, width=8, depth=1, heads=1, mean=(0.0,), std=(1.0,)
    )
    with pytest.raises(RecipeError, match=r"method\.normalize_targets"):
        MAE(config, encoder, classes=0)
