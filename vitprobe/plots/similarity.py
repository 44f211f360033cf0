"""Heatmaps of similarity between the layers of two models, and of all pairs of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle

from vitprobe.plots.style import (
    COLUMN,
    GRID,
    INK,
    MUTED,
    PAGE,
    canvas,
    figure_of,
    layer_ticks,
    shorten,
    style,
    subjects,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

# Another quantity than similarity has other colours, and is dark where caution is due.
_WIDTHS = "YlOrBr"
# matplotlib makes a bitmap of a bar of 50 colours or more; fewer stay vectors, in every format.
_COLORS = 48


def cka_heatmap(result: Comparison, a: str, b: str, *, ax: Axes | None = None) -> Axes:
    """Draw the CKA of every layer of `a` with every layer of `b`, as `similarity_heatmap`."""
    return similarity_heatmap(result, "cka", a, b, ax=ax)


def similarity_heatmap(
    result: Comparison, measure: str, a: str, b: str, *, ax: Axes | None = None
) -> Axes:
    """Draw the similarity of every layer of `a` (upwards) with every layer of `b` (rightwards).

    Cells are square, colour runs from 0 to 1 in every such figure, and an undefined cell is
    hatched. Values outside 0 to 1, which debiased CKA allows, take the colour of the nearer end,
    and the colour bar then ends in a point. A dot marks a cell that does not exceed its floor, and
    the bracket at the colour bar spans the floors of all cells. Of a measure that is not symmetric,
    layers of `a` are predicted from layers of `b`. Without `ax` a figure of one column width is
    made.

    Raises:
        ResultError: no such model, or the measure is not in the result.
    """
    values, floor = result.similarity(measure, a, b), result.floor(measure, a, b)
    with canvas(ax, _size(values)) as axes:
        mesh = _draw(axes, values, most_ticks=13)
        _dots(axes, values, floor)
        _name_axes(axes, result, measure, a, b)
        bar = _place_bar(axes, values)
        _colorbar(mesh, bar, [values], _label(result, values), orientation="vertical")
        _bracket(bar, [floor], orientation="vertical")
    return axes


def interval_width(
    result: Comparison, measure: str, a: str, b: str, *, ax: Axes | None = None
) -> Axes:
    """Draw the width of every cell's 95 % interval, laid out as `similarity_heatmap`.

    Colour runs from 0 to the widest interval of this pair; a cell without an interval is hatched.

    Raises:
        ResultError: no such model, or the measure is not in the result.
    """
    low, high = result.interval(measure, a, b)
    width = high - low
    with canvas(ax, _size(width)) as axes:
        most = float(width.max()) if width.notnull().any() else 1.0
        mesh = _draw(axes, width, most_ticks=13, cmap=_WIDTHS, most=most or 1.0)
        _name_axes(axes, result, measure, a, b)
        bar = _place_bar(axes, width)
        _colorbar(mesh, bar, [width], "Width of the 95 % interval", orientation="vertical")
    return axes


def cka_grid(result: Comparison) -> Figure:
    """Draw the CKA heatmaps of all pairs of models, as `similarity_grid`."""
    return similarity_grid(result, "cka")


def similarity_grid(
    result: Comparison, measure: str, *, models: Sequence[str] | None = None
) -> Figure:
    """Draw the heatmaps of all pairs of models, each model with itself on the diagonal.

    Panels share one scale from 0 to 1 and one cell size. The figure is as wide as a page; beyond
    five models it grows. A symmetric measure fills the lower triangle, another the whole square.

    models: which to draw; all but untrained twins unless given.

    Raises:
        ResultError: no such model, or the measure is not in the result.
    """
    models = subjects(result) if models is None else tuple(models)
    count = len(models)
    if count == 1:
        return figure_of(similarity_heatmap(result, measure, models[0], models[0]))
    lengths = [result.similarity(measure, name, name).sizes["layer_a"] for name in models]
    symmetric = is_symmetric(result, measure)
    width = max(PAGE, 1.35 * count)
    limit, most_ticks = (26, 13) if count < 4 else (14, 5)
    with style():
        figure, axes = plt.subplots(
            count,
            count,
            figsize=(width, width),
            gridspec_kw={"width_ratios": lengths, "height_ratios": lengths},
        )
        drawn, floors = [], []
        for i, a in enumerate(models):
            for j, b in enumerate(models):
                ax = axes[i, j]
                if j > i and symmetric:
                    ax.set_axis_off()
                    continue
                drawn.append(result.similarity(measure, a, b))
                floors.append(result.floor(measure, a, b))
                mesh = _draw(ax, drawn[-1], most_ticks=most_ticks)
                _dots(ax, drawn[-1], floors[-1])
                if i == count - 1:
                    ax.set_xlabel(f"{shorten(b, limit)} layer")
                if j == 0:
                    ax.set_ylabel(f"{shorten(a, limit)} layer")
        if symmetric:
            # The empty upper triangle has room for the scale.
            bar = axes[0, -1].inset_axes((0.04, 0.8, 0.92, 0.06))
        else:
            bar = axes[0, 0].inset_axes((0, 1.5, 1, 0.06))
        _colorbar(mesh, bar, drawn, _label(result, drawn[0]), orientation="horizontal")
        _bracket(bar, floors, orientation="horizontal")
    return figure


def below_floor(values: xr.DataArray, floor: xr.DataArray) -> np.ndarray:
    """Which defined cells do not exceed their floor."""
    with np.errstate(invalid="ignore"):
        return np.asarray(values.values <= floor.values)


def is_symmetric(result: Comparison, measure: str) -> bool:
    """Whether a measure of layers x and y is that of y and x."""
    name = result.models[0]
    return bool(result.similarity(measure, name, name).attrs.get("symmetric", 1))


def _label(result: Comparison, values: xr.DataArray) -> str:
    """The debiased estimator is named, for its values may leave 0 to 1; so is the biased one."""
    if values.name == "cka":
        biased = result.provenance["estimator"] == "biased"
        return "Biased CKA" if biased else "Debiased CKA"
    title = str(values.attrs["long_name"])
    return f"{title[0].upper()}{title[1:]}"


def _name_axes(ax: Axes, result: Comparison, measure: str, a: str, b: str) -> None:
    # Heatmaps of different shapes align at the top where they stand side by side.
    ax.set_anchor("N")
    ax.set_title(_title(a, b))
    of, by = ("", "") if is_symmetric(result, measure) else (", predicted", ", predicting")
    ax.set_xlabel(f"Layer of {shorten(b, 30 - len(by))}{by}")
    ax.set_ylabel(f"Layer of {shorten(a, 30 - len(of))}{of}")


def _title(a: str, b: str) -> str:
    if a == b:
        return f"{shorten(a, 34)} with itself"
    one_line = f"{a} and {b}"
    return one_line if len(one_line) <= 36 else f"{shorten(a, 34)}\nand {shorten(b, 34)}"


def _size(cells: xr.DataArray) -> tuple[float, float]:
    """Of a figure of square cells, in inches: one of few rows is low, and leaves no gap below."""
    rows, columns = cells.shape
    # Of 2.7 inches, the cells of two models of equal depth take 2, and titles and labels the rest.
    return COLUMN, 2.7 - 2 * (1 - max(min(rows / columns, 1), 0.3))


def _place_bar(ax: Axes, cells: xr.DataArray) -> Axes:
    """An inset at the right, exactly as tall as the cells and equally wide whatever their shape."""
    rows, columns = cells.shape
    scale = max(rows, columns) / columns
    # Between cells and bar is room for the word at its bracket, 14 pt tall when turned.
    gap = max(0.09, 14 / _points(ax))
    return ax.inset_axes((1 + gap * scale, 0, 0.045 * scale, 1))


def _points(ax: Axes) -> float:
    """Width of axes in points, before the layout is final."""
    return ax.get_window_extent().width / ax.figure.dpi * 72


def _draw(
    ax: Axes,
    cells: xr.DataArray,
    *,
    most_ticks: int,
    cmap: str | None = None,
    most: float = 1.0,
) -> QuadMesh:
    values = np.ma.masked_invalid(cells.values)
    rows, columns = values.shape
    if values.mask.any():
        # Seen only through the undefined cells, which the mesh leaves empty.
        ax.add_patch(
            Rectangle(
                (0, 0),
                columns,
                rows,
                facecolor=GRID,
                edgecolor=MUTED,
                hatch="//////",
                lw=0,
            )
        )
    # Edges in the colour of the face close the hairlines that viewers show between vector cells. As
    # many colours as the colour bar has keep pages of many deep models small.
    mesh = ax.pcolormesh(
        values,
        cmap=plt.get_cmap(cmap, _COLORS),
        vmin=0,
        vmax=most,
        edgecolors="face",
        linewidth=0.5,
    )
    ax.set_aspect("equal")
    ax.set_xlim(0, columns)
    ax.set_ylim(0, rows)
    for axis, coordinate in ((ax.xaxis, "layer_b"), (ax.yaxis, "layer_a")):
        layers = cells[coordinate].values
        # A number takes some 11 pt, and a short side has room for fewer.
        fitting = min(most_ticks, _points(ax) / 11)
        room = max(2, round(fitting * len(layers) / max(rows, columns)))
        ticks = layer_ticks(layers, room)
        axis.set_ticks([tick - layers[0] + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return mesh


def _dots(ax: Axes, values: xr.DataArray, floor: xr.DataArray) -> None:
    """A dot in every cell that does not exceed its floor, light on dark cells and dark on light."""
    below = below_floor(values, floor)
    light = values.values > 0.6
    for where, color in ((below & ~light, "white"), (below & light, "#111111")):
        rows, columns = np.nonzero(where)
        if len(rows):
            ax.plot(columns + 0.5, rows + 0.5, "o", color=color, ms=1.4, mew=0, gid="floor")


def _bracket(bar: Axes, floors: list[xr.DataArray], *, orientation: str) -> None:
    """Mark at a colour bar where the floors of its cells lie, from the lowest to the highest."""
    values = np.concatenate([floor.values.ravel() for floor in floors])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = (float(np.clip(end, 0, 1)) for end in (values.min(), values.max()))
    upright = orientation == "vertical"
    # Beside the bar: its own coordinates along it, shares of its thickness across.
    transform = bar.get_yaxis_transform() if upright else bar.get_xaxis_transform()
    along, across = [low, low, high, high], [-0.12, -0.45, -0.45, -0.12]
    if not upright:
        across = [1 - place for place in across]
    x, y = (across, along) if upright else (along, across)
    bar.plot(x, y, color=INK, lw=0.7, transform=transform, clip_on=False, gid="floors")
    upper = high > 0.8
    bar.text(
        -0.75 if upright else (high if upper else low),
        (high if upper else low) if upright else 1.75,
        "floor",
        transform=transform,
        rotation=90 if upright else 0,
        ha="right" if upright or upper else "left",
        va=("top" if upper else "bottom") if upright else "bottom",
        color=INK,
        fontsize=6,
    )


def _colorbar(
    mesh: QuadMesh,
    cax: Axes,
    drawn: list[xr.DataArray],
    label: str,
    *,
    orientation: Literal["vertical", "horizontal"],
) -> None:
    most = mesh.get_clim()[1] or 1.0
    below = any(bool((cells < 0).any()) for cells in drawn)
    above = any(bool((cells > most + 1e-6).any()) for cells in drawn)
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    if any(bool(cells.isnull().any()) for cells in drawn):
        label += " (hatched: none)" if most != 1 else " (hatched: undefined)"
    scale = ScalarMappable(mesh.norm, mesh.get_cmap())
    bar = cax.figure.colorbar(
        scale, cax=cax, orientation=orientation, extend=extend, extendfrac=0.04, label=label
    )
    cax.collections[0].set(edgecolor="face", linewidth=0.5)
    ticks = [0, most / 2, most]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
