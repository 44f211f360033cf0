from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from vitprobe.errors import CaptureError, SourceError
from vitprobe.models import Fact, wrap
from vitprobe.models.anatomy import Layout
from vitprobe.models.discovery import find_anatomy, find_input_size
from vitprobe.models.plain import plain_anatomy

Tiny = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("name", "size", "prefix", "heads", "final_norm"),
    [
        ("vit_tiny_patch16_224", 32, 1, 3, "norm"),
        ("deit_tiny_distilled_patch16_224", 32, 2, 3, "norm"),
        ("vit_small_patch14_reg4_dinov2", 28, 5, 6, "norm"),
        ("beit_base_patch16_224", 32, 1, 12, "fc_norm"),
        ("eva02_tiny_patch14_224", 28, 1, 3, "fc_norm"),
    ],
)
def test_timm_models(name: str, size: int, prefix: int, heads: int, final_norm: str) -> None:
    model = wrap(timm.create_model(name, img_size=size), name="mine", input_size=(3, size, size))
    anatomy = model.anatomy
    assert anatomy.grid == (2, 2)
    assert anatomy.patch_size == (size / 2, size / 2)
    assert anatomy.prefix_tokens == prefix
    assert anatomy.heads == (heads,) * 12
    assert anatomy.pre_norm
    assert anatomy.norms[3] == "blocks.3.norm1"
    assert anatomy.final_norm == final_norm
    assert anatomy.final_norm_pooled == (final_norm == "fc_norm")
    assert model.report is None
    assert model.describe()["spec"] == "module"
    assert model.facts["mean"].evidence == "timm"


def test_wrap_keeps_the_module_and_its_parameters(tiny: Tiny) -> None:
    module = tiny(img_size=(8, 20)).train()
    model = wrap(module, name="mine", mean=0.5, std=(0.1, 0.2, 0.3))
    assert model.module is module
    assert not module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in module.modules())
    assert model.input_size == (3, 8, 20)
    assert model.facts["mean"] == Fact((0.5, 0.5, 0.5), "user")
    assert model.facts["grid"] == Fact((2, 5), "module")


def test_the_encoder_may_lie_deeper(tiny: Tiny) -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone(images)

    anatomy = wrap(Trainer(), name="mine").anatomy
    assert anatomy.blocks == ("backbone.blocks.0", "backbone.blocks.1")
    assert anatomy.final_norm == "backbone.norm"


def test_a_post_norm_block_has_no_pre_norm(tiny: Tiny) -> None:
    anatomy = wrap(tiny(block_fn=ResPostBlock, init_values=1.0), name="mine").anatomy
    assert not anatomy.pre_norm
    assert anatomy.norms == (None, None)


def test_one_channel_without_statistics_gets_an_average(tiny: Tiny) -> None:
    model = wrap(tiny(in_chans=1), name="mine")
    assert (model.mean, model.std) == ((0.449,), (0.226,))
    assert model.facts["std"].evidence == "assumed"


def test_what_is_not_found_is_named(tiny: Tiny) -> None:
    with pytest.raises(CaptureError, match=r"not str; load takes a spec"):
        wrap("timm:vit", name="mine")
    with pytest.raises(CaptureError, match="input_size=32 of 'mine' is not"):
        wrap(tiny(), name="mine", input_size=32)
    with pytest.raises(CaptureError, match=r"blocks='blocks\.0' of 'mine' is one path"):
        wrap(tiny(), name="mine", blocks="blocks.0")
    with pytest.raises(CaptureError, match="'mine' has parameters on the meta device"):
        wrap(tiny().to("meta"), name="mine")
    with pytest.raises(CaptureError, match="does not run on an input of 3x20x20"):
        wrap(tiny(), name="mine", input_size=(3, 20, 20))
    with pytest.raises(SourceError, match="std=0 in wrap of 'mine'"):
        wrap(tiny(), name="mine", std=0)


def test_what_is_not_plainly_a_vision_transformer_is_surveyed(tiny: Tiny) -> None:
    odd = tiny()
    odd.num_prefix_tokens = 3
    assert plain_anatomy(odd, (3, 16, 16)) is None
    assert find_anatomy(odd, (3, 16, 16)).prefix_tokens == 1
    pooling = tiny(global_pool="map", class_token=False)
    assert plain_anatomy(pooling, (3, 16, 16)) is None
    sites = find_anatomy(pooling, (3, 16, 16)).sites
    assert [site.no_distance for site in sites] == ["", "", "its only query is no patch"]
    unlike = tiny()
    unlike.blocks[1].attn.norm = torch.nn.LayerNorm(32)
    assert plain_anatomy(unlike, (3, 16, 16)) is None


def test_input_sizes_that_modules_name(tiny: Tiny) -> None:
    assert find_input_size(tiny(img_size=(8, 20), in_chans=1)) == (1, 8, 20)
    module = tiny()
    module.pretrained_cfg = {"input_size": (3, 12, 12)}
    assert find_input_size(module) == (3, 12, 12)
    with pytest.raises(
        CaptureError, match=r"Linear does not name its input size; give it as in wrap"
    ):
        find_input_size(torch.nn.Linear(2, 2))


TOKENS = torch.arange(2 * 6 * 5.0).view(2, 6, 5)


@pytest.mark.parametrize(
    ("value", "layout"),
    [
        (TOKENS, {"form": "tokens"}),
        (TOKENS.view(2, 2, 3, 5), {"form": "grid"}),
        (TOKENS.mT.unflatten(-1, (2, 3)), {"form": "maps"}),
        (TOKENS.transpose(0, 1), {"form": "sequence"}),
        (TOKENS.reshape(4, 3, 5), {"form": "tokens", "folded": 2}),
        (TOKENS[:, [1, 2, 3, 4, 5, 0]], {"form": "tokens", "order": (5, 0, 1, 2, 3, 4)}),
    ],
)
def test_layouts_read_tensors(value: torch.Tensor, layout: dict[str, Any]) -> None:
    known = Layout(width=5, prefix_tokens=1, patches=5, grid=None, patch_size=None, **layout)
    read = known.read(value)
    assert read is not None
    assert torch.equal(read, TOKENS)
    assert replace(known, width=4).read(value) is None
    assert replace(known, patches=6).read(value) is None
    assert known.read(TOKENS[0]) is None
