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
from matplotlib.collections import QuadMesh
from plots.synthetic import Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.attention import heads, needs_relative
from vitprobe.plots.style import layer_ticks, shorten


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
    tops = []
    for pair in (("A", "B"), ("B", "A")):
        ax = plots.cka_heatmap(result, *pair)
        ax.figure.draw_without_rendering()
        tops.append(ax.get_position().y1)
    assert tops[0] == pytest.approx(tops[1], abs=0.01)


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
    assert not needs_relative(alike, "attention_distance")
    assert needs_relative(unlike, "attention_distance")
    assert needs_relative(unlike, "attention_entropy")
    assert not needs_relative(unlike, "sink_mass")
    assert "relative" in plots.attention_overlay(unlike, "attention_distance").get_ylabel()
    assert "px" in plots.attention_overlay(alike, "attention_distance").get_ylabel()


def test_same_grid_of_other_patches_compares_nats_but_not_pixels():
    result = comparison({"A": Subject(2, patch=16), "B": Subject(2, patch=8)})
    assert needs_relative(result, "attention_distance")
    assert not needs_relative(result, "attention_entropy")


def test_overlay_draws_the_median_head_of_every_model_in_its_colour(alike):
    ax = plots.attention_overlay(alike, "attention_entropy")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["MAE", "DeiT"]
    median = alike.attention_entropy("MAE").median("head").values
    np.testing.assert_allclose(ax.lines[0].get_ydata(), median, rtol=1e-6)
    assert [line.get_color() for line in ax.lines[:2]] == ["#0072b2", "#d55e00"]


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
    tops = {heads(alike, "attention_distance", n, shared=True).get_ylim() for n in alike.models}
    assert len(tops) == 1


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
    assert len(files) == 6
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
