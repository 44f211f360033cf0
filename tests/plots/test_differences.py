"""Forests of differences and the spread of seeds: what they draw."""

from __future__ import annotations

import numpy as np
import pytest
from plots.synthetic import ALL, TOKENS, Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.style import color_of
from vitprobe.results import Comparison


def seeds() -> Comparison:
    names = [f"{method} {i}" for method in ("MAE", "DINO") for i in (1, 2, 3)]
    groups = {"MAE": names[:3], "DINO": names[3:]}
    return comparison({name: Subject(2) for name in names}, measures=ALL + TOKENS, groups=groups)


def test_forest_shows_every_difference_with_its_interval_and_verdict():
    same = np.random.default_rng(0).normal(0.5, 0.02, (64, 2, 2))
    subjects_ = {
        "A": Subject(2, 2, distance=same),
        "B": Subject(2, 2, distance=same + np.where(np.arange(64) % 2, 1, -1)[:, None, None] / 99),
        "C": Subject(2, 2, distance=same + 0.2),
    }
    result = comparison(subjects_, measures=("attention_distance",))
    figure = plots.differences(result)
    table = result.differences()
    assert set(table["verdict"]) == {"cannot be told apart", "lower"}
    (ax,) = figure.axes
    drawn = [line for line in ax.lines if line.get_marker() != "o"][: len(table)]
    points = [line for line in ax.lines if line.get_marker() == "o"]
    for i, row in enumerate(table.itertuples()):
        np.testing.assert_allclose(drawn[i].get_xdata(), [row.low, row.high])
        assert points[i].get_xdata() == row.difference
        undecided = row.verdict == "cannot be told apart"
        assert (points[i].get_markerfacecolor() == "none") == undecided
        assert (points[i].get_color() == "#6e7781") == undecided


def test_forest_of_nothing_is_refused():
    with pytest.raises(ResultError, match="two models and a measure of every image"):
        plots.differences(comparison({"A": Subject(2)}))


def test_pairs_in_other_units_have_a_panel_of_their_own():
    result = comparison(
        {"A": Subject(2), "B": Subject(2), "C": Subject(2, grid=(7, 7))},
        measures=("attention_distance",),
    )
    labels = [ax.get_xlabel() for ax in plots.differences(result).axes]
    assert labels == ["A − B (px)", "A − B (relative to uniform)"]


@pytest.mark.parametrize("measure", ["attention_distance", "token_cosine", "rankme"])
def test_seeds_are_points_beside_the_interval_over_them(measure):
    result = seeds()
    ax = plots.group_spread(result, measure)
    means = result.group_means([measure])
    bars = [line for line in ax.lines if line.get_gid() == "interval"]
    points = [line for line in ax.lines if line.get_marker() == "o"]
    for bar, seeds_, row in zip(bars, points, means.itertuples(), strict=True):
        np.testing.assert_allclose(bar.get_xdata(), [row.low, row.high])
        assert len(seeds_.get_xdata()) == 3
        assert np.mean(seeds_.get_xdata()) == pytest.approx(row.mean)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == [f"{row.group} (3)" for row in means.itertuples()]


def test_spread_of_seeds_needs_groups(alike):
    with pytest.raises(ResultError, match="no groups of seeds"):
        plots.group_spread(alike, "attention_distance")


def test_seeds_of_a_group_share_a_colour_and_an_entry_of_the_legend():
    result = seeds()
    assert len({color_of(result, name) for name in result.models[:3]}) == 1
    assert color_of(result, "MAE 1") != color_of(result, "DINO 1")
    legend = plots.attention_overlay(result, "attention_distance").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["MAE", "DINO"]
