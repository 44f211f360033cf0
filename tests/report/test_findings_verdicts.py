"""Verdicts: differences between models and between methods."""

from __future__ import annotations

import re

import numpy as np
from plots.synthetic import Subject, comparison
from report.known import constant, plain, seeds, trained_and_twin

from vitprobe.report import findings
from vitprobe.report.lists import Lists, lists_of


def test_a_difference_that_holm_does_not_let_stand_is_not_claimed():
    rng = np.random.default_rng(0)
    near = constant(0.3, noise=0.05)
    # The interval of one difference alone leaves 0 out; as one of 30 it does not count.
    shift = rng.normal(size=64)
    shift = 0.001 + 0.004 * (shift - shift.mean()) / shift.std(ddof=1)
    subjects = {
        "A": Subject(4, 2, entropy=near),
        "B": Subject(4, 2, entropy=near + shift[:, None, None]),
    }
    result = comparison(subjects, measures=("attention_entropy",))
    lists = lists_of(result)
    assert plain(findings.focus(result, lists)).startswith("Over all blocks, A attends most narrow")
    many = lists.differences.copy()
    many["verdict"] = "cannot be told apart"
    undecided = findings.focus(result, Lists(many, None, None, {}))
    assert "cannot be told apart after Holm's correction: they differ by" in undecided
    # The tile says what the sentence below it says.
    assert findings.headline(result, lists)[-1][2] == "A"
    assert findings.headline(result, Lists(many, None, None, {}))[-1][2] == (
        "A, not told apart from B"
    )
    assert findings.differences(result, many) == [
        "0 of 1 paired difference between models hold after Holm's correction (of means over heads "
        "and layers: single layers may differ either way); A and B in attention entropy cannot be "
        "told apart."
    ]


def test_differences_that_all_hold():
    subjects = {
        "A": Subject(2, 2, entropy=constant(0.3, 2, noise=0.01)),
        "B": Subject(2, 2, entropy=constant(0.5, 2, noise=0.02)),
    }
    result = comparison(subjects, measures=("attention_entropy",))
    assert findings.differences(result, lists_of(result).differences) == [
        "The one paired difference between models holds (of means over heads and layers: single "
        "layers may differ either way)."
    ]
    alone = comparison({"A": Subject(2)})
    assert findings.differences(alone, lists_of(alone).differences) == []


def test_models_of_one_mean_that_differ_both_ways_along_depth():
    rng = np.random.default_rng(0)
    low = 0.3 + 0.01 * rng.normal(size=(64, 4, 2))
    tilt = np.array([0.1, 0.1, -0.1, -0.1])[:, None]
    noise = 0.01 * rng.normal(size=(64, 4, 2))
    noise -= noise.mean()
    result = comparison(
        {"A": Subject(4, 2, entropy=low + tilt + noise), "B": Subject(4, 2, entropy=low)},
        measures=("attention_entropy",),
    )
    assert findings.differences(result, lists_of(result).differences)[1:] == [
        "Though their means cannot be told apart, A is above B in attention entropy in blocks 0 to "
        "1 and below in blocks 2 to 3."
    ]


def test_what_training_changed_is_said_beside_the_untrained_twin():
    result = trained_and_twin()
    (sentence,) = map(plain, findings.beyond_untrained(result, lists_of(result)))
    shift = 0.2 * Subject().uniform_distance()
    assert sentence.startswith(
        "A against its untrained twin: CKA of the last layers 0.40 [0.36, 0.44]; attention "
        f"distance lower by {shift:.3f}"
    )
    assert "attention entropy cannot be told apart" in sentence
    assert "sink mass higher by 10" in sentence


def test_claims_about_methods_take_seeds_as_the_unit():
    # Over images every difference stands (there is no noise); over seeds only the large one does.
    for shift, expected in (
        (0.2, "Attention entropy: A lower by 1.06 nats [0.94, 1.18] than B."),
        (0.005, "In 1 of 1 comparison, the two methods cannot be told apart."),
    ):
        result = seeds(shift)
        lists = lists_of(result)
        assert expected in map(plain, findings.methods(result, lists))
        pair = lists.differences[
            (lists.differences["model_a"] == "A 1") & (lists.differences["model_b"] == "B 1")
        ]
        assert pair["verdict"].item() == "lower"


def test_differences_of_shares_are_in_percentage_points():
    result = trained_and_twin()
    (sentence,) = map(plain, findings.beyond_untrained(result, lists_of(result)))
    assert re.search(r"sink mass higher by 10\S* percentage points", sentence)


def test_a_forest_counts_its_own_rows():
    same = constant(0.3, 2, noise=0.02)
    subjects = {
        "A": Subject(2, 2, entropy=same),
        "B": Subject(2, 2, entropy=same),
        "C": Subject(2, 2, entropy=same + 0.1),
    }
    table = lists_of(comparison(subjects, measures=("attention_entropy",))).differences
    assert "(1 of 3)" in findings.forest(table, 21)
    assert "over 21 listed differences" in findings.forest(table, 21)
    assert "hollow" not in findings.forest(table[table["verdict"] != "cannot be told apart"], 21)


def test_similarity_of_methods_has_its_interval_over_seeds():
    result = seeds(0.2)
    table = result.group_similarity("cka")
    text = plain(findings.methods_similarity(table))
    within = table[(table["group_a"] == "A") & (table["group_b"] == "A")].iloc[0]
    assert f"{within['mean']:.2f}" in text
    assert "within A, " in text
    assert "between A and B" in text


def test_one_seed_says_nothing_of_a_method():
    result = comparison(
        {"A 1": Subject(2), "B 1": Subject(2), "B 2": Subject(2)},
        measures=("attention_entropy",),
        groups={"A": ["A 1"], "B": ["B 1", "B 2"]},
    )
    assert findings.methods(result, lists_of(result)) == [
        "1 of 1 comparison cannot be judged: one method has a single seed."
    ]
