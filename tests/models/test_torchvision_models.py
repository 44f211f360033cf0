from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torchvision

from vitprobe.errors import CaptureError, SourceError
from vitprobe.models import hub, load
from vitprobe.models.untrained import is_untrained, untrained


def test_random_weights_are_keyed_by_their_seed() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        load(f"init:torchvision:vit_b_32,size=64{seed}") for seed in ("", ",seed=0", ",seed=1")
    )
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(first.module.state_dict(), same.module.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.module.conv_proj.weight, other.module.conv_proj.weight)
    assert first.name == "init:vit_b_32"
    assert first.input_size == (3, 64, 64)
    assert (first.facts["width"].value, first.facts["depth"].value) == (768, 12)
    assert first.facts["heads"].value == 12
    assert first.facts["position_embedding"].value == "random"
    assert first.mean == (0.485, 0.456, 0.406)
    assert first.facts["mean"].evidence == "torchvision"
    assert first.report is None
    assert is_untrained(first)


def test_published_weights_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = torchvision.models.resnet18().eval()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "_get_torch_home", lambda: str(tmp_path))
    monkeypatch.setattr(hub, "unreachable", lambda url: pytest.fail("asked the network"))
    model = load("torchvision:resnet18,size=64")
    torch.testing.assert_close(model.module.state_dict(), source.state_dict())
    assert model.report is not None
    assert model.report.loaded_fraction == 1
    assert model.facts["position_embedding"].value == "none added to the tokens"
    assert model.sha256
    assert not model.module.training
    assert not is_untrained(model)
    twin = untrained(model, "twin")
    assert twin.input_size == model.input_size
    assert not torch.equal(twin.module.conv1.weight, model.module.conv1.weight)


def test_unreachable_weights_are_said_within_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ViT_B_16_Weights
    real = hub.unreachable
    # 192.0.2.0/24 is reserved for documentation: nothing ever answers there (RFC 5737).
    monkeypatch.setattr(hub, "unreachable", lambda url: real("http://192.0.2.1"))
    start = time.monotonic()
    with pytest.raises(SourceError, match="are not in torch's cache and cannot be downl") as caught:
        load("torchvision:vit_b_16")
    assert time.monotonic() - start < 10
    assert weights.DEFAULT.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_models_and_weights() -> None:
    with pytest.raises(SourceError, match=r"no model 'vit_b_61'\. Did you mean 'vit_b_16'\?"):
        load("torchvision:vit_b_61")
    with pytest.raises(SourceError, match=r"no model 'maxvit'\. Did you mean 'maxvit_t'\?"):
        load("torchvision:maxvit")
    with pytest.raises(SourceError, match="no weights 'V7' for 'vit_b_16'; it has IMAGENET1K_V1"):
        load("torchvision:vit_b_16.V7")


def test_a_size_that_the_model_cannot_take() -> None:
    with pytest.raises((SourceError, CaptureError)) as caught:
        load("init:torchvision:vit_b_16,size=50")
    assert "\n" not in str(caught.value)
