"""What is found of layers: attention, sinks, profiles along depth."""

from __future__ import annotations

import numpy as np
import pytest
from plots.synthetic import ALL, TOKENS, Subject, comparison
from report.known import constant, plain

from vitprobe.report import findings
from vitprobe.report.lists import lists_of


def noisy(means: list[float], spread: float) -> np.ndarray:
    """(images, depth, 2): in every block both heads have the same mean and spread over images."""
    offsets = np.linspace(-1, 1, 64) * spread
    return np.array(means)[None, :, None] + offsets[:, None, None] + np.zeros((1, 1, 2))


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


def test_first_blocks_are_a_quarter_rounded_up():
    depths = {1: 1, 4: 1, 5: 2, 6: 2, 9: 3, 12: 3}
    for depth, first in depths.items():
        assert findings.first_blocks(comparison({"A": Subject(depth)}), "A") == first


def test_captions_are_relative_where_the_figures_are():
    subjects = {"A": Subject(2), "B": Subject(2, grid=(7, 7), patch=4)}
    assert "% of uniform" in plain(findings.trend(comparison(subjects), "attention_distance", "A"))


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
