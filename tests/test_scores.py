"""Scores: tidy rows that survive saving, adding and averaging over seeds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from vitprobe.errors import ResultError
from vitprobe.scores import Score, Scores, open_scores

ROW = Score("MAE 1", "mae.pth", "knn", "digits", 360, "top1", 0.9, 0.87, 0.93, settings={"k": 20})


def test_saved_scores_are_read_back_with_nan_and_settings(tmp_path):
    scores = Scores(
        [ROW, replace(ROW, model="b", low=math.nan, high=math.nan, layer=3)], [{"a": 1}]
    )
    again = open_scores(scores.save(tmp_path / "scores.json"))
    assert again.rows[0] == ROW
    assert again.provenance == ({"a": 1},)
    assert math.isnan(again.rows[1].low)
    assert again.rows[1].layer == 3
    assert open_scores(tmp_path).rows[0] == ROW


def test_rows_that_both_hold_are_kept_once():
    other = replace(ROW, model="b")
    assert (Scores([ROW]) + Scores([other, ROW])).rows == (ROW, other)


def test_the_table_has_a_row_a_score():
    table = Scores([ROW, replace(ROW, layer=2)]).to_dataframe()
    assert list(table["layer"].isna()) == [True, False]
    assert json.loads(table["settings"][0]) == {"k": 20}


def test_seeds_are_the_unit_of_their_mean():
    rows = [replace(ROW, model=f"MAE {i}", value=v) for i, v in enumerate((0.8, 0.9, 1.0))]
    rows.append(replace(rows[0], seed=1, value=0.8))
    (mean,) = Scores(rows).over_seeds({"MAE": ["MAE 0", "MAE 1", "MAE 2"]}).to_dict("records")
    # t(0.975, 2) = 4.302653, the standard error 0.1 / sqrt(3).
    assert mean["value"] == pytest.approx(0.9)
    assert mean["seeds"] == 3
    assert mean["high"] - 0.9 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_settings_that_were_asked_for_are_not_averaged():
    rows = [
        replace(ROW, model=f"MAE {i}", value=value - 0.1 * i, settings={"k": k, "l2": i})
        for i in (0, 1)
        for k, value in ((10, 0.9), (200, 0.5))
    ]
    means = Scores(rows).over_seeds({"MAE": ["MAE 0", "MAE 1"]})
    assert means["settings"].tolist() == ['{"k": 10}', '{"k": 200}']
    np.testing.assert_allclose(means["value"], [0.85, 0.45])
    assert means["seeds"].tolist() == [2, 2]


def test_one_seed_has_no_interval():
    (mean,) = Scores([ROW]).over_seeds({"MAE": ["MAE 1"]}).to_dict("records")
    assert math.isnan(mean["low"])
    assert mean["value"] == 0.9


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "rows": [{}]}'])
def test_other_files_are_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ResultError, match="scores"):
        open_scores(tmp_path)
    with pytest.raises(ResultError, match="no scores"):
        open_scores(tmp_path / "absent.json")


def test_rows_find_their_model_by_name_or_else_by_checkpoint():
    models = {"MAE 1": "", "DINO": "d1", "a": "aa", "b": "aa"}
    rows = [
        replace(ROW, sha256="ff"),
        replace(ROW, model="dino_tiny", sha256="d1"),
        replace(ROW, model="b", sha256="aa"),
    ]
    assert [row.model for row in Scores(rows).matched(models).rows] == ["MAE 1", "DINO", "b"]


@pytest.mark.parametrize(
    ("model", "sha256", "said"),
    [
        ("other", "ee", "belong to no model compared; evaluate it under .* one of DINO, a, b"),
        ("other", "", "belong to no model compared"),
        ("other", "aa", "belong to the checkpoint of a and b"),
        ("DINO", "ee", r"'DINO' are of another checkpoint \(SHA-256 ee…\) .* \(d1…\)"),
    ],
)
def test_rows_of_no_model_are_refused(model, sha256, said):
    with pytest.raises(ResultError, match=said):
        Scores([replace(ROW, model=model, sha256=sha256)]).matched(
            {"DINO": "d1", "a": "aa", "b": "aa"}
        )


def test_scores_become_arrays_and_come_back():
    rows = (ROW, replace(ROW, layer=3, low=math.nan, high=math.nan), replace(ROW, kept=0))
    again = Scores.from_dataset(Scores(rows, [{"seed": 1}]).to_dataset())
    assert again.rows[0] == rows[0]
    assert again.rows[2] == rows[2]
    assert math.isnan(again.rows[1].low)
    assert again.rows[1].layer == 3
    assert again.provenance == ({"seed": 1},)


def test_text_has_a_line_a_score():
    text = Scores([ROW, replace(ROW, layer=2, labels=0.01, low=math.nan)]).to_text()
    first, second = text.splitlines()
    assert first == "MAE 1: knn top1 0.9000 [0.8700, 0.9300] (360 images of digits, k 20)"
    assert (
        second == "MAE 1: knn top1 0.9000 (360 images of digits, layer 2, 0.01 of the labels, k 20)"
    )
