"""Findings on results whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from plots.synthetic import Subject, comparison

from vitprobe.report import findings

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def plain(text: str) -> str:
    return text.replace(NBSP, " ").replace(MINUS, "-")


def constant(value: float, depth: int = 4, heads: int = 2, images: int = 64, noise: float = 0.0):
    """(images, depth, heads) around one value; every image has its own offset."""
    offsets = np.random.default_rng(int(value * 1000)).normal(size=(images, 1, 1)) * noise
    return np.broadcast_to(value + offsets, (images, depth, heads))


def test_extremes_of_a_pair_with_intervals():
    block = np.full((4, 3), 0.5)
    block[2, 1] = 0.9
    block[3, 0] = -0.1
    result = comparison({"A": Subject(3), "B": Subject(2)}, cka={("A", "B"): block}, error=0.01)
    extremes, mean = map(plain, findings.similarity(result, "A", "B"))
    assert extremes == (
        "Layer 2 of A and layer 1 of B are most alike (CKA 0.90 [0.88, 0.92]), layers 3 and 0 "
        "least (-0.10 [-0.12, -0.08])."
    )
    assert mean == "The mean over 12 layer pairs is 0.48."


def test_ties_and_undefined_cells_are_said():
    block = np.full((3, 3), 0.5)
    block[0, 0] = block[1, 1] = 0.8
    block[2, 2] = np.nan
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block})
    extremes, _, undefined = map(plain, findings.similarity(result, "A", "B"))
    assert extremes == (
        "2 layer pairs of A and B are most alike (CKA 0.80), 6 layer pairs least (0.50)."
    )
    assert undefined == "1 of 9 layer pairs is undefined and hatched in the figure."


def test_a_flat_or_empty_pair():
    flat = {("A", "B"): np.full((2, 2), 0.25)}
    result = comparison({"A": Subject(1), "B": Subject(1)}, cka=flat)
    assert findings.similarity(result, "A", "B") == ["All 4 layer pairs of A and B have CKA 0.25."]
    empty = {("A", "B"): np.full((2, 2), np.nan)}
    result = comparison({"A": Subject(1), "B": Subject(1)}, cka=empty)
    assert findings.similarity(result, "A", "B") == [
        "CKA is undefined for every layer pair of A and B."
    ]
    assert findings.last_layers(result) == []


def test_a_model_with_itself_leaves_the_diagonal_out():
    own = np.array([[1, 0.9, 0.3], [0.9, 1, 0.6], [0.3, 0.6, 1]])
    result = comparison({"A": Subject(2)}, cka={("A", "A"): own}, error=0.01)
    assert findings.similarity(result, "A", "A") == [
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
    assert findings.overall_similarity(result) == (
        "Over all layers, A and B are the most alike pair of models (mean CKA 0.70) and A and C "
        "the least (0.10)."
    )
    assert findings.last_layers(result) == [
        "CKA of the last layers is 0.70 [0.68, 0.72] for A and B, 0.20 [0.18, 0.22] for B and C "
        "and 0.10 [0.08, 0.12] for A and C."
    ]
    equal = comparison(subjects, cka=dict.fromkeys(blocks, np.full((2, 2), 0.3)))
    assert findings.overall_similarity(equal) == (
        "All pairs of models are equally alike: mean CKA over layer pairs 0.30."
    )


def test_many_pairs_give_only_the_ends_of_the_range():
    result = comparison({name: Subject(1) for name in "ABCDE"})
    (sentence,) = findings.last_layers(result)
    assert sentence.startswith("CKA of the last layers runs from ")


def test_the_most_local_model_is_named_with_a_paired_interval():
    near = constant(0.3, depth=8, noise=0.05)
    far = near + 0.2 + np.random.default_rng(1).normal(size=(64, 1, 1)) * 0.001
    result = comparison({"far": Subject(8, 2, distance=far), "near": Subject(8, 2, distance=near)})
    sentence = plain(findings.locality(result))
    assert sentence.startswith("In the first 2 blocks, near attends most locally, ahead of far by ")
    assert "paired over 64 images" in sentence
    uniform = Subject().uniform_distance()
    assert f"near {near.mean() * uniform:.1f} px" in sentence


def test_only_the_first_quarter_of_the_blocks_counts():
    early, late = np.full((8, 2), 0.9), np.full((8, 2), 0.5)
    early[:2] = 0.1
    result = comparison({"late": Subject(8, 2, distance=late), "e": Subject(8, 2, distance=early)})
    assert "e attends most locally" in findings.locality(result)


def test_models_whose_paired_difference_holds_zero_are_not_told_apart():
    a = constant(0.3, noise=0.05)
    b = a + np.where(np.arange(64) % 2, 0.01, -0.01)[:, None, None]
    subjects = {"A": Subject(4, 2, distance=a), "B": Subject(4, 2, distance=b)}
    sentence = plain(findings.locality(comparison(subjects)))
    assert "cannot be told apart by these 64 images" in sentence
    assert "most locally" not in sentence


def test_equal_models_are_equal():
    subjects = {name: Subject(4, 2, entropy=np.full((4, 2), 0.5)) for name in "ABC"}
    sentence = findings.focus(comparison(subjects))
    assert sentence.startswith("Over all blocks, A, B and C attend equally narrowly.")


def test_other_grids_and_depths_compare_relative_to_uniform():
    small = Subject(4, 2, grid=(7, 7), patch=4, distance=np.full((4, 2), 0.8))
    large = Subject(12, 3, distance=np.full((12, 3), 0.4))
    sentence = plain(findings.locality(comparison({"small": small, "large": large})))
    assert sentence.startswith("In the first quarter of their blocks, large attends most locally")
    assert "large 40.0 % of uniform, small 80.0 % of uniform" in sentence


def test_one_model_is_described_alone():
    result = comparison({"A": Subject(4, 2, distance=np.full((4, 2), 0.5))})
    value = 0.5 * Subject().uniform_distance()
    assert plain(findings.locality(result)) == (
        f"In the first block, A has a mean attention distance of {value:.1f} px "
        "(50 % of uniform attention)."
    )
    assert len(findings.summary(result)) == 4


def test_one_image_is_too_few_to_judge():
    subjects = {
        "A": Subject(4, 2, distance=np.full((4, 2), 0.5)),
        "B": Subject(4, 2, distance=np.full((4, 2), 0.6)),
    }
    assert "too few to judge" in findings.locality(comparison(subjects, images=1))


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_model_without_a_defined_value_is_said():
    subjects = {
        "A": Subject(4, 2, distance=np.full((4, 2), 0.5)),
        "B": Subject(4, 2, distance=np.full((4, 2), np.nan)),
    }
    result = comparison(subjects)
    assert findings.locality(result).endswith("It is undefined for B.")
    assert "undefined in every block" in findings.trend(result, "attention_distance", "B")
    nothing = comparison({"B": subjects["B"]})
    assert findings.locality(nothing).endswith("mean attention distance is undefined for B.")


@pytest.mark.parametrize(
    ("first", "last", "verb"), [(0.2, 0.8, "grows"), (0.8, 0.2, "falls"), (0.5, 0.5, "stays near")]
)
def test_trend_from_first_to_last_block(first, last, verb):
    entropy = np.linspace(first, last, 4)[:, None] * np.ones(2)
    result = comparison({"A": Subject(4, 2, entropy=entropy)})
    assert f"attention entropy {verb} " in findings.trend(result, "attention_entropy", "A")


def test_trend_names_the_lowest_head_and_of_sinks_the_highest():
    values = np.full((3, 2), 0.5)
    values[1, 1] = 0.1
    result = comparison({"A": Subject(3, 2, entropy=values, sink=values + 0.1 * (values < 0.2))})
    assert "the lowest head is head 1 of block 1" in findings.trend(
        result, "attention_entropy", "A"
    )
    assert plain(findings.trend(result, "sink_mass", "A")).endswith(
        "; the highest heads, 5 of 6, are at 50 %."
    )


def test_sinks_name_the_block_and_models_without_prefix_tokens():
    sink = np.full((4, 2), 0.1)
    sink[2] = 0.5
    result = comparison({"A": Subject(4, 2, sink=sink), "B": Subject(4, 2, prefix=0)})
    assert plain(findings.sinks(result)) == (
        "Share of patch attention that goes to prefix tokens: 20 % in A (most in block 2, 50 %); "
        "B has no prefix tokens, so its sink mass is 0 by construction."
    )


def test_dominant_directions_are_listed_as_ranges():
    share = np.array([0.2, 0.6, 0.7, 0.2, 0.9])
    result = comparison({"A": Subject(4, share=share), "B": Subject(4)})
    assert [plain(s) for s in findings.dominance(result)] == [
        "In A, one direction holds more than half of the variance of layers 1 to 2 and 4 (up to "
        "90 % in layer 4): CKA there mostly compares that direction."
    ]
    assert plain(findings.largest_share(result)) == (
        "Largest share by model: A 90 % in layer 4 and B 40 % in layer 4."
    )


def test_assumed_facts_are_said_with_their_values():
    subjects = {
        "A": Subject(4, heads=12, assumed=("heads", "mean")),
        "B": Subject(4, assumed=("norm_eps",)),
        "C": Subject(4),
    }
    result = comparison(subjects)
    assert findings.assumed_heads(result) == [("A", 12)]
    assert findings.other_assumptions(result) == (
        "Assumed, not read: mean (0.485 / 0.456 / 0.406) of A; norm eps (1e-06) of B."
    )
    assert findings.other_assumptions(comparison({"C": Subject(4)})) == ""


def test_whole_rows_and_columns_that_tie_are_named():
    block = np.repeat([[0.2], [0.9], [0.4]], 3, axis=1)
    own = {("B", "B"): np.full((3, 3), 0.9999)}
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block, **own})
    assert findings.similarity(result, "A", "B")[0] == (
        "Layer 1 of A and layers 0 to 2 of B are most alike (CKA 0.90), layer 0 of A and layers 0 "
        "to 2 of B least (0.20)."
    )
    assert findings.similarity(result, "B", "B") == ["All layers of B are alike (CKA 1.00)."]


def test_values_equal_as_printed_name_no_extreme():
    sink = np.linspace(0.0301, 0.0304, 6).reshape(3, 2)
    share = np.full(4, 0.4) + 1e-4 * np.arange(4)
    result = comparison({"A": Subject(3, 2, sink=sink, share=share)})
    assert plain(findings.trend(result, "sink_mass", "A")) == (
        "A: sink mass stays near 3 % from block 0 to block 2; all heads are alike."
    )
    assert plain(findings.sinks(result)).endswith("3 % in A (alike in every block).")
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
        return findings.overall_similarity(comparison(subjects, cka=blocks))

    assert " B was never trained: such a model passes the image through almost" in sentence("B")
    assert "never trained" not in sentence("C")


def test_first_blocks_are_a_quarter_rounded_up():
    depths = {1: 1, 4: 1, 5: 2, 6: 2, 9: 3, 12: 3}
    for depth, first in depths.items():
        assert findings.first_blocks(comparison({"A": Subject(depth)}), "A") == first


def test_captions_are_relative_where_the_figures_are():
    subjects = {"A": Subject(2), "B": Subject(2, grid=(7, 7), patch=4)}
    assert "% of uniform" in plain(findings.trend(comparison(subjects), "attention_distance", "A"))


def test_summary_says_only_what_was_measured():
    result = comparison({"A": Subject(4), "B": Subject(4)}, measures=("cka",))
    assert {topic for topic, _ in findings.summary(result)} == {"Similarity", "Last layers"}
    result = comparison({"A": Subject(4)}, measures=("attention_entropy", "sink_mass"))
    assert [topic for topic, _ in findings.summary(result)] == ["Focus", "Sinks"]
