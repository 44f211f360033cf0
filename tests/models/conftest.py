"""Tiny Vision Transformers, to be written in every dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": 0,
}


@pytest.fixture
def tiny() -> Callable[..., VisionTransformer]:
    """Builds a ViT of width 32 and depth 2 with weights far from any initial value."""

    def build(*, distilled: bool = False, **arguments: Any) -> VisionTransformer:
        kind = VisionTransformerDistilled if distilled else VisionTransformer
        module = kind(**{**SMALL, **arguments}).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return module

    return build


@pytest.fixture
def images() -> torch.Tensor:
    """Two images, (2, 3, 16, 16)."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
