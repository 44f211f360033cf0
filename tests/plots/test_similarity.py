"""Heatmaps and their grids: what they draw."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from plots.drawn import mesh_of
from plots.synthetic import Subject, comparison

from vitprobe import plots
from vitprobe.plots.similarity import below_floor


def test_heatmap_shows_the_values_with_layer_zero_at_the_lower_left(unlike):
    ax = plots.cka_heatmap(unlike, "MAE", "small")
    mesh = mesh_of(ax)
    np.testing.assert_allclose(mesh.get_array(), unlike.cka("MAE", "small").values)
    assert mesh.get_clim() == (0, 1)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 3), (0, 5))
    assert ax.get_aspect() == 1
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1", "2", "3", "4"]
    assert ax.get_title(loc="left") == "MAE and small"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Layer of small", "Layer of MAE")


def test_undefined_cells_are_left_empty_over_hatching_and_said():
    block = np.full((3, 3), 0.5)
    block[1, 2] = np.nan
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block})
    ax = plots.cka_heatmap(result, "A", "B")
    assert mesh_of(ax).get_array().mask.sum() == 1
    assert [patch.get_hatch() for patch in ax.patches] == ["//////"]
    assert "undefined" in ax.child_axes[0].get_ylabel()


def test_negative_cka_makes_the_colour_bar_pointed_and_does_not_move_the_scale():
    block = np.full((2, 2), -0.1)
    result = comparison({"A": Subject(1), "B": Subject(1)}, cka={("A", "B"): block})
    mesh = mesh_of(plots.cka_heatmap(result, "A", "B"))
    assert mesh.get_clim() == (0, 1)
    (bar,) = mesh.axes.child_axes
    assert len(bar.patches) == 1  # the point below 0


def test_grid_has_one_panel_for_every_pair_and_model(unlike):
    figure = plots.cka_grid(unlike)
    panels = [ax for ax in figure.axes if any(isinstance(c, QuadMesh) for c in ax.collections)]
    assert len([ax for ax in panels if ax.get_aspect() == 1]) == 3
    assert figure.get_size_inches()[0] == pytest.approx(6.75)


def test_grid_of_one_model_is_its_heatmap():
    figure = plots.cka_grid(comparison({"A": Subject(2)}))
    assert figure.axes[0].get_title(loc="left") == "A with itself"


def test_heatmaps_of_other_shapes_align_at_the_top():
    result = comparison({"A": Subject(12), "B": Subject(3)})
    tops, gaps = [], []
    for pair in (("A", "B"), ("B", "A")):
        ax = plots.cka_heatmap(result, *pair)
        ax.figure.draw_without_rendering()
        height = ax.figure.get_figheight()
        tops.append((1 - ax.get_position().y1) * height)
        gaps.append(ax.xaxis.label.get_window_extent().y0 / ax.figure.dpi)
    assert tops[0] == pytest.approx(tops[1], abs=0.02)
    # Few rows take a low figure, and not a high one with nothing below.
    assert max(gaps) < 0.2


def test_dotted_cells_are_exactly_those_that_do_not_exceed_their_floor():
    block = np.array([[0.5, 0.1, 0.9], [np.nan, 0.2, 0.7]])
    floor = np.full((5, 5), 0.2)
    floor[1, 4] = 0.75  # the last cell of the block has a floor of its own
    result = comparison({"A": Subject(1), "B": Subject(2)}, cka={("A", "B"): block}, floor=floor)
    ax = plots.cka_heatmap(result, "A", "B")
    dots = {
        (round(y - 0.5), round(x - 0.5)): line.get_color()
        for line in ax.lines
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert dots == {(0, 1): "white", (1, 1): "white", (1, 2): "#111111"}
    assert set(
        zip(
            *np.nonzero(below_floor(result.cka("A", "B"), result.floor("cka", "A", "B"))),
            strict=True,
        )
    ) == set(dots)
    (bar,) = ax.child_axes
    (bracket,) = (line for line in bar.lines if line.get_gid() == "floors")
    assert (min(bracket.get_ydata()), max(bracket.get_ydata())) == (0.2, 0.75)


def test_without_a_floor_there_are_no_dots_and_no_bracket():
    result = comparison({"A": Subject(2)}, floor=np.nan)
    ax = plots.cka_heatmap(result, "A", "A")
    assert not ax.lines
    assert not [text for text in ax.child_axes[0].texts if text.get_text() == "floor"]


def test_widths_of_intervals_are_drawn_on_a_scale_of_their_own():
    result = comparison({"A": Subject(2), "B": Subject(2)}, error=0.01)
    ax = plots.interval_width(result, "cka", "A", "B")
    low, high = result.interval("cka", "A", "B")
    np.testing.assert_allclose(mesh_of(ax).get_array(), (high - low).values)
    assert mesh_of(ax).get_clim() == (0, float((high - low).max()))
    own = plots.interval_width(result, "cka", "A", "A")
    assert mesh_of(own).get_array().mask.sum() == 3  # a layer with itself has none
    assert mesh_of(ax).get_cmap() != mesh_of(plots.cka_heatmap(result, "A", "B")).get_cmap()


def test_grid_of_a_measure_that_is_not_symmetric_has_all_ordered_pairs():
    result = comparison({"A": Subject(2), "B": Subject(1)}, measures=("linear_regression", "svcca"))
    for measure, count in (("linear_regression", 4), ("svcca", 3)):
        axes = plots.similarity_grid(result, measure).axes
        assert sum(ax.get_aspect() == 1 for ax in axes) == count
    ax = plots.similarity_heatmap(result, "linear_regression", "A", "B")
    assert ax.get_ylabel() == "Layer of A, predicted"
    assert ax.get_xlabel() == "Layer of B, predicting"
