from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from vitprobe.errors import CaptureError, SourceError
from vitprobe.models import Fact, hub, load, timm_models

TINY = "deit_tiny_patch16_224"


def test_init_is_keyed_by_its_seed_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        load(spec)
        for spec in (
            f"init:{TINY},size=32",
            f"init:{TINY},size=32,seed=0",
            f"init:{TINY},size=32,seed=1",
        )
    )
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(first.module.state_dict(), same.module.state_dict(), rtol=0, atol=0)
    assert not torch.equal(
        first.module.blocks[0].attn.qkv.weight, other.module.blocks[0].attn.qkv.weight
    )
    assert first.name == f"init:{TINY}"
    assert (first.report, first.sha256) == (None, None)
    assert first.input_size == (3, 32, 32)
    assert first.facts["heads"] == Fact(3, "timm")
    assert first.facts["mean"] == Fact((0.485, 0.456, 0.406), "timm")
    assert first.facts["position_embedding"] == Fact("random", "timm")
    assert first.describe()["assumed"] == []
    assert not any(parameter.requires_grad for parameter in first.module.parameters())


def test_init_of_another_size() -> None:
    model = load("init:vit_small_patch14_dinov2,size=28x42")
    assert model.anatomy.grid == (2, 3)
    assert model.input_size == (3, 28, 42)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:deit_tinny_patch16_224", f"Did you mean '{TINY}'?"),
        (f"init:{TINY}.nothing", "no weights 'nothing'"),
        ("init:vit_small_patch14_dinov2,size=100", "not a multiple of the model's patch, 14x14"),
        ("init:deit_tiny_patch16_224,mean=0.5/0.4", "2 values for images of 3 channels"),
    ],
)
def test_names_and_options_that_timm_lacks(spec: str, message: str) -> None:
    with pytest.raises((SourceError, CaptureError), match=message.replace("?", r"\?")):
        load(spec)


def test_models_of_other_families() -> None:
    convolutional = load("init:resnet10t,size=64")
    assert convolutional.input_size == (3, 64, 64)
    assert convolutional.facts["width"] == Fact((64, 128, 256, 512), "timm")
    assert convolutional.facts["grid"].value == ((16, 16), (8, 8), (4, 4), (2, 2))
    assert "heads" not in convolutional.facts
    assert "width (64, 128, 256, 512), depth 4, input 3x64x64" in repr(convolutional)
    windows = load("init:swinv2_cr_tiny_224,size=64")
    assert windows.facts["heads"] == Fact((3, 6, 12, 24), "timm")
    assert windows.facts["position_embedding"] == Fact("none added to the tokens", "timm")
    assert not windows.anatomy.pre_norm


def test_offline_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub, "unreachable", lambda url: pytest.fail("asked the network"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE forbids"):
        load(f"timm:{TINY}")


def test_an_unreachable_hub_is_said_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(timm_models.constants, "HF_HUB_OFFLINE", False)
    # 192.0.2.0/24 is reserved for documentation: nothing ever answers there (RFC 5737).
    monkeypatch.setattr(timm_models.constants, "ENDPOINT", "http://192.0.2.1")
    start = time.monotonic()
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        load(f"timm:{TINY}")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_published_weights_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = timm.create_model(TINY)
    path = tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load(f"timm:{TINY},size=112", name="DeiT")
    assert model.name == "DeiT"
    assert model.report is not None
    assert model.report.loaded_fraction == 1
    assert model.sha256
    torch.testing.assert_close(model.module.norm.weight.data, source.norm.weight.data)
    assert (
        model.facts["position_embedding"].value == "resized bicubic antialiased from 14x14 to 7x7"
    )
