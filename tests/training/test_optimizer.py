"""Weight-decay groups against timm's, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vitprobe.errors import RecipeError
from vitprobe.training.optimizer import OptimizerConfig, build_optimizer, layer_of

SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.95), "warmup_epochs": 1.0,
}  # fmt: skip


def test_groups_are_timms() -> None:
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2)
    ours = build_optimizer(model, OptimizerConfig(**SETTINGS), 2).param_groups
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=("cls_token", "pos_embed"))

    def names(groups: list[dict[str, Any]], decay: float) -> set[int]:
        return {id(p) for g in groups if g["weight_decay"] == decay for p in g["params"]}

    for decay in (0.0, 0.05):
        assert names(ours, decay) == names(theirs, decay)


def test_frozen_parameters_are_left_out() -> None:
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2)
    model.get_parameter("pos_embed").requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig(**SETTINGS), 2).param_groups
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(model.parameters())) - 1


def test_layer_decay_is_timms() -> None:
    model = nn.Module()
    model.encoder = VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=5
    )
    config = OptimizerConfig(**SETTINGS, layer_decay=0.75)
    ours = build_optimizer(model, config, depth=3).param_groups
    theirs = param_groups_layer_decay(
        model.encoder,
        0.05,
        no_weight_decay_list=("cls_token", "pos_embed"),
        layer_decay=0.75,
    )

    def scales(groups: list[dict[str, Any]], key: str) -> dict[int, tuple[float, float]]:
        return {id(p): (g[key], g["weight_decay"]) for g in groups for p in g["params"]}

    own, their = scales(ours, "scale"), scales(theirs, "lr_scale")
    # The final norm is above all blocks for BEiT's and MAE's authors, and for us; timm counts it
    # with the last block.
    for parameter in model.encoder.norm.parameters():
        assert own[id(parameter)] == (1.0, 0.0)
        their[id(parameter)] = (1.0, 0.0)
    assert own.keys() == their.keys()
    for key, pair in own.items():
        assert pair == pytest.approx(their[key])


def test_sgd_is_torchs_with_the_same_groups() -> None:
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=1, num_heads=2)
    config = OptimizerConfig(**{**SETTINGS, "name": "sgd", "momentum": 0.8, "weight_decay": 0.1})
    optimizer = build_optimizer(model, config, 1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert {(g["decayed"], g["weight_decay"]) for g in optimizer.param_groups} == {
        (True, 0.1), (False, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.cls_token", 0),
        ("encoder.patch_embed.proj.weight", 0),
        ("inner.encoder.blocks.2.attn.qkv.weight", 3),
        ("encoder.norm.weight", 13),
        ("encoder.head.weight", 13),
        ("decoder_blocks.0.attn.qkv.weight", 13),
        ("projector.0.weight", 13),
        ("adapters.0.weight", 13),
    ],
)
def test_layers_are_told_by_name(name: str, layer: int) -> None:
    assert layer_of(name, depth=12) == layer


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"warmup_epochs": -1.0},
        {"clip": -1.0},
        {"clip_total": -1.0},
        {"momentum": 1.0},
        {"layer_decay": 0.0},
        {"final_lr": -1.0},
        {"final_weight_decay": -1.0},
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"optimizer.{next(iter(change))}"):
        OptimizerConfig(**{**SETTINGS, **change})


def test_gradients_are_clipped_one_by_one_or_all_together() -> None:
    with pytest.raises(RecipeError, match=r"optimizer.clip or optimizer.clip_total, not both"):
        OptimizerConfig(**SETTINGS, clip=1.0, clip_total=1.0)
