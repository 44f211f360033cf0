"""How exactly numbers are computed, and what is said where that is slow."""

from __future__ import annotations

import warnings

import pytest
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.devices import computing, slow_bf16
from vitprobe.training import load_recipe
from vitprobe.training.engine import Engine
from vitprobe.training.run import build_method

CPU = torch.device("cpu")
SAID = "this CPU has no instructions for bf16, .* use precision fp32"


def pretend(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False
    )


def test_only_a_cpu_without_bf16_is_slow_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, True)
    assert slow_bf16(CPU) is None
    pretend(monkeypatch, False)
    assert slow_bf16(CPU) is not None
    assert slow_bf16(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_products_are_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    ones = torch.ones(2, 2)
    with computing(CPU, precision):
        assert (ones @ ones).dtype == dtype
    assert (ones @ ones).dtype == torch.float32


def test_analyses_in_slow_bf16_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny(), squares(8)
    pretend(monkeypatch, False)
    with pytest.warns(UserWarning, match=SAID):
        vp.compare([model], images, ["cka"], precision="bf16", progress=False)
    with pytest.warns(UserWarning, match=SAID):
        vp.capture(model, images, layers=[0], precision="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vp.capture(model, images, layers=[0])
        pretend(monkeypatch, True)
        vp.capture(model, images, layers=[0], precision="bf16")


@pytest.mark.parametrize(("precision", "notes"), [("fp32", 0), ("auto", 0), ("bf16", 1)])
def test_training_in_slow_bf16_is_noted(
    monkeypatch: pytest.MonkeyPatch, precision: str, notes: int
) -> None:
    pretend(monkeypatch, False)
    recipe = load_recipe("digits_mae", overrides={"precision": precision})
    engine = Engine(build_method(recipe, 10), recipe, CPU)
    assert len(engine.notes) == notes
    assert engine.execution.precision == ("bf16" if notes else "fp32")
