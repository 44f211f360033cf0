"""A second copy of a model that follows the first slowly and is trained by nothing else.

MoCo calls it the momentum encoder (He et al., CVPR 2020, equation 2), DINO the teacher.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from vitprobe.training.encoder import StochasticDepth

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def momentum_copy(model: AnyModule) -> AnyModule:
    """A copy that starts equal, requires no gradient and always runs its whole depth."""
    copy = deepcopy(model).requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, StochasticDepth):
            # It regularises what is trained; the copy's output is a target.
            module.rate = 0.0
    return copy


@torch.no_grad()
def follow(copy: nn.Module, model: nn.Module, momentum: float) -> None:
    """copy ← momentum x copy + (1 - momentum) x model, in every parameter; buffers stay."""
    torch._foreach_lerp_(list(copy.parameters()), list(model.parameters()), 1 - momentum)
