"""Layers at the same depth, and the summary that scripts read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from plots.synthetic import Subject, comparison

from vitprobe.errors import ResultError
from vitprobe.scores import Score, Scores


def of_depths(a: int, b: int, block: np.ndarray, **more):
    return comparison(
        {"A": Subject(a), "B": Subject(b)}, cka={("A", "B"): block}, images=12, **more
    )


def test_models_of_equal_depth_are_compared_layer_by_layer():
    block = np.full((4, 4), 0.1) + np.diag([0.8, 0.5, 0.7, 0.6])
    result = of_depths(3, 3, block, error=0.01)
    found = result.equal_depth("cka", "A", "B")
    np.testing.assert_allclose(found["value"], [0.9, 0.6, 0.8, 0.7])
    np.testing.assert_array_equal(found["layer_b"], found["layer"])
    np.testing.assert_allclose(found["high"] - found["value"], 1.959964 * 0.01, rtol=1e-5)
    assert result.most_different("cka", "A", "B") == (1, 1)
    assert found.attrs["model_b"] == "B"


def test_models_of_other_depth_are_compared_at_the_same_share_of_it():
    result = of_depths(2, 4, np.arange(15).reshape(3, 5) / 20)
    found = result.equal_depth("cka", "A", "B")
    assert list(zip(found["layer"].values, found["layer_b"].values, strict=True)) == [
        (0, 0),
        (1, 2),
        (2, 4),
    ]
    np.testing.assert_allclose(found["value"], [0, 7 / 20, 14 / 20])
    back = result.equal_depth("cka", "B", "A")
    assert list(back["layer"].values) == [0, 2, 4]


def test_layers_without_a_value_are_not_the_most_different():
    block = np.diag([np.nan, 0.5, 0.4])
    assert of_depths(2, 2, block).most_different("cka", "A", "B") == (2, 2)
    with pytest.raises(ResultError, match="'cka' of 'A' and 'B' is undefined at every depth"):
        of_depths(2, 2, np.full((3, 3), np.nan)).most_different("cka", "A", "B")


def test_the_summary_is_json_and_says_what_the_result_says():
    block = np.diag([np.nan, 0.5, 0.4])
    result = of_depths(
        2, 2, block, measures=("cka", "attention_distance", "rankme"), notes=("Mind the gap.",)
    )
    told = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert told["format"] == 1
    assert told["images"] == {"source": "photos.zip", "count": 12, "sha256": "9f" * 32}
    assert told["notes"] == ["Mind the gap."]
    assert [model["name"] for model in told["models"]] == ["A", "B"]
    assert told["models"][0]["facts"]["heads"] == 3
    (pair,) = told["similarity"]
    assert pair["mean"] == pytest.approx(0.45)
    assert pair["layers"][0]["value"] is None
    assert (pair["most_different"]["layer_a"], pair["most_different"]["value"]) == (2, 0.4)
    rows = {(row["measure"], row["model"]): row for row in told["by_layer"]}
    distance = rows["attention_distance", "A"]
    assert distance["units"] == "px"
    expected = result.by_layer("attention_distance", "A")
    np.testing.assert_allclose(distance["value"], expected["value"])
    np.testing.assert_allclose(distance["high"], expected["high"])
    assert rows["rankme", "B"]["layers"] == [0, 1, 2]
    (difference,) = told["differences"]
    assert (difference["measure"], difference["images"]) == ("attention_distance", 12)
    assert told["group_means"] == told["scores"] == []


def test_scores_are_in_the_summary_with_null_for_what_they_do_not_have():
    score = Score("A", "a.pth", "knn", "digits", 100, "top1", 0.9, settings={"k": 20})
    result = comparison({"A": Subject(2)}, measures=("rankme",)).with_scores(Scores([score]))
    (row,) = json.loads(json.dumps(result.summary(), allow_nan=False))["scores"]
    assert (row["model"], row["value"]) == ("A", 0.9)
    assert row["low"] is row["layer"] is None


def test_groups_are_in_the_summary_and_one_seed_has_no_interval():
    result = of_depths(2, 2, np.eye(3), measures=("cka", "rankme"), groups={"X": ["A"], "Y": ["B"]})
    told = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert {row["group"] for row in told["group_means"]} == {"X", "Y"}
    assert told["group_means"][0]["low"] is None
    assert told["group_differences"][0]["verdict"] == "one seed: no interval"
