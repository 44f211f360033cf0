"""Condensed results: the same numbers but for intervals over images, in little space."""

from __future__ import annotations

import numpy as np
import pytest
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.condensed import NOTE, STEP

MEASURES = ["cka", "mutual_knn", "attention_distance", "rollout_distance", "token_cosine"]


@pytest.fixture(scope="module")
def whole():
    return vp.compare([tiny("a"), tiny("b", seed=1)], squares(24), MEASURES, progress=False)


def test_condensed_results_say_the_same_and_take_little_space(whole, tmp_path):
    small = vp.open_result(whole.condensed().save(tmp_path / "small.nc"))
    whole.save(tmp_path / "whole.nc")
    assert (tmp_path / "small.nc").stat().st_size < (tmp_path / "whole.nc").stat().st_size / 2
    near = {"rtol": 0, "atol": STEP / 2 + 1e-7}
    assert np.allclose(small.cka("a", "b"), whole.cka("a", "b"), **near)
    assert (small.cka("a", "a").values.diagonal() == 1).all()
    errors = [one.standard_error("cka", "a", "b") for one in (small, whole)]
    assert np.allclose(*errors, **near)
    floors = [one.floor("mutual_knn", "a", "b") for one in (small, whole)]
    assert np.allclose(*floors, **near)
    for name in whole.models:
        assert np.allclose(small.attention_distance(name), whole.attention_distance(name), 1e-6)
        assert np.allclose(
            small.attention_distance(name, relative=True),
            whole.attention_distance(name, relative=True),
            1e-6,
        )
        assert np.allclose(small.tokens("token_cosine", name), whole.tokens("token_cosine", name))
    assert small.samples("a") is None
    assert small.thumbnails() is None


def test_what_was_left_out_is_nan_and_noted_once(whole):
    small = whole.condensed()
    table = small.by_layer("attention_distance", "a")
    assert np.isfinite(table["value"]).all()
    assert np.isnan(table["low"]).all()
    assert small.condensed().notes == [*whole.notes, NOTE]


def test_undefined_rows_are_summed(whole):
    rows = whole.undefined_rows("attention_distance", "a")
    assert (whole.condensed().undefined_rows("attention_distance", "a") == rows).all()


def test_a_condensed_result_draws_and_reports(whole, tmp_path):
    small = whole.condensed()
    vp.plots.attention_overlay(small, "attention_distance")
    assert vp.report(small, tmp_path / "report", formats=["svg"]).is_file()
