"""AdamW and SGD with the weight-decay and learning-rate groups that ViT recipes use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vitprobe.errors import RecipeError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019), or SGD, under a warm-up and cosine schedule.

    lr: rate for a batch of 256 images; the rate used is lr x batch / 256 (Goyal et al. 2017).
    final_lr: rate at the end of the cosine, not scaled by the batch.
    weight_decay, final_weight_decay: at the start, and what a cosine over the run leads it to
        (Caron et al. 2021); without the latter it stays.
    warmup_epochs: epochs of linear warm-up; may be a fraction.
    layer_decay: factor of the rate from one block to the block below it (Clark et al. 2020; Bao et
        al. 2022, "BEiT"); 1 for none.
    clip: largest norm of each parameter's gradient, which is scaled down to it, as DINO's code
        does; 0 for none.
    clip_total: largest norm of all gradients together; 0 for none. One of the two can be given.
    name: which optimiser; betas are AdamW's, momentum (Sutskever et al. 2013) is SGD's.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_epochs: float
    final_lr: float = 0.0
    final_weight_decay: float | None = None
    layer_decay: float = 1.0
    clip: float = 0.0
    clip_total: float = 0.0
    name: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise RecipeError(f"optimizer.lr must be above 0, not {self.lr}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas must lie in [0, 1), not {list(self.betas)}.")
        if not 0 < self.layer_decay <= 1:
            raise RecipeError(f"optimizer.layer_decay must lie in (0, 1], not {self.layer_decay}.")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"optimizer.momentum must lie in [0, 1), not {self.momentum}.")
        least = ("weight_decay", "final_weight_decay", "warmup_epochs", "final_lr")
        for name in (*least, "clip", "clip_total"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RecipeError(f"optimizer.{name} must be at least 0, not {value}.")
        if self.clip and self.clip_total:
            raise RecipeError("Give optimizer.clip or optimizer.clip_total, not both.")


# Learned tokens and positions are offsets, like biases: DeiT and timm do not decay them either.
_NOT_DECAYED = (
    *("cls_token", "mask_token", "reg_token", "pos_embed"),
    "relative_position_bias_table",
)
_STEM = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")


def build_optimizer(model: nn.Module, config: OptimizerConfig, depth: int) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of a model whose `encoder` has `depth` blocks.

    Vectors and learned tokens are not decayed; each group's "scale" is what its layer's learning
    rate is multiplied by.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in _NOT_DECAYED
            scale = config.layer_decay ** (depth + 1 - layer_of(name, depth))
            groups.setdefault((scale, decayed), []).append(parameter)
    tables: Iterable[dict[str, Any]] = [
        {
            "params": parameters,
            "scale": scale,
            "decayed": decayed,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (scale, decayed), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(tables, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(tables, lr=config.lr, betas=config.betas, fused=True)


def layer_of(name: str, depth: int) -> int:
    """0 for the encoder's embedding, i + 1 for its block i, `depth` + 1 for all that follows.

    The final norm counts with what follows, as in BEiT's and MAE's code.
    """
    part = re.search(r"(?:^|\.)encoder\.(.+)", name)
    if part is None:
        return depth + 1
    if part[1].startswith(_STEM):
        return 0
    block = re.match(r"blocks\.(\d+)\.", part[1])
    return int(block[1]) + 1 if block else depth + 1
