"""Findings on results whose answers are known."""

from __future__ import annotations

import re

import numpy as np
import pytest
from plots.synthetic import ALL, EVERY, TOKENS, Subject, comparison

from vitprobe.measures.registry import MEASURES
from vitprobe.report import findings
from vitprobe.report.lists import Lists, lists_of

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
    block[3, 2] = 0.4
    result = comparison(
        {"A": Subject(3), "B": Subject(2)}, cka={("A", "B"): block}, error=0.01, floor=np.nan
    )
    extremes, deep, mean = map(plain, findings.similarity(result, "A", "B"))
    assert extremes == (
        "Layer 2 of A and layer 1 of B are most alike (CKA 0.90 [0.88, 0.92]), layers 3 and 0 "
        "least (-0.10 [-0.12, -0.08])."
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
    assert f"near {near.mean() * Subject().uniform_distance():.1f} px [" in sentence


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
    assert "A and B cannot be told apart: they differ by 0.0 px [-0.3, 0.3]" in sentence
    assert "most locally" not in sentence


def test_dots_stand_for_two_models_at_least():
    """Five are as many as are listed, and of six two have no room."""

    def listed(names):
        subjects = {
            name: Subject(4, 2, distance=constant(0.2 + 0.1 * i, noise=0.01))
            for i, name in enumerate(names)
        }
        return findings.locality(comparison(subjects, measures=("attention_distance",)))

    five, six = listed("ABCDE"), listed("ABCDEF")
    assert "…" not in five
    assert all(f" {name} " in five.partition("distance: ")[2] for name in "BCDE")
    assert ", … F " in six
    assert " E " not in six


def test_equal_models_are_equal():
    subjects = {name: Subject(4, 2, entropy=np.full((4, 2), 0.5)) for name in "ABC"}
    result = comparison(subjects)
    sentence = findings.focus(result, lists_of(result))
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
    assert len(findings.summary(result, lists_of(result))) == 4


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
        "Share of patch attention that goes to prefix tokens: 20 % in A, by block between 10 % "
        "(blocks 0 to 1 and 3) and 50 % (block 2); B has no prefix tokens, so its sink mass is 0 "
        "by construction."
    )


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


def noisy(means: list[float], spread: float) -> np.ndarray:
    """(images, depth, 2): in every block both heads have the same mean and spread over images."""
    offsets = np.linspace(-1, 1, 64) * spread
    return np.array(means)[None, :, None] + offsets[:, None, None] + np.zeros((1, 1, 2))


def test_blocks_whose_intervals_share_no_value_are_a_range():
    means = [0.0088, 0.0104, 0.0120, 0.0148, 0.0090, 0.0129]
    result = comparison({"FM": Subject(6, 2, sink=noisy(means, 0.002))})
    span = "between 0.88 % [0.85, 0.91] (block 0) and 1.48 % [1.45, 1.51] (block 3)"
    assert f"FM: sink mass lies {span}; " in plain(findings.trend(result, "sink_mass", "FM"))
    assert plain(findings.sinks(result)).endswith(f"1.13 % [1.10, 1.16] in FM, by block {span}.")


def test_blocks_whose_intervals_share_a_value_are_alike():
    sink = noisy([0.0300, 0.0302, 0.0301], 0.004)
    result = comparison({"A": Subject(3, 2, sink=sink)})
    assert plain(findings.trend(result, "sink_mass", "A")) == (
        "A: sink mass stays near its mean of 3.01 % [2.95, 3.07] in every block; all heads are "
        "alike."
    )
    assert plain(findings.sinks(result)).endswith(
        "3.01 % [2.95, 3.07] in A (alike in every block)."
    )


def test_a_profile_grows_only_where_no_block_falls_clearly_below_an_earlier_one():
    def sentence(means):
        result = comparison({"A": Subject(len(means), 2, sink=noisy(means, 0.004))})
        return plain(findings.trend(result, "sink_mass", "A"))

    assert "sink mass grows from 3.00 % " in sentence([0.0300, 0.0360, 0.0359, 0.0420])
    assert "sink mass falls from 4.20 % " in sentence([0.0420, 0.0360, 0.0359, 0.0300])
    assert "lies between 3.00 % " in sentence([0.0300, 0.0500, 0.0360, 0.0420])


def test_heads_and_blocks_are_told_apart_by_enough_digits():
    sink = np.linspace(0.0301, 0.0304, 6).reshape(3, 2)
    result = comparison({"A": Subject(3, 2, sink=sink)})
    assert plain(findings.trend(result, "sink_mass", "A")) == (
        "A: sink mass grows from 3.013 % in block 0 to 3.037 % in block 2; the highest head is "
        "head 1 of block 2 (3.040 %)."
    )


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


def test_first_blocks_are_a_quarter_rounded_up():
    depths = {1: 1, 4: 1, 5: 2, 6: 2, 9: 3, 12: 3}
    for depth, first in depths.items():
        assert findings.first_blocks(comparison({"A": Subject(depth)}), "A") == first


def test_captions_are_relative_where_the_figures_are():
    subjects = {"A": Subject(2), "B": Subject(2, grid=(7, 7), patch=4)}
    assert "% of uniform" in plain(findings.trend(comparison(subjects), "attention_distance", "A"))


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
    assert findings.differences(many) == [
        "0 of 1 paired difference between models hold after Holm's correction; A and B in "
        "attention entropy cannot be told apart."
    ]


def test_differences_that_all_hold():
    subjects = {
        "A": Subject(2, 2, entropy=constant(0.3, 2, noise=0.01)),
        "B": Subject(2, 2, entropy=constant(0.5, 2, noise=0.02)),
    }
    result = comparison(subjects, measures=("attention_entropy",))
    assert findings.differences(lists_of(result).differences) == [
        "The one paired difference between models holds."
    ]
    alone = comparison({"A": Subject(2)})
    assert findings.differences(lists_of(alone).differences) == []


def trained_and_twin():
    own = constant(0.3, 2, noise=0.02)
    subjects = {
        "A": Subject(2, 2, distance=own, entropy=own, sink=own),
        "A (untrained)": Subject(2, 2, distance=own + 0.2, entropy=own, sink=own - 0.1),
    }
    block = np.full((3, 3), 0.4)
    return comparison(
        subjects, cka={("A", "A (untrained)"): block}, references={"A": "A (untrained)"}
    )


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


def test_a_twin_is_no_model_of_the_findings():
    result = trained_and_twin()
    assert findings.shown(result) == ("A",)
    sentences = [
        text
        for topic, text in findings.summary(result, lists_of(result))
        if topic not in ("Training", "Differences")
    ]
    assert not [text for text in sentences if "untrained" in text]


def seeds(shift: float):
    """Two methods of three seeds: a mean difference of `shift`, and a spread of 0.01."""
    offsets = np.array([-0.01, 0.0, 0.01])
    subjects, groups = {}, {}
    for method, start in (("A", 0.3), ("B", 0.3 + shift)):
        groups[method] = [f"{method} {i}" for i in range(3)]
        for name, offset in zip(groups[method], offsets, strict=True):
            subjects[name] = Subject(2, 2, entropy=constant(0.3, 2) * 0 + start + offset)
    return comparison(subjects, measures=("cka", "attention_entropy"), groups=groups)


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


def test_where_every_method_has_one_seed_that_is_said_once():
    result = comparison({"A 1": Subject(2), "B 1": Subject(2)}, groups={"A": ["A 1"], "B": ["B 1"]})
    found = [text for _, text in findings.summary(result, lists_of(result))]
    assert [text for text in found if "seed" in text and "Mean CKA" not in text] == [
        "There is one seed a method, and so no interval: no difference can be judged."
    ]


@pytest.mark.parametrize("measure", TOKENS)
def test_token_measures_are_given_with_their_intervals(measure):
    result = comparison({"A": Subject(3)}, measures=TOKENS)
    text = plain(findings.token_trend(result, measure))
    assert text.startswith("A: ")
    assert text.count("[") == 2
    assert "in layer 0, " in text
    assert "pointwise" in findings.band_of_tokens(result, measure)


def test_captions_say_what_bands_and_bars_are():
    result = comparison({"A": Subject(2)}, measures=(*ALL, "rollout_distance"))
    text = plain(findings.band_of_overlay(result, "attention_entropy"))
    assert "band: 95 % interval of that mean over 64 images, block by block (pointwise)" in text
    assert "middle half of the heads, which is no uncertainty" in text
    assert "heads" not in findings.band_of_overlay(result, "rollout_distance")
    assert findings.band_of_tokens(result, "first_direction_share").startswith("This measure has")


def test_summary_says_only_what_was_measured():
    result = comparison({"A": Subject(4), "B": Subject(4)}, measures=("cka",))
    assert {topic for topic, _ in findings.summary(result, lists_of(result))} == {
        "Similarity",
        "Last layers",
    }
    result = comparison({"A": Subject(4)}, measures=("attention_entropy", "sink_mass"))
    assert [topic for topic, _ in findings.summary(result, lists_of(result))] == ["Focus", "Sinks"]
