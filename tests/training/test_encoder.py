"""Position embeddings known in closed form, and the exported file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import (
    EncoderConfig,
    StochasticDepth,
    build_encoder,
    save_encoder,
    sincos_positions,
)
from vitprobe.training.randomness import Draws

TINY: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "channels": 1, "width": 16, "depth": 2, "heads": 2,
    "mean": (0.3,), "std": (0.4,),
}  # fmt: skip


def test_sincos_positions_by_hand() -> None:
    positions = sincos_positions(8, 3)
    assert positions.shape == (9, 8)
    for row in range(3):
        for column in range(3):
            expected = [
                math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
                math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100),
            ]  # fmt: skip
            torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected))


def test_sincos_positions_depend_on_displacement_only() -> None:
    positions = sincos_positions(32, 4).view(4, 4, 32)
    right = (positions[:, :-1] * positions[:, 1:]).sum(dim=-1)
    torch.testing.assert_close(right, right[:1, :1].expand_as(right))


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_export_reloads_as_timms_model(tmp_path: Path, num_classes: int, positions: str) -> None:
    config = EncoderConfig(**TINY, positions=positions)
    encoder = build_encoder(config, num_classes).eval()
    architecture = config.architecture(num_classes)
    save_encoder(
        encoder.state_dict(), tmp_path / "encoder.safetensors", {"architecture": architecture}
    )
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["vitprobe"])
    fresh = VisionTransformer(**metadata["architecture"]).eval()
    tensors = load_file(tmp_path / "encoder.safetensors")
    assert tensors.keys() == fresh.state_dict().keys()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    fresh.load_state_dict(tensors)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(fresh(images), encoder(images))
    assert torch.equal(fresh.forward_features(images), encoder.forward_features(images))
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depth": 0}, "encoder.depth"),
        ({"patch_size": 3}, "multiple of encoder.patch_size"),
        ({"heads": 3}, "encoder.heads 3"),
        ({"mean": (0.1, 0.2)}, "encoder.mean"),
        ({"std": (0.0,)}, "encoder.std"),
        ({"mlp_ratio": 0.0}, "encoder.mlp_ratio"),
    ],
)
def test_impossible_encoders_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        EncoderConfig(**{**TINY, **change})


def test_stochastic_depth_is_keyed_by_sample_and_keeps_the_mean() -> None:
    depth, n = StochasticDepth(0.3, "branch"), 4000
    branch = torch.ones(n, 1, 1)
    assert depth(branch) is branch  # without draws
    depth.draws = Draws(0, 0, torch.arange(n))
    out = depth(branch).flatten()
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert out.mean().item() == pytest.approx(1, abs=4 * (0.3 / 0.7 / n) ** 0.5)
    # A share of the batch sees what the whole batch sees.
    depth.draws = Draws(0, 0, torch.arange(n)[1000:1500])
    assert torch.equal(depth(branch[:500]).flatten(), out[1000:1500])
    # Two views that go through together are dropped apart, and by sample too.
    both = depth(branch[:1000]).view(2, 500)
    assert not torch.equal(both[0], both[1])
    depth.draws = Draws(0, 0, torch.arange(n)[1000:1250])
    assert torch.equal(depth(branch[:500]).view(2, 250), both[:, :250])
    assert depth.eval()(branch) is branch


def test_stochastic_depth_rises_linearly_over_the_blocks() -> None:
    config = EncoderConfig(
        image_size=8, patch_size=2, channels=1, width=16, depth=5, heads=2, mean=(0.0,),
        std=(1.0,), drop_path=0.4,
    )  # fmt: skip
    rates = [getattr(block.drop_path1, "rate", 0.0) for block in build_encoder(config).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
