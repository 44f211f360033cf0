"""torchvision's VisionTransformer, written by torchvision, gives torchvision's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer

from vitprobe.models import load


@pytest.fixture
def source() -> VisionTransformer:
    module = VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=5).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def tokens(module: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        patches = module._process_input(images)
        first = module.class_token.expand(len(images), -1, -1)
        return module.encoder(torch.cat([first, patches], dim=1))


def test_tokens_and_logits(tmp_path: Path, images: Tensor, source: VisionTransformer) -> None:
    path = tmp_path / "vit_b_16.pth"
    torch.save(source.state_dict(), path)
    model = load(path, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.module.forward_features(images), tokens(source, images), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(model.module(images), source(images), atol=1e-5, rtol=0)
    report = model.report
    assert report is not None
    assert (report.dialect, report.loaded_fraction) == ("torchvision", 1)
    assert (report.missing, report.unexpected, report.ignored) == ((), (), ())
    assert model.facts["norm_eps"].evidence == "dialect"


def test_under_lightlys_backbone(tmp_path: Path, images: Tensor, source: VisionTransformer) -> None:
    """lightly's masked autoencoder around torchvision's model, and the older names of its MLP."""
    own = {
        f"backbone.{key}".replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
        for key, tensor in source.state_dict().items()
        if not key.startswith("heads")
    }
    beside = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder.decoder_embed.weight": torch.zeros(8, 32),
    }
    path = tmp_path / "mae.ckpt"
    torch.save({"state_dict": {**own, **beside}}, path)
    model = load(path, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.module.forward_features(images), tokens(source, images), atol=1e-5, rtol=0
        )
    assert model.report is not None
    assert model.report.unexpected == ()
