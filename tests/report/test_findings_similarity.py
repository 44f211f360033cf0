"""What is found of similarity: extremes, ties, floors, pairs of models."""

from __future__ import annotations

import numpy as np
from plots.synthetic import Subject, comparison
from report.known import plain

from vitprobe.report import findings
from vitprobe.report.lists import lists_of


def test_extremes_of_a_pair_with_intervals():
    block = np.full((4, 3), 0.5)
    block[2, 1] = 0.9
    block[3, 0] = -0.1
    block[3, 2] = 0.4
    result = comparison(
        {"A": Subject(3), "B": Subject(2)}, cka={("A", "B"): block}, error=0.01, floor=np.nan
    )
    extremes, deep, mean = map(plain, findings.similarity(result, "A", "B"))
    assert extremes == (
        "Layer 2 of A and layer 1 of B are most alike (CKA 0.90 [0.88, 0.92]), layer 3 of A and "
        "layer 0 of B least (-0.10 [-0.12, -0.08])."
    )
    # Of models of 3 and 2 blocks, only the first layers and the last are at equal depth.
    assert deep == (
        "At equal depth, layer 3 of A and layer 2 of B differ most (0.40 [0.38, 0.42])."
    )
    assert result.most_different("cka", "A", "B") == (3, 2)
    assert mean == "The mean over 12 layer pairs is 0.48 [0.46, 0.49]."


def test_ties_and_undefined_cells_are_said():
    block = np.full((3, 3), 0.5)
    block[0, 0] = block[1, 1] = 0.8
    block[2, 2] = np.nan
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block}, floor=np.nan)
    extremes, _, undefined = map(plain, findings.similarity(result, "A", "B"))
    assert extremes == (
        "2 layer pairs of A and B are most alike (CKA 0.80), 6 layer pairs least (0.50)."
    )
    assert undefined == "1 of 9 layer pairs is undefined and hatched in the figure."


def test_a_flat_or_empty_pair():
    flat = {("A", "B"): np.full((2, 2), 0.25)}
    result = comparison({"A": Subject(1), "B": Subject(1)}, cka=flat, floor=np.nan)
    assert findings.similarity(result, "A", "B") == ["All 4 layer pairs of A and B have CKA 0.25."]
    empty = {("A", "B"): np.full((2, 2), np.nan)}
    result = comparison({"A": Subject(1), "B": Subject(1)}, cka=empty)
    assert findings.similarity(result, "A", "B") == [
        "CKA is undefined for every layer pair of A and B."
    ]
    assert findings.last_layers(result) == []


def test_a_model_with_itself_leaves_the_diagonal_out():
    own = np.array([[1, 0.9, 0.3], [0.9, 1, 0.6], [0.3, 0.6, 1]])
    result = comparison({"A": Subject(2)}, cka={("A", "A"): own}, error=0.01, floor=np.nan)
    assert [plain(text) for text in findings.similarity(result, "A", "A")] == [
        "Within A, layers 0 and 2 are least alike (CKA 0.30 [0.28, 0.32]).",
        "From one layer to the next, most changes between layers 1 and 2 (0.60 [0.58, 0.62]).",
    ]


def test_pairs_are_ranked_by_their_mean():
    blocks = {
        ("A", "B"): np.full((2, 2), 0.7),
        ("A", "C"): np.full((2, 2), 0.1),
        ("B", "C"): np.full((2, 2), 0.2),
    }
    subjects = {name: Subject(1) for name in "ABC"}
    result = comparison(subjects, cka=blocks, error=0.01)
    assert plain(findings.overall_similarity(result, lists_of(result))) == (
        "At equal depth, A and B are the most alike pair of models (mean CKA 0.70 [0.68, 0.72]) "
        "and A and C the least (0.10 [0.08, 0.12])."
    )
    assert [plain(text) for text in findings.last_layers(result)] == [
        "CKA of the last layers is 0.70 [0.68, 0.72] for A and B, 0.20 [0.18, 0.22] for B and C "
        "and 0.10 [0.08, 0.12] for A and C."
    ]
    equal = comparison(subjects, cka=dict.fromkeys(blocks, np.full((2, 2), 0.3)))
    assert findings.overall_similarity(equal, lists_of(equal)) == (
        "All pairs of models are equally alike: mean CKA at equal depth 0.30."
    )


def test_many_pairs_give_only_the_ends_of_the_range():
    result = comparison({name: Subject(1) for name in "ABCDE"})
    (sentence,) = findings.last_layers(result)
    assert sentence.startswith("CKA of the last layers runs from ")


def test_dominant_directions_are_listed_as_ranges():
    share = np.array([0.2, 0.6, 0.7, 0.2, 0.9])
    result = comparison({"A": Subject(4, share=share), "B": Subject(4)})
    assert [plain(s) for s in findings.dominance(result)] == [
        "One direction holds more than half of the variance of layers 1 to 2 and 4 of A (up to "
        "90 % in layer 4): CKA there mostly compares that direction."
    ]
    assert plain(findings.largest_share(result)) == (
        "Largest share by model: A 90 % in layer 4 and B 40 % in layer 4."
    )


def test_dominant_directions_of_many_models_are_one_sentence():
    share = np.array([0.2, 0.6])
    subjects = {name: Subject(1, share=share) for name in "ABCD"}
    assert [plain(s) for s in findings.dominance(comparison({**subjects, "E": Subject(1)}))] == [
        "One direction holds more than half of the variance of layer 1 of A (60 %), layer 1 of B "
        "(60 %), layer 1 of C (60 %) and layer 1 of D (60 %): CKA there mostly compares that "
        "direction."
    ]
    subjects["E"] = Subject(1, share=share + 0.1)
    assert [plain(s) for s in findings.dominance(comparison({**subjects, "F": Subject(1)}))] == [
        "One direction holds more than half of the variance of some layers of 5 of 6 models (up to "
        "70 % in E): CKA there mostly compares that direction."
    ]


def test_whole_rows_and_columns_that_tie_are_named():
    block = np.repeat([[0.2], [0.9], [0.4]], 3, axis=1)
    own = {("B", "B"): np.full((3, 3), 0.9999)}
    blocks = {("A", "B"): block, **own}
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka=blocks, floor=np.nan)
    assert findings.similarity(result, "A", "B")[0] == (
        "Layer 1 of A and layers 0 to 2 of B are most alike (CKA 0.90), layer 0 of A and layers 0 "
        "to 2 of B least (0.20)."
    )
    assert findings.similarity(result, "B", "B") == ["All layers of B are alike (CKA 1.00)."]


def test_values_equal_as_printed_name_no_extreme():
    share = np.full(4, 0.4) + 1e-4 * np.arange(4)
    result = comparison({"A": Subject(3, 2, share=share)})
    assert plain(findings.largest_share(result)).endswith("A 40 % in every layer.")


def test_an_untrained_model_among_the_most_alike_is_cautioned():
    blocks = {
        ("A", "B"): np.full((2, 2), 0.7),
        ("A", "C"): np.full((2, 2), 0.1),
        ("B", "C"): np.full((2, 2), 0.2),
    }

    def sentence(untrained):
        extra = {"extra": {"spec": "init:deit_tiny_patch16_224"}}
        subjects = {name: Subject(1, **(extra if name == untrained else {})) for name in "ABC"}
        result = comparison(subjects, cka=blocks)
        return findings.overall_similarity(result, lists_of(result))

    assert " B was never trained: such a model passes the image through almost" in sentence("B")
    assert "never trained" not in sentence("C")


def test_cells_that_do_not_exceed_their_floor_are_counted():
    block = np.array([[0.5, 0.04], [0.05, np.nan]])
    subjects = {"A": Subject(1), "B": Subject(1)}
    result = comparison(subjects, cka={("A", "B"): block}, floor=0.05)
    how = " The floor (bracket at the colour bar) is what shuffling the images of one side reaches."
    assert findings.floors(result, "cka", [("A", "B")]) == [
        f"2 of 3 cells do not exceed their floor and are dotted.{how}"
    ]
    assert findings.similarity(result, "A", "B")[-1].startswith("2 of 3 cells")
    assert findings.floors(result, "cka", [("A", "A")]) == [f"Every cell exceeds its floor.{how}"]
    high = comparison(subjects, cka={("A", "B"): block}, floor=0.6)
    assert findings.floors(high, "cka", [("A", "B")])[0].startswith("All 3 cells do not exceed")
    low = comparison(subjects, cka={("A", "B"): block}, floor=0.04)
    assert findings.floors(low, "cka", [("A", "B")])[0].startswith("1 of 3 cells does not exceed")
    none = comparison(subjects, floor=np.nan)
    assert findings.floors(none, "cka", [("A", "B")]) == []


def test_widths_of_intervals_in_words():
    result = comparison({"A": Subject(1), "B": Subject(1)}, error=0.01)
    text = plain(findings.widths(result, "cka", "A", "B"))
    assert text.endswith("one cell at a time: 0.0392 in the middle, 0.0392 at most.")
    biased = comparison({"A": Subject(1), "B": Subject(1)}, estimator="biased")
    assert findings.widths(biased, "cka", "A", "B") == "No cell has an interval."


def test_pairs_are_ranked_by_other_measures_only_where_every_cell_is_defined():
    result = comparison({name: Subject(1) for name in "ABC"}, measures=("svcca",))
    text = " ".join(findings.grid(result, "svcca", result.models))
    assert "mean over layer pairs runs from" in text
    value = result.tree["similarity"]["svcca"]
    value[0, 2] = value[2, 0] = np.nan
    text = " ".join(findings.grid(result, "svcca", result.models))
    assert "mean over" not in text
    assert "1 cell is undefined and hatched" in text
    assert "(over 3 of 4)" in findings.mean_by_pair(result, "svcca")
