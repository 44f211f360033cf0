"""Headline and summary: what of all findings is said first, and for whom."""

from __future__ import annotations

import numpy as np
import pytest
from plots.synthetic import EVERY, Subject, comparison
from report.known import plain, seeds, trained_and_twin

from vitprobe.measures.registry import MEASURES
from vitprobe.report import findings
from vitprobe.report.lists import lists_of


def test_the_summary_ranks_pairs_as_the_tiles_and_the_map_do():
    """One model of layers alike is near to all, over all layer pairs."""
    blocks = {
        ("A", "B"): np.array([[0.9, 0.1], [0.1, 0.9]]),
        ("A", "C"): np.full((2, 2), 0.7),
        ("B", "C"): np.full((2, 2), 0.6),
    }
    result = comparison({name: Subject(1) for name in "ABC"}, cka=blocks)
    lists = lists_of(result)
    sentence = findings.overall_similarity(result, lists)
    (_, most, models), (_, least, others) = findings.headline(result, lists)[:2]
    assert models == "A and B"
    assert f"{models} are the most alike pair of models (mean CKA {most})" in sentence
    assert f"{others} the least ({least})" in sentence


def test_one_model_is_described_alone():
    result = comparison({"A": Subject(4, 2, distance=np.full((4, 2), 0.5))})
    value = 0.5 * Subject().uniform_distance()
    assert plain(findings.locality(result)) == (
        f"In the first block, A has a mean attention distance of {value:.1f} px "
        "(50 % of uniform attention)."
    )
    assert len(findings.summary(result, lists_of(result))) == 4


def test_assumed_facts_are_said_with_their_values():
    subjects = {
        "A": Subject(4, heads=12, assumed=("heads", "mean")),
        "B": Subject(4, assumed=("norm_eps",)),
        "C": Subject(4),
        "D": Subject(4, assumed=("mean",)),
    }
    result = comparison(subjects)
    assert findings.assumed_heads(result) == [("A", 12)]
    assert findings.other_assumptions(result) == (
        "Assumed, not read: mean (0.485 / 0.456 / 0.406) of A and D; norm eps (1e-06) of B."
    )
    assert findings.other_assumptions(comparison({"C": Subject(4)})) == ""


def test_a_twin_is_no_model_of_the_findings():
    result = trained_and_twin()
    assert findings.shown(result) == ("A",)
    sentences = [
        text
        for topic, text in findings.summary(result, lists_of(result))
        if topic not in ("Training", "Differences")
    ]
    assert not [text for text in sentences if "untrained" in text]


def test_the_summary_of_seeds_ranks_no_single_models():
    result = seeds(0.2)
    topics = [topic for topic, _ in findings.summary(result, lists_of(result))]
    assert "Focus" not in topics
    assert "Last layers" not in topics
    assert set(topics) == {"Similarity", "Methods"}


def test_every_difference_of_methods_that_holds_is_listed_whatever_the_measure():
    starts = {"A": 20.0, "B": 29.0}
    rank = {f"{method} {i}": starts[method] + i / 9 for method in "AB" for i in (1, 2, 3)}
    result = comparison(
        {
            name: Subject(2, 2, tokens={"effective_rank": np.full((64, 3), value)}, sink=sink)
            for (name, value), sink in zip(rank.items(), [0.1, 0.2, 0.3] * 2, strict=True)
        },
        measures=("sink_mass", "effective_rank"),
        groups={method: [name for name in rank if name[0] == method] for method in "AB"},
    )
    found = [plain(text) for _, text in findings.summary(result, lists_of(result))]
    assert found == [
        "Effective rank: A lower by 9.0 dimensions [8.7, 9.3] than B.",
        "In 1 of 2 comparisons, the two methods cannot be told apart.",
    ]


@pytest.mark.parametrize("measure", ["cka_rbf", "svcca", "rankme", "attention_nmi"])
@pytest.mark.parametrize("names", ["A", "AB"])
def test_no_summary_is_without_a_line_of_what_was_measured(measure, names):
    result = comparison({name: Subject(2) for name in names}, measures=(measure,))
    (_, first), *_ = findings.summary(result, lists_of(result))
    assert first.startswith(MEASURES[measure].title)
    assert all(name in first for name in names)


def test_a_summary_of_many_other_measures_is_short():
    measures = tuple(name for name in EVERY if name not in ("cka", *findings.MAIN))
    result = comparison({"A": Subject(1)}, measures=measures, images=4)
    topics = [topic for topic, _ in findings.summary(result, lists_of(result))]
    assert topics == ["Similarity"] * 4 + ["More"]


def test_where_every_method_has_one_seed_that_is_said_once():
    result = comparison({"A 1": Subject(2), "B 1": Subject(2)}, groups={"A": ["A 1"], "B": ["B 1"]})
    found = [text for _, text in findings.summary(result, lists_of(result))]
    assert [text for text in found if "seed" in text and "Mean CKA" not in text] == [
        "There is one seed a method, and so no interval: no difference can be judged."
    ]


def test_summary_says_only_what_was_measured():
    result = comparison({"A": Subject(4), "B": Subject(4)}, measures=("cka",))
    assert {topic for topic, _ in findings.summary(result, lists_of(result))} == {
        "Similarity",
        "Last layers",
    }
    result = comparison({"A": Subject(4)}, measures=("attention_entropy", "sink_mass"))
    assert [topic for topic, _ in findings.summary(result, lists_of(result))] == ["Focus", "Sinks"]
