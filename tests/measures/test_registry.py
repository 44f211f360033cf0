from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path
from typing import get_args

import pytest

from vitprobe import measures
from vitprobe.measures.base import Group, Invariance, Streams
from vitprobe.measures.registry import (
    ALL_MEASURES,
    ATTENTION,
    MEASURES,
    PER_BLOCK,
    SUBSET,
    SYMMETRIC,
    TOKENS,
)

DOCS = Path(__file__).parents[2] / "docs"


def test_names_are_unique():
    assert len(MEASURES) == len(ALL_MEASURES)
    assert len({info.title for info in MEASURES.values()}) == len(MEASURES)


@pytest.mark.parametrize("name", MEASURES)
def test_no_description_is_empty(name):
    info = MEASURES[name]
    for field in dataclasses.fields(info):
        value = getattr(info, field.name)
        if field.name == "unit":
            assert isinstance(value, str)  # a pure number has none
        else:
            assert value or value == (), field.name
        if isinstance(value, str) and field.name not in ("unit", "name", "formula", "source"):
            assert value == value.strip()
            assert "  " not in value, f"{field.name} has two spaces in a row"
    assert set(info.invariances) <= set(get_args(Invariance))
    assert len(set(info.invariances)) == len(info.invariances)
    assert info.group in get_args(Group)
    assert info.streams in get_args(Streams)
    least, most = info.bounds
    assert -math.inf <= least < most <= math.inf
    assert info.what.endswith(".")


def test_groups_agree_with_the_families():
    groups = {name: info.group for name, info in MEASURES.items()}
    assert all(groups[name] == "attention" for name in ATTENTION)
    assert all(groups[name] == "tokens" for name in (*TOKENS, "rankme", "first_direction_share"))
    assert sorted(n for n, g in groups.items() if g == "similarity") == sorted(SYMMETRIC)
    assert {name for name in SUBSET if not SYMMETRIC[name]} == {"linear_regression"}
    assert set(PER_BLOCK) == {"rollout_distance", "rollout_distance_max"}
    assert all(MEASURES[name].streams == "subset" for name in SUBSET)


def test_all_measures_are_those_that_are_documented():
    assert set(MEASURES) == {
        *("cka", "cka_rbf", "svcca", "pwcca", "procrustes", "rsa_spearman", "rsa_pearson"),
        *("mutual_knn", "linear_regression"),
        *("attention_distance", "attention_distance_raw", "attention_distance_q10"),
        *("attention_distance_q50", "attention_distance_q90", "attention_entropy"),
        *("attention_entropy_raw", "attention_entropy_all", "class_attention_entropy"),
        *("sink_mass", "attention_nmi", "head_divergence", "head_divergence_kl"),
        *("rollout_distance", "rollout_distance_max"),
        *("first_direction_share", "token_cosine", "effective_rank", "feature_variance"),
        *("norm_outliers", "fourier_amplitude", "rankme"),
    }


def test_the_docs_are_what_the_measures_say():
    page = runpy.run_path(str(DOCS / "measures.py"))["page"]()
    committed = (DOCS / "measures.md").read_text(encoding="utf-8")
    assert committed == page, "run 'python docs/measures.py'"
    for info in MEASURES.values():
        assert f"### {info.title} (`{info.name}`)\n" in page
    assert page.count("- **Formula**: ") == len(MEASURES)


def test_public_names_exist():
    for name in measures.__all__:
        assert getattr(measures, name) is not None
