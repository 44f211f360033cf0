"""Families of models: features, attention and output of each, as docs/coverage.md lists them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "docs" / "coverage.py"


def _load():
    spec = importlib.util.spec_from_file_location("coverage_of_families", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


coverage = _load()

# What attends to what, and in how many of the attention layers that has a distance.
FEW = {
    "vit_tiny_patch16_224": ({"global"}, "all"),
    "pit_ti_224": ({"global"}, "all"),
    "levit_128s": ({"global", "pooled keys"}, "all"),
    "shvit_s1": ({"global"}, "all"),
    "xcit_nano_12_p16_224": ({"channels", "class token"}, "none"),
    "mobilevit_xxs": ({"windows"}, "all"),
    "hf:ViTModel": ({"global"}, "all"),
    "hf:Dinov2WithRegistersModel": ({"global"}, "all"),
    "hf:BeitModel": ({"global"}, "all"),
    "hf:SwinModel": ({"windows"}, "all"),
    "hf:Swinv2Model": ({"windows"}, "all"),
    "hf:PvtV2Model": ({"pooled keys", "global"}, "all"),
    "hf:SegformerModel": ({"pooled keys", "global"}, "all"),
    "hf:HieraModel": ({"windows", "pooled keys", "global"}, "all"),
    "hf:CvtModel": ({"pooled keys"}, "all"),
    "hf:VitDetModel": ({"windows", "global"}, "all"),
}
FEW_WITHOUT = ["resnet18", "hf:ConvNextModel", "hf:PoolFormerModel"]


@pytest.mark.parametrize("name", FEW)
def test_a_few_families_are_captured_whole(name):
    kinds, distance = FEW[name]
    row = coverage.examine(name)
    assert row.whole, row
    assert set(row.kinds) == kinds
    assert row.known == (row.maps if distance == "all" else 0)
    assert row.placed == row.layers


@pytest.mark.parametrize("name", FEW_WITHOUT)
def test_models_without_attention_give_features_and_say_why_no_attention(name):
    check_without(coverage.examine(name))


def check_without(row):
    assert not row.failed
    assert row.layers > 1
    assert row.maps == row.missed == 0
    assert row.difference == 0
    assert len(row.refused[0]) > 10


def test_all_models_named_in_the_plan_are_in_the_table(shared):
    lines = (shared / "families.txt").read_text().splitlines()[1:]
    softmax = lines[: lines.index("")]
    assert softmax == coverage.TIMM
    assert set(lines) - {*softmax, ""} <= set(coverage.WITHOUT_ATTENTION)


def test_the_table_is_of_these_models():
    text = coverage.PAGE.read_text(encoding="utf-8")
    for name in coverage.names():
        assert f"| `{name.rpartition(':')[2]}` |" in text, "run 'python docs/coverage.py'"
    assert text.count("\n| `") == len(coverage.names())


# Those whose attention is known not to be captured whole, each with the reason.
EXCEPTIONS: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", coverage.TIMM)
def test_timm(name):
    row = coverage.examine(name)
    assert row.difference == 0
    if name not in EXCEPTIONS:
        assert row.whole, row


def test_at_least_84_of_the_85_families_with_softmax_attention_are_whole():
    assert len(coverage.TIMM) == 85
    assert len(EXCEPTIONS) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", coverage.TORCHVISION)
def test_torchvision(name):
    row = coverage.examine(f"torchvision:{name}")
    assert row.whole, row
    assert row.known == row.maps


@pytest.mark.slow
@pytest.mark.parametrize("name", coverage.HUGGING_FACE)
def test_hugging_face(name):
    row = coverage.examine(f"hf:{name}")
    assert row.whole, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*coverage.WITHOUT_ATTENTION, *(f"hf:{n}" for n in coverage.HUGGING_FACE_WITHOUT_ATTENTION)],
)
def test_without_attention(name):
    check_without(coverage.examine(name))
