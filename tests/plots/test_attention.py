"""Figures of attention by layer and head: what they draw."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from plots.drawn import assert_band
from plots.synthetic import ALL, Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.attention import heads, limits_of
from vitprobe.results import Comparison


@pytest.fixture(scope="module")
def families():
    """A plain model, one of channel and class attention, one in windows, and a network without."""
    subjects = {
        "ViT": Subject(depth=4),
        "XCiT": Subject(depth=3, kinds=("global", "channels", "class token"), prefix=0),
        "conv": Subject(depth=2, no_attention="it is convolutional"),
    }
    return comparison(subjects, measures=(*ALL, "rollout_distance"))


@pytest.mark.parametrize(
    ("function", "label"),
    [
        (plots.attention_distance, "Attention distance\n(px)"),
        (plots.attention_entropy, "Attention entropy\n(nats)"),
        (plots.sink_mass, "Sink mass\n(share)"),
    ],
)
def test_attention_figures_name_measure_and_unit(alike, function, label):
    ax = function(alike, "MAE")
    assert ax.get_ylabel() == label
    assert ax.get_xlabel() == "Block"


def test_axis_fits_the_values_and_uniform_attention(alike):
    values = alike.attention_entropy("MAE").values
    low, high = plots.attention_entropy(alike, "MAE").get_ylim()
    top = max(values.max(), Subject().uniform_entropy())
    assert 0 < low < values.min() < top < high
    assert high - low < 1.25 * (top - values.min())


def test_axis_of_equal_heads_is_not_filled_by_rounding_errors():
    distance = 1 + 1e-4 * np.arange(4).reshape(2, 2)
    result = comparison({"A": Subject(2, 2, distance=distance)})
    low, high = plots.attention_distance(result, "A", relative=True).get_ylim()
    assert high - low > 0.1


def test_axis_of_sink_mass_starts_at_zero_and_reaches_a_tenth_at_least():
    small, large = np.full((2, 2), 0.01), np.full((2, 2), 0.5)
    result = comparison({"A": Subject(2, 2, sink=small), "B": Subject(2, 2, sink=large)})
    assert plots.sink_mass(result, "A").get_ylim() == (0, 0.1)
    assert plots.sink_mass(result, "B").get_ylim() == pytest.approx((0, 0.53))


def test_label_of_uniform_attention_stays_inside_the_axes(alike):
    figure, ax = plt.subplots()
    plots.attention_entropy(alike, "MAE", ax=ax)
    figure.canvas.draw()
    (label,) = ax.texts
    box, frame = label.get_window_extent(), ax.get_window_extent()
    assert frame.x0 <= box.x0 < box.x1 <= frame.x1
    assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def test_every_head_is_a_point(alike):
    ax = plots.attention_distance(alike, "MAE", relative=True)
    points = next(line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_allclose(
        points.get_ydata(), alike.attention_distance("MAE", relative=True).values.ravel()
    )
    assert "relative to uniform" in ax.get_ylabel()


def test_uniform_attention_is_marked_in_either_unit(alike):
    def level(ax):
        return next(line.get_ydata()[0] for line in ax.lines if line.is_dashed())

    expected = Subject().uniform_distance()
    assert level(plots.attention_distance(alike, "MAE")) == pytest.approx(expected, rel=1e-5)
    assert level(plots.attention_distance(alike, "MAE", relative=True)) == 1


def test_many_heads_are_drawn_as_boxes_alone():
    result = comparison({"A": Subject(depth=24, heads=16)})
    ax = plots.attention_distance(result, "A")
    assert not [line for line in ax.lines if line.get_marker() == "o"]


def test_undefined_blocks_leave_a_gap():
    distance = np.full((3, 2), 0.5)
    distance[1] = np.nan
    result = comparison({"A": Subject(3, 2, distance=distance), "B": Subject(3, 2)})
    assert len(plots.attention_distance(result, "A").patches) == 2
    plots.attention_overlay(result, "attention_distance").figure.canvas.draw()
    plots.attention_panels(result, "attention_distance").canvas.draw()


def test_units_are_relative_where_uniform_attention_differs(alike, unlike):
    assert not alike.needs_relative("attention_distance", alike.models)
    assert unlike.needs_relative("attention_distance", unlike.models)
    assert unlike.needs_relative("attention_entropy", unlike.models)
    assert not unlike.needs_relative("sink_mass", unlike.models)
    assert "relative" in plots.attention_overlay(unlike, "attention_distance").get_ylabel()
    assert "px" in plots.attention_overlay(alike, "attention_distance").get_ylabel()


def test_same_grid_of_other_patches_compares_nats_but_not_pixels():
    result = comparison({"A": Subject(2, patch=16), "B": Subject(2, patch=8)})
    assert result.needs_relative("attention_distance", result.models)
    assert not result.needs_relative("attention_entropy", result.models)


def test_overlay_draws_the_mean_with_its_interval_and_the_middle_half_of_the_heads(alike):
    ax = plots.attention_overlay(alike, "attention_entropy")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MAE", "DeiT"]
    assert [line.get_color() for line in ax.lines[:2]] == ["#0072b2", "#d55e00"]
    table = alike.by_layer("attention_entropy", "MAE")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), table["value"].values)
    assert_band(ax, table)
    bars = next(c for c in ax.collections if isinstance(c, LineCollection))
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    heads_ = alike.attention_entropy("MAE")
    np.testing.assert_allclose(ends.T, heads_.quantile((0.25, 0.75), "head").values)


def test_overlay_of_a_measure_that_fuses_the_heads_has_no_bars():
    result = comparison({"A": Subject(3), "B": Subject(3)}, measures=("rollout_distance",))
    ax = plots.attention_overlay(result, "rollout_distance")
    assert not [c for c in ax.collections if isinstance(c, LineCollection)]
    assert_band(ax, result.by_layer("rollout_distance", "A"))


def test_panels_share_scales_and_show_sink_mass_beside(unlike):
    figure = plots.attention_panels(unlike, "attention_distance")
    (measure_a, sink_a), (measure_b, sink_b) = np.reshape(figure.axes, (2, 2))
    assert measure_a.get_ylim() == measure_b.get_ylim()
    assert sink_a.get_ylim() == sink_b.get_ylim()
    assert sink_a.get_ylim()[0] == 0
    assert "no prefix tokens" in [text.get_text() for text in sink_b.texts]
    assert "no prefix tokens" not in [text.get_text() for text in sink_a.texts]


def test_panels_of_sink_mass_alone():
    result = comparison({"A": Subject(2)}, measures=("sink_mass",))
    assert len(plots.attention_panels(result, "sink_mass").axes) == 1


def test_shared_scale_holds_all_models(alike):
    limits = limits_of(alike, "attention_distance", alike.models, relative=False)
    drawn = {heads(alike, "attention_distance", n, limits=limits).get_ylim() for n in alike.models}
    assert drawn == {limits}
    highest = max(float(alike.attention_distance(name).max()) for name in alike.models)
    assert limits[1] > highest


def test_every_head_has_its_interval(alike):
    ax = plots.attention_distance(alike, "MAE")
    lines = next(c for c in ax.collections if isinstance(c, LineCollection))
    ends = np.array([segment[:, 1] for segment in lines.get_segments()])
    low, high = alike.interval("attention_distance", "MAE")
    np.testing.assert_allclose(ends, np.stack([low.values.ravel(), high.values.ravel()], axis=1))


def test_models_without_attention_are_left_out_of_its_figures(families):
    for measure in ("attention_distance", "attention_entropy", "rollout_distance"):
        ax = plots.attention_overlay(families, measure)
        assert [line.get_label() for line in ax.lines if line.get_label() in families.models] == [
            "ViT",
            "XCiT",
        ]
    rows = plots.attention_panels(families, "attention_entropy").axes
    assert [ax.get_title(loc="left") for ax in rows if ax.get_title(loc="left")] == ["ViT", "XCiT"]
    with pytest.raises(ResultError, match="'conv' has no attention: it is convolutional"):
        plots.attention_entropy(families, "conv")


def test_layers_that_are_no_blocks_are_called_attention_layers(families, alike):
    assert plots.attention_overlay(families, "sink_mass").get_xlabel() == "Attention layer"
    assert plots.attention_overlay(alike, "sink_mass").get_xlabel() == "Block"
    assert plots.attention_entropy(families, "ViT").get_xlabel() == "Block"
    assert plots.attention_entropy(families, "XCiT").get_xlabel() == "Attention layer"


def test_attention_that_is_not_between_patches_is_hollow(families):
    def hollow(measure):
        ax = plots.attention_overlay(families, measure)
        lines = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        return [
            float(x)
            for line in lines
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
            if np.isfinite(y)
        ]

    assert hollow("attention_entropy") == [1, 2]
    assert hollow("attention_distance") == []


def test_uniform_attention_is_drawn_layer_by_layer_where_layers_differ():
    result = comparison({"A": Subject(depth=3, kinds=("windows", "windows", "global"))})
    dataset = result.tree["attention"].to_dataset().copy(deep=True)
    levels = np.repeat([20.0, 40.0, 80.0], 3)
    dataset["attention_distance_uniform"] = ("unit", levels)
    result = Comparison.assemble({"attention": dataset}, result.provenance)
    ax = plots.attention_distance(result, "A")
    (dashes,) = (
        c for c in ax.collections if isinstance(c, LineCollection) and len(c.get_paths()) == 3
    )
    assert [path.vertices[0, 1] for path in dashes.get_paths()] == [20, 40, 80]
    relative = plots.attention_distance(result, "A", relative=True)
    assert any(np.allclose(line.get_ydata(), 1) for line in relative.lines)
