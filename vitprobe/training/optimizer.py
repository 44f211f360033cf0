"""AdamW with the weight-decay groups that ViT recipes use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vitprobe.errors import RecipeError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) under a warm-up and cosine schedule.

    lr: rate for a batch of 256 images; the rate used is lr x batch / 256 (Goyal et al. 2017).
    warmup_epochs: epochs of linear warm-up; may be a fraction.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_epochs: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise RecipeError(f"optimizer.lr must be above 0, not {self.lr}.")
        if self.weight_decay < 0:
            raise RecipeError(
                f"optimizer.weight_decay must be at least 0, not {self.weight_decay}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optimizer.betas must lie in [0, 1), not {list(self.betas)}.")
        if self.warmup_epochs < 0:
            raise RecipeError(
                f"optimizer.warmup_epochs must be at least 0, not {self.warmup_epochs}."
            )


# Learned tokens and positions are offsets, like biases: DeiT and timm do not decay them either.
_NOT_DECAYED = ("cls_token", "mask_token", "pos_embed")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors and learned tokens are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            offset = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _NOT_DECAYED
            (plain if offset else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
