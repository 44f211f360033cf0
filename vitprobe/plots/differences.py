"""Differences between models, with images as the unit, and between methods, with seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from vitprobe.errors import ResultError
from vitprobe.plots.style import (
    COLUMN,
    GRID,
    INK,
    MUTED,
    PAGE,
    axis_label,
    canvas,
    color_of,
    fit,
    shorten,
    style,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

UNDECIDED = "cannot be told apart"
"""Verdict of a difference that Holm's correction does not let stand."""


def differences(result: Comparison, measures: Sequence[str] | None = None) -> Figure:
    """Draw the paired differences between models as a forest, a panel a measure.

    A point is the mean over images of model A minus model B (heads and layers averaged within each
    image first), the line its 95 % interval, pointwise. Filled and dark: the difference stands
    after Holm's correction over all that `result.differences(measures)` lists; hollow and grey: the
    two cannot be told apart. The figure is as wide as a page, or as a column for one measure.

    Raises:
        ResultError: an unknown measure, or nothing to compare in pairs.
    """
    table = result.differences(measures)
    return forest(result, table)


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table as named tuples."""
    yield from table.itertuples(index=False)


def forest(result: Comparison, table: pd.DataFrame) -> Figure:
    """Draw rows of `result.differences()` as `differences` does."""
    if not len(table):
        raise ResultError(
            "nothing here can be compared in pairs: two models and a measure of every "
            "image are needed"
        )
    # Pairs of other grids are in relative units, and have no place on an axis in pixels.
    panels = list(table.groupby(["measure", "units"], sort=False))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    rows = max(len(panel) for _, panel in panels)
    width = COLUMN if columns == 1 else PAGE
    with style():
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(width, lines * (0.55 + 0.155 * max(rows, 3))),
            squeeze=False,
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for index, ((measure, _), panel) in enumerate(panels):
            ax = axes.flat[index]
            _forest(ax, result, panel)
            title = _long_name(result, str(measure), str(panel["model_a"].iloc[0]))
            ax.set_title(textwrap.fill(f"{title[0].upper()}{title[1:]}", 28))
            if index % columns:
                ax.set_yticklabels([])
    return figure


def group_spread(result: Comparison, measure: str, *, ax: Axes | None = None) -> Axes:
    """Draw a measure of every seed, and the mean of each group with its interval over seeds.

    A point is a seed: the mean over images, heads and layers. The bar is the 95 % interval of the
    group's mean, Student's t with seeds - 1 degrees of freedom, around the mean's tick; one seed
    alone has none. In relative units where the models' grids differ. Without `ax` a figure of one
    column width is made.

    Raises:
        ResultError: no groups in the result, or the measure is not one of attention or tokens.
    """
    means = result.group_means([measure])
    members = [name for names in result.groups.values() for name in names]
    relative = result.needs_relative(measure, members)
    with canvas(ax, (COLUMN, 0.62 + 0.3 * max(len(means), 2))) as axes:
        drawn = []
        for row, group in enumerate(rows_of(means)):
            names = result.groups[group.group]
            seeds = np.array([of_seed(result, measure, name, relative) for name in names])
            color = color_of(result, names[0])
            axes.plot(
                [group.low, group.high],
                [row, row],
                color=color,
                lw=5,
                alpha=0.25,
                solid_capstyle="butt",
                gid="interval",
            )
            axes.plot([group.mean], [row], "|", color=INK, ms=9, mew=1.2)
            axes.plot(seeds, np.full(len(seeds), row), "o", color=color, ms=3, mew=0, clip_on=False)
            drawn += [seeds, np.array([group.low, group.high])]
        axes.set_ylim(len(means) - 0.5, -0.5)
        labels = [f"{shorten(g.group, 20)} ({g.seeds})" for g in rows_of(means)]
        axes.set_yticks(range(len(means)), labels)
        low, high = fit(drawn, from_zero=False)
        axes.set_xlim(low, high)
        title = _long_name(result, measure, members[0])
        axes.set_xlabel(axis_label(title, means["units"].iloc[0]).replace("\n", " "))
        axes.grid(axis="x", color=GRID, linewidth=0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return axes


def of_seed(result: Comparison, measure: str, name: str, relative: bool) -> float:
    """The number of one seed that `group_spread` draws."""
    if result.is_per_image(measure):
        images = result.layer_images(measure, name, relative=relative, patches=True)
        return float(images.mean("layer").mean())
    return float(result.tokens(measure, name).mean())


def _long_name(result: Comparison, measure: str, name: str) -> str:
    kept = result.per_image if result.is_per_image(measure) else result.tokens
    return str(kept(measure, name).attrs["long_name"])


def _forest(ax: Axes, result: Comparison, panel: pd.DataFrame) -> None:
    names = []
    for row, pair in enumerate(rows_of(panel)):
        told = pair.verdict != UNDECIDED
        color = INK if told else MUTED
        ax.plot([pair.low, pair.high], [row, row], color=color, lw=1 if told else 0.7)
        face = color if told else "none"
        ax.plot(pair.difference, row, "o", color=color, markerfacecolor=face, ms=3, mew=0.7)
        twin = result.references.get(pair.model_a) == pair.model_b
        other = "untrained twin" if twin else shorten(pair.model_b, 17)
        names.append(f"{shorten(pair.model_a, 17)} − {other}")
    ax.axvline(0, color=MUTED, lw=0.7, zorder=0.5)
    ax.set_ylim(len(panel) - 0.5, -0.5)
    ax.set_yticks(range(len(panel)), names)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel(f"A − B ({panel['units'].iloc[0]})" if panel["units"].iloc[0] != "1" else "A − B")
    ax.grid(axis="x", color=GRID, linewidth=0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
