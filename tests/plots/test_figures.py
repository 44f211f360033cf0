"""Figures: what they draw, that they leave global style alone, and that their bytes repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, QuadMesh
from plots.synthetic import ALL, TOKENS, Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.attention import heads, limits_of
from vitprobe.plots.similarity import below_floor
from vitprobe.plots.style import color_of, layer_ticks, shorten, subjects
from vitprobe.results import Comparison


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def alike():
    return comparison({"MAE": Subject(depth=4), "DeiT": Subject(depth=4)})


@pytest.fixture(scope="module")
def unlike():
    """Another depth, grid and patch, and no class token."""
    return comparison(
        {"MAE": Subject(depth=4), "small": Subject(2, 2, grid=(7, 7), patch=4, prefix=0)}
    )


def mesh_of(ax) -> QuadMesh:
    return next(child for child in ax.collections if isinstance(child, QuadMesh))


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


def assert_band(ax, table):
    """The first band of an axes has the ends of the interval as its edges."""
    band = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
    corners = band.get_paths()[0].vertices
    for layer, low, high in zip(*(table[k].values for k in ("layer", "low", "high")), strict=True):
        edges = corners[corners[:, 0] == layer, 1]
        np.testing.assert_allclose([edges.min(), edges.max()], [low, high])


def test_overlay_of_a_measure_that_fuses_the_heads_has_no_bars():
    result = comparison({"A": Subject(3), "B": Subject(3)}, measures=("rollout_distance",))
    ax = plots.attention_overlay(result, "rollout_distance")
    assert not [c for c in ax.collections if isinstance(c, LineCollection)]
    assert_band(ax, result.by_layer("rollout_distance", "A"))


@pytest.mark.parametrize("measure", TOKENS)
def test_token_curves_have_the_interval_as_their_band(measure):
    result = comparison({"A": Subject(3), "B": Subject(2)}, measures=TOKENS)
    ax = plots.token_curves(result, measure)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), result.tokens(measure, "B").values)
    assert_band(ax, result.by_layer(measure, "A"))
    assert ax.get_xlabel() == "Layer"


def test_spectra_run_to_the_highest_frequency_with_their_bands():
    result = comparison({"A": Subject(3)}, measures=("fourier_amplitude",))
    ax = plots.fourier_curves(result, "A")
    spectra = result.fourier_curves("A")
    assert len(ax.lines) == 4
    for line, value in zip(ax.lines, spectra["value"].values, strict=True):
        np.testing.assert_allclose(line.get_ydata(), value)
    assert ax.get_xlim() == (0, 1)
    assert "π rad per patch" in ax.get_xlabel()
    band = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
    edges = band.get_paths()[0].vertices
    ends = edges[edges[:, 0] == 1, 1]
    expected = [spectra[key].values[0, -1] for key in ("low", "high")]
    np.testing.assert_allclose([ends.min(), ends.max()], expected)


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


def seeds() -> Comparison:
    names = [f"{method} {i}" for method in ("MAE", "DINO") for i in (1, 2, 3)]
    groups = {"MAE": names[:3], "DINO": names[3:]}
    return comparison({name: Subject(2) for name in names}, measures=ALL + TOKENS, groups=groups)


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


def test_untrained_twins_are_dashed_in_the_colour_of_their_model():
    result = comparison(
        {name: Subject(2) for name in ("A", "B", "B (untrained)")},
        measures=(*ALL, "token_cosine"),
        references={"B": "B (untrained)"},
    )
    assert subjects(result) == ("A", "B")
    for ax in (
        plots.attention_overlay(result, "attention_distance"),
        plots.token_curves(result, "token_cosine"),
    ):
        own, twin = ax.lines[1:3]
        assert (own.is_dashed(), twin.is_dashed()) == (False, True)
        assert own.get_color() == twin.get_color()
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["A", "B", "untrained twin"]
    assert len([ax for ax in plots.cka_grid(result).axes if ax.get_aspect() == 1]) == 3


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


def test_first_direction_share_of_every_model(unlike):
    ax = plots.first_direction_share(unlike)
    assert [len(line.get_ydata()) for line in ax.lines] == [5, 3]
    assert ax.get_ylim() == (0, 1)


def test_axes_given_are_used_and_returned(alike):
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.cka_heatmap(alike, "MAE", "DeiT", ax=left) is left
    assert plots.attention_distance(alike, "MAE", ax=right) is right
    assert plots.attention_overlay(alike, "sink_mass", ax=right) is right
    assert plt.get_fignums() == [figure.number]


def test_global_style_stays_as_it_was(alike):
    before = dict(mpl.rcParams)
    plots.cka_grid(alike)
    plots.attention_overlay(alike, "attention_distance")
    assert dict(mpl.rcParams) == before


def test_unknown_names_are_refused(alike):
    with pytest.raises(ResultError, match="no model 'MEA'"):
        plots.cka_heatmap(alike, "MEA", "DeiT")
    with pytest.raises(ResultError, match="was not measured"):
        plots.attention_panels(alike, "attention_distanc")


def test_saved_pdf_embeds_truetype_fonts_and_svg_keeps_text(alike, tmp_path):
    paths = plots.save(plots.cka_heatmap(alike, "MAE", "DeiT"), tmp_path / "cka")
    assert [path.name for path in paths] == ["cka.pdf", "cka.svg", "cka.png"]
    pdf = paths[0].read_bytes()
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf
    svg = paths[1].read_text()
    assert ">Layer of MAE</text>" in svg
    assert "<dc:date>" not in svg


def save_some(out: Path) -> None:
    block = np.full((3, 3), 0.5)
    block[0, 0] = np.nan
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block})
    plots.save(plots.cka_grid(result), out / "grid")
    plots.save(plots.attention_panels(result, "attention_distance"), out / "panels")
    plots.save(plots.attention_overlay(result, "attention_entropy"), out / "overlay")
    plots.save(plots.interval_width(result, "cka", "A", "B"), out / "width")
    plots.save(plots.differences(result), out / "differences")


def test_pdf_and_svg_are_byte_identical_in_another_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    save_some(here)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from plots.test_figures import save_some; save_some(Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).resolve().parents[1]), str(there)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"},
    )
    files = [path for path in here.iterdir() if path.suffix in {".pdf", ".svg"}]
    assert len(files) == 10
    for path in files:
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name


def test_figures_stay_small(tmp_path):
    result = comparison({"A": Subject(depth=24, heads=16)})
    _, svg, _ = plots.save(plots.cka_heatmap(result, "A", "A"), tmp_path / "cka")
    assert svg.stat().st_size < 200_000
    assert "<image" not in svg.read_text()


@pytest.mark.parametrize(
    ("last", "most", "expected"),
    [
        (12, 13, list(range(13))),
        (24, 13, list(range(0, 25, 2))),
        (12, 5, [0, 3, 6, 9, 12]),
        (0, 13, [0]),
        (6, 5, [0, 2, 4, 6]),
    ],
)
def test_layer_ticks_reach_the_last_layer(last, most, expected):
    assert layer_ticks(np.arange(last + 1), most) == expected


def test_shorten_keeps_both_ends():
    assert shorten("short", 10) == "short"
    cut = shorten("DINOv2 small, patch 14, with registers", 20)
    assert len(cut) <= 20
    assert cut.startswith("DINOv2")
    assert cut.endswith("sters")


@pytest.fixture(scope="module")
def families():
    """A plain model, one of channel and class attention, one in windows, and a network without."""
    subjects = {
        "ViT": Subject(depth=4),
        "XCiT": Subject(depth=3, kinds=("global", "channels", "class token"), prefix=0),
        "conv": Subject(depth=2, no_attention="it is convolutional"),
    }
    return comparison(subjects, measures=(*ALL, "rollout_distance"))


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
