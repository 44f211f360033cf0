"""What shapes do not say: activation, epsilon, bias; and files that claim the impossible."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import GELUTanh, QuickGELU, SwiGLUPacked
from torch import Tensor, nn

import vitprobe.models.branches as branches
from vitprobe.errors import CheckpointError
from vitprobe.models import Fact, load
from vitprobe.models.formats import Dialect
from vitprobe.models.formats.timm import TIMM
from vitprobe.models.untrained import same_architecture, untrained

Tiny = Callable[..., nn.Module]


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    return path


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a dialect, timm's with these changes, the only one there is."""

    def only(**changes: Any) -> None:
        dialect: Dialect = replace(TIMM, name="odd", **changes)
        monkeypatch.setattr(branches, "DIALECTS", (dialect,))

    return only


@pytest.mark.parametrize(
    ("name", "kind"), [("quick_gelu", QuickGELU), ("gelu_pytorch_tanh", GELUTanh)]
)
def test_activation_of_the_user(
    tmp_path: Path, tiny: Tiny, images: Tensor, name: str, kind: type[nn.Module]
) -> None:
    source = tiny(act_layer=kind)
    path = saved(tmp_path, source.state_dict())
    model = load(path, heads=4, activation=name)
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)
        assert not torch.allclose(load(path, heads=4).module(images), source(images), atol=2e-5)
    assert model.facts["activation"] == Fact(kind.__name__, "user")
    assert same_architecture(untrained(model, "twin"), model)
    with pytest.raises(CheckpointError, match="activation 'sine'; vitprobe knows gelu, gelu_tanh"):
        load(path, heads=4, activation="sine")


def test_gated_mlps_are_seen(tmp_path: Path, tiny: Tiny, images: Tensor) -> None:
    source = tiny(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=3.0)
    model = load(saved(tmp_path, source.state_dict()), heads=4)
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)
    assert model.facts["activation"] == Fact("SwiGLU", "tensor shape")
    assert model.facts["mlp_ratio"].value == 1.5


def test_the_strongest_evidence_wins(
    tmp_path: Path, tiny: Tiny, speak: Callable[..., None]
) -> None:
    tensors = tiny().state_dict()
    args = argparse.Namespace(eps=1e-4)
    path = saved(tmp_path, {"model": tensors, "args": args})

    def found(**options: Any) -> Fact:
        return load(path, heads=4, **options).facts["norm_eps"]

    assert found().evidence == "assumed"
    speak(usual={"norm_eps": 1e-7})
    assert found() == Fact(1e-7, "assumed", "usual for odd")
    speak(usual={"norm_eps": 1e-7}, fixed={"norm_eps": 1e-8})
    assert found() == Fact(1e-8, "dialect", "that of odd")
    stated = {"stated": lambda settings: {"norm_eps": settings["eps"], "activation": None}}
    speak(fixed={"norm_eps": 1e-8}, **stated)
    assert found() == Fact(1e-4, "args")
    speak(fixed={"norm_eps": 1e-8}, seen=lambda tensors: {"norm_eps": 1e-9}, **stated)
    assert found() == Fact(1e-9, "tensor shape")
    assert found(eps=1e-5) == Fact(1e-5, "user")


def test_config_is_told_from_args(tmp_path: Path, tiny: Tiny, speak: Callable[..., None]) -> None:
    speak(
        stated=lambda settings: {
            "num_heads": settings["wings"],
            "img_size": (8, 32),
            "mean": [0.1, 0.2, 0.3],
        }
    )
    tensors = tiny(img_size=(8, 32)).state_dict()
    for name, evidence in (("config", "config"), ("args", "args")):
        model = load(saved(tmp_path, {"model": tensors, name: {"wings": 8}}))
        assert model.facts["heads"] == Fact(8, evidence)
        assert model.facts["mean"] == Fact((0.1, 0.2, 0.3), evidence)
        # 16 patches would be a square grid as well: what the settings state decides.
        assert model.facts["grid"] == Fact((2, 8), evidence)


def test_settings_that_are_not_the_dialects(
    tmp_path: Path, tiny: Tiny, speak: Callable[..., None]
) -> None:
    path = saved(tmp_path, tiny().state_dict())
    speak(stated=lambda settings: {"num_heads": settings["wings"]})
    with pytest.raises(
        CheckpointError, match="not as the dialect odd writes it: KeyError: 'wings'"
    ):
        load(path, heads=4)
    speak(stated=lambda settings: {"norm_eps": "tiny"})
    with pytest.raises(CheckpointError, match="states the LayerNorm epsilon tiny"):
        load(path, heads=4)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_patch_embedding_with_or_without_bias(
    tmp_path: Path, tiny: Tiny, images: Tensor, speak: Callable[..., None], pre_norm: bool
) -> None:
    """timm ties the bias to the norm that follows; here it is the other way round."""
    source = tiny(pre_norm=pre_norm)
    projection = source.patch_embed.proj
    projection.bias = nn.Parameter(torch.randn(32)) if pre_norm else None
    path = saved(tmp_path, source.state_dict())
    if not pre_norm:
        with pytest.raises(CheckpointError, match=r"lacks patch_embed\.proj\.bias"):
            load(path, heads=4)
        speak(fixed={"patch_bias": False})
    model = load(path, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)
    assert model.facts["norm_before_blocks"] == Fact(pre_norm, "tensor shape")


def test_an_impossibly_large_model_is_refused_before_it_is_made(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    width = 2**20  # whose attention alone would take 16 TB
    tensors["patch_embed.proj.weight"] = torch.zeros(width, 1, 1, 1)
    tensors["blocks.0.mlp.fc1.weight"] = torch.zeros(1, width)
    with pytest.raises(CheckpointError, match=r"has the shape .* ask for"):
        load(saved(tmp_path, tensors), heads=4)


def test_a_tensor_under_two_names(tmp_path: Path, tiny: Tiny, speak: Callable[..., None]) -> None:
    tensors = tiny().state_dict()
    speak(rename=((r"^ln\.", "norm."),))
    with pytest.raises(
        CheckpointError, match=r"holds norm\.bias twice, as norm\.bias and ln\.bias"
    ):
        load(saved(tmp_path, tensors | {"ln.bias": tensors["norm.bias"]}), heads=4)


def test_tensors_that_do_not_go_together(
    tmp_path: Path, tiny: Tiny, speak: Callable[..., None]
) -> None:
    speak(convert=lambda tensors: {**tensors, "norm.bias": torch.cat(list(tensors.values()))})
    with pytest.raises(CheckpointError, match="do not go together: "):
        load(saved(tmp_path, tiny().state_dict()), heads=4)


def test_what_a_conversion_makes_up_is_refused(
    tmp_path: Path, tiny: Tiny, speak: Callable[..., None]
) -> None:
    speak(convert=lambda tensors: {**tensors, "blocks.0.ls1.gamma": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"lacks .*blocks\.0\.ls2\.gamma"):
        load(saved(tmp_path, tiny().state_dict()), heads=4)
    speak(convert=lambda tensors: {**tensors, "blocks.0.wings": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"also holds blocks\.0\.wings"):
        load(saved(tmp_path, tiny().state_dict()), heads=4)
