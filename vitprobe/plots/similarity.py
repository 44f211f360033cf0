"""Heatmaps of CKA between the layers of two models, and of all pairs of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.patches import Rectangle

from vitprobe.plots.style import (
    COLUMN,
    GRID,
    MUTED,
    PAGE,
    canvas,
    color_of,
    figure_of,
    layer_ticks,
    legend_above,
    marker_of,
    shorten,
    style,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison


def cka_heatmap(result: Comparison, a: str, b: str, *, ax: Axes | None = None) -> Axes:
    """Draw the CKA of every layer of `a` (upwards) with every layer of `b` (rightwards).

    Cells are square, colour runs from 0 to 1 in every such figure, and an undefined cell is
    hatched. Values outside 0 to 1, which debiased CKA allows, take the colour of the nearer end,
    and the colour bar then ends in a point. Without `ax` a figure of one column width is made.
    """
    cka = result.cka(a, b)
    with canvas(ax, (COLUMN, 2.85)) as axes:
        mesh = _draw(axes, cka, most_ticks=13)
        # Heatmaps of different shapes align at the top where they stand side by side.
        axes.set_anchor("N")
        axes.set_title(_title(a, b))
        axes.set_xlabel(f"Layer of {shorten(b, 30)}")
        axes.set_ylabel(f"Layer of {shorten(a, 30)}")
        # An inset keeps the bar exactly as tall as the cells, whatever their number.
        bar = axes.inset_axes((1.04, 0, 0.045, 1))
        _colorbar(mesh, bar, [cka], _label(result), orientation="vertical")
    return axes


def cka_grid(result: Comparison) -> Figure:
    """Draw the heatmaps of all pairs of models, each model with itself on the diagonal.

    Panels share one scale from 0 to 1 and one cell size. The figure is as wide as a page; beyond
    five models it grows.
    """
    models = result.models
    count = len(models)
    if count == 1:
        return figure_of(cka_heatmap(result, models[0], models[0]))
    lengths = [result.cka(name, name).sizes["layer_a"] for name in models]
    width = max(PAGE, 1.35 * count)
    limit, most_ticks = (26, 13) if count < 4 else (14, 5)
    with style():
        figure, axes = plt.subplots(
            count,
            count,
            figsize=(width, width),
            gridspec_kw={"width_ratios": lengths, "height_ratios": lengths},
        )
        drawn = []
        for i, a in enumerate(models):
            for j, b in enumerate(models):
                ax = axes[i, j]
                if j > i:
                    ax.set_axis_off()
                    continue
                drawn.append(result.cka(a, b))
                mesh = _draw(ax, drawn[-1], most_ticks=most_ticks)
                if i == count - 1:
                    ax.set_xlabel(f"{shorten(b, limit)} layer")
                if j == 0:
                    ax.set_ylabel(f"{shorten(a, limit)} layer")
        # The empty upper triangle has room for the scale.
        bar = axes[0, -1].inset_axes((0.04, 0.86, 0.92, 0.06))
        _colorbar(mesh, bar, drawn, _label(result), orientation="horizontal")
    return figure


def first_direction_share(result: Comparison, *, ax: Axes | None = None) -> Axes:
    """Draw the share of each layer's variance along its first principal direction, by model.

    Where it is large, CKA mostly compares that one direction. Without `ax` a figure of one column
    width is made.
    """
    models = result.models
    with canvas(ax, (COLUMN, 2.3)) as axes:
        longest = 0
        for name in models:
            share = result.first_direction_share(name)
            layers = share["layer"].values
            longest = max(longest, layers[-1])
            color, marker = color_of(models, name), marker_of(models, name)
            axes.plot(layers, share.values, color=color, marker=marker, mew=0, label=name)
        axes.set_xlim(-0.6, longest + 0.6)
        axes.set_xticks(layer_ticks(np.arange(longest + 1), 13))
        axes.set_ylim(0, 1)
        axes.set_xlabel("Layer")
        axes.set_ylabel("First-direction share\n(of variance)")
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        axes.tick_params(axis="x", length=0)
        legend_above(axes, models)
    return axes


def _label(result: Comparison) -> str:
    """The debiased estimator is named, for its values may leave 0 to 1; so is the biased one."""
    biased = result.provenance["estimator"] == "biased"
    return "Biased CKA" if biased else "Debiased CKA"


def _title(a: str, b: str) -> str:
    if a == b:
        return f"{shorten(a, 34)} with itself"
    one_line = f"{a} and {b}"
    return one_line if len(one_line) <= 36 else f"{shorten(a, 34)}\nand {shorten(b, 34)}"


def _draw(ax: Axes, cka: xr.DataArray, *, most_ticks: int) -> QuadMesh:
    values = np.ma.masked_invalid(cka.values)
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
    # Edges in the colour of the face close the hairlines that viewers show between vector cells.
    mesh = ax.pcolormesh(values, vmin=0, vmax=1, edgecolors="face", linewidth=0.5)
    ax.set_aspect("equal")
    ax.set_xlim(0, columns)
    ax.set_ylim(0, rows)
    for axis, coordinate in ((ax.xaxis, "layer_b"), (ax.yaxis, "layer_a")):
        layers = cka[coordinate].values
        ticks = layer_ticks(layers, most_ticks)
        axis.set_ticks([tick - layers[0] + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return mesh


def _colorbar(
    mesh: QuadMesh,
    cax: Axes,
    drawn: list[xr.DataArray],
    label: str,
    *,
    orientation: Literal["vertical", "horizontal"],
) -> None:
    below = any(bool((cka < 0).any()) for cka in drawn)
    above = any(bool((cka > 1 + 1e-6).any()) for cka in drawn)
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    if any(bool(cka.isnull().any()) for cka in drawn):
        label += " (hatched: undefined)"
    # matplotlib makes a bitmap of a bar of 50 colours or more; fewer stay vectors, in every format.
    scale = ScalarMappable(mesh.norm, mesh.get_cmap().resampled(48))
    bar = cax.figure.colorbar(
        scale, cax=cax, orientation=orientation, extend=extend, extendfrac=0.04, label=label
    )
    cax.collections[0].set(edgecolor="face", linewidth=0.5)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
