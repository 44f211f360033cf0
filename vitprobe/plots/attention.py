"""Attention measures of every head, block by block, and of all models in one axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from vitprobe.errors import ResultError
from vitprobe.plots.curves import curves
from vitprobe.plots.style import (
    COLUMN,
    GRID,
    INK,
    MUTED,
    PAGE,
    attention_noun,
    axis_label,
    canvas,
    color_of,
    fit,
    has_prefix,
    layer_ticks,
    legend_above,
    look,
    measured,
    shorten,
    style,
    subjects,
    with_twins,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

# Above this the points of a panel merge into a smear, and the box tells more alone.
_MOST_POINTS = 300
# Up to so many bars of the spread of heads fit into one block's place.
_MOST_BARS = 8


def attention_distance(
    result: Comparison, name: str, *, relative: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw the attention distance of every head of a model, block by block.

    Of a model with several attention layers a block, or with blocks without any, by attention
    layer. A point is a head (mean over images; heads keep their left-to-right order in every
    block), the line through it is its 95 % interval over images, the box spans the middle half of
    the heads around their median, and whiskers reach the extremes. The dashed line is the value
    under uniform attention, layer by layer where layers differ in it. In pixels of the model's
    input, or divided by the uniform value; the axis fits the values and need not start at 0. Points
    are left out where they would merge (beyond 300). Without `ax` a figure of one column width is
    made.

    Raises:
        ResultError: no such model, or the measure is not in the result.
    """
    return heads(result, "attention_distance", name, relative=relative, ax=ax)


def attention_entropy(
    result: Comparison, name: str, *, relative: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw the attention entropy of every head, in nats or relative; as `attention_distance`."""
    return heads(result, "attention_entropy", name, relative=relative, ax=ax)


def sink_mass(result: Comparison, name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the share of attention that patches send to prefix tokens, for every head.

    Drawn as `attention_distance`, from 0 to the largest value and at least to 0.1.
    """
    return heads(result, "sink_mass", name, ax=ax)


def heads(
    result: Comparison,
    measure: str,
    name: str,
    *,
    relative: bool = False,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw any attention measure of a result as `attention_distance` does.

    `limits` are the ends of the axis, such as `limits_of` gives for several models.
    """
    values = result.attention(measure, name, relative=relative)
    with canvas(ax, (COLUMN, 2.1)) as axes:
        _boxes(axes, result, name, values, result.interval(measure, name, relative=relative))
        axes.set_title(shorten(name, 44))
        _dress(
            axes,
            result,
            name,
            values,
            limits or limits_of(result, measure, (name,), relative=relative),
        )
        _remark(axes, result, measure, name, relative)
    return axes


def attention_panels(
    result: Comparison, measure: str, *, models: Sequence[str] | None = None
) -> Figure:
    """Draw one row a model: the measure beside the sink mass that renormalising hides.

    All models share both scales; where their grids differ the measure is in relative units. Models
    that have no value of the measure have no row.

    models: which to draw; all but untrained twins unless given.
    """
    models = measured(result, measure, subjects(result) if models is None else tuple(models))
    relative = result.needs_relative(measure, models)
    columns = [measure]
    if measure != "sink_mass" and "sink_mass" in result.measures:
        columns.append("sink_mass")
    limits = {
        shown: limits_of(result, shown, models, relative=relative and shown == measure)
        for shown in columns
    }
    with style():
        figure, axes = plt.subplots(
            len(models),
            len(columns),
            figsize=(PAGE if len(columns) > 1 else COLUMN, 1.35 * len(models) + 0.35),
            sharey="col",
            squeeze=False,
            gridspec_kw={"width_ratios": [3, 2][: len(columns)]},
        )
        for i, (row, name) in enumerate(zip(axes, models, strict=True)):
            for ax, shown in zip(row, columns, strict=True):
                if name not in measured(result, shown, models):
                    ax.set_axis_off()
                    continue
                scaled = relative and shown == measure
                values = result.attention(shown, name, relative=scaled)
                ends = result.interval(shown, name, relative=scaled)
                _boxes(ax, result, name, values, ends)
                _dress(ax, result, name, values, limits[shown])
                _remark(ax, result, shown, name, scaled)
                if i < len(models) - 1:
                    ax.set_xlabel("")
            row[0].set_title(shorten(name, 60))
    return figure


def attention_overlay(result: Comparison, measure: str, *, ax: Axes | None = None) -> Axes:
    """Draw a measure of all models in one axes, block by block.

    The line is the mean over heads and images, and the band around it the 95 % interval of that
    mean over images, block by block (pointwise). Beside it a thin bar spans the middle half of the
    heads, which is no uncertainty; there is none for a measure that fuses the heads, and none where
    bars would merge. In relative units where the models' grids differ, for pixels and nats of
    different grids cannot be compared. A hollow point is of a layer whose attention is not between
    patches (over channels, or of the class token alone). Untrained twins are dashed and thin, and
    models that have no value of the measure are left out. Without `ax` a figure of one column width
    is made.

    Raises:
        ResultError: the measure is not in the result.
    """
    names = measured(result, measure, with_twins(result, subjects(result)))
    relative = result.needs_relative(measure, names)
    tables = {name: result.by_layer(measure, name, relative=relative) for name in names}
    level = _shared([uniform(result, measure, name, relative=relative) for name in names])
    with canvas(ax, (COLUMN, 2.3)) as axes:
        drawn = curves(axes, result, tables)
        drawn += _spreads(axes, result, measure, relative)
        for name, table in tables.items():
            _hollow(axes, result, name, table)
        about = tables[names[0]].attrs
        longest = max((table["layer"].values for table in tables.values()), key=len)
        axes.set_xlim(longest[0] - 0.6, longest[-1] + 0.6)
        axes.set_xticks(layer_ticks(longest, 13))
        axes.set_ylim(fit([*drawn, level], from_zero=about["units"] == "share"))
        axes.set_xlabel(attention_noun(result, names).capitalize())
        axes.set_ylabel(axis_label(about["long_name"], about["units"]))
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        axes.tick_params(axis="x", length=0)
        # Where uniform attention differs between models, units are relative and its value is 1.
        _uniform_line(axes, level)
        legend_above(axes, result, names)
    return axes


def uniform(result: Comparison, measure: str, name: str, *, relative: bool = False) -> np.ndarray:
    """The value of a measure under uniform attention by layer; nan where that has no meaning."""
    try:
        levels = result.uniform(measure, name).values
    except ResultError:
        return np.full(1, np.nan)
    return np.where(np.isnan(levels), np.nan, 1.0) if relative else levels


def _different(levels: Sequence[np.ndarray]) -> list[float]:
    """The different finite values of some arrays."""
    values = np.concatenate([*levels])
    return list({f"{value:.6g}": float(value) for value in values if np.isfinite(value)}.values())


def _shared(levels: Sequence[np.ndarray]) -> np.ndarray:
    """One value where models have the same in all layers, theirs by layer where that is the same,
    else nothing."""
    values = _different(levels)
    if len(values) == 1:
        return np.array(values)
    same = all(np.array_equal(level, levels[0], equal_nan=True) for level in levels)
    return levels[0] if same else levels[0][:0]


def _spreads(ax: Axes, result: Comparison, measure: str, relative: bool) -> list[np.ndarray]:
    """Bars of the middle half of the heads, side by side; returns their ends."""
    names = measured(result, measure, subjects(result))
    if len(names) > _MOST_BARS:
        return []
    offsets = (np.arange(len(names)) + 0.5 - len(names) / 2) * 0.7 / len(names)
    drawn = []
    for name, offset in zip(names, offsets, strict=True):
        values = result.attention(measure, name, relative=relative).dropna("layer", how="all")
        if values.sizes["head"] < 2 or not values.size:
            continue
        low, high = values.quantile((0.25, 0.75), "head").values
        color = color_of(result, name)
        ax.vlines(values["layer"].values + offset, low, high, color=color, lw=0.7, alpha=0.55)
        drawn += [low, high]
    return drawn


def limits_of(
    result: Comparison, measure: str, models: Sequence[str], *, relative: bool
) -> tuple[float, float]:
    """The ends of an axis that holds every head of these models, and uniform attention."""
    models = measured(result, measure, models)
    drawn = [result.attention(measure, name, relative=relative) for name in models]
    levels = [uniform(result, measure, name, relative=relative) for name in models]
    from_zero = bool(drawn) and drawn[0].attrs["units"] == "share"
    return fit([*(array.values for array in drawn), *levels], from_zero=from_zero)


def _hollow(ax: Axes, result: Comparison, name: str, table: xr.Dataset) -> None:
    """Hollow out the points of layers whose attention is not between patches."""
    kinds = [layer["kind"] for layer in result.attention_layers(name)]
    chosen = np.isin(kinds, ("channels", "class token"))
    style = look(result, name)
    if not chosen.any() or "marker" not in style:
        return
    points = table.isel(layer=np.flatnonzero(chosen))
    ax.plot(
        points["layer"].values,
        points["value"].values,
        style["marker"],
        color=style["color"],
        markerfacecolor="white",
        markeredgewidth=0.8,
        zorder=3,
    )


def _boxes(
    ax: Axes,
    result: Comparison,
    name: str,
    values: xr.DataArray,
    ends: tuple[xr.DataArray, xr.DataArray],
) -> None:
    layers, color = values["layer"].values, color_of(result, name)
    finite = [row[np.isfinite(row)] for row in values.values]
    defined = [layer for layer, row in zip(layers, finite, strict=True) if row.size]
    ax.boxplot(
        [row for row in finite if row.size],
        positions=defined,
        widths=0.74,
        whis=(0, 100),
        showcaps=False,
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": color, "alpha": 0.2, "linewidth": 0},
        whiskerprops={"color": color, "linewidth": 0.6, "alpha": 0.6},
        medianprops={"color": INK, "linewidth": 1.1, "solid_capstyle": "butt"},
    )
    if sum(row.size for row in finite) > _MOST_POINTS:
        return
    x = head_places(result, name, values).ravel()
    low, high = (end.values.ravel() for end in ends)
    told = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[told], low[told], high[told], color=color, lw=0.6, zorder=2.9)
    ax.plot(
        x,
        values.values.ravel(),
        "o",
        color=color,
        ms=1.7,
        mew=0,
        zorder=3,
        clip_on=False,
    )


def head_places(result: Comparison, name: str, values: xr.DataArray) -> np.ndarray:
    """Where the points of heads (layer, head) lie along the axis of layers, nan for none."""
    x = np.full(values.shape, np.nan)
    for row, layer in enumerate(result.attention_layers(name)):
        # Layers may differ in heads.
        count = min(layer["heads"], values.sizes["head"])
        offsets = np.linspace(-0.28, 0.28, count) if count > 1 else 0
        x[row, :count] = values["layer"].values[row] + offsets
    return x


def _dress(
    ax: Axes, result: Comparison, name: str, values: xr.DataArray, limits: tuple[float, float]
) -> None:
    layers = values["layer"].values
    ax.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    ax.set_xticks(layer_ticks(layers, 13))
    ax.set_ylim(limits)
    ax.set_xlabel(attention_noun(result, (name,)).capitalize())
    ax.set_ylabel(axis_label(values.attrs["long_name"], values.attrs["units"]))
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.tick_params(axis="x", length=0)


def _remark(ax: Axes, result: Comparison, measure: str, name: str, relative: bool) -> None:
    """Add what the reader needs to judge the heights: uniform attention, or why all are zero."""
    if measure == "sink_mass" and not has_prefix(result, name):
        ax.text(0.5, 0.5, "no prefix tokens", transform=ax.transAxes, ha="center", color=MUTED)
    _uniform_line(ax, uniform(result, measure, name, relative=relative))


def _uniform_line(ax: Axes, levels: np.ndarray) -> None:
    """A line at uniform attention, or one a layer where it differs between layers."""
    finite = np.flatnonzero(np.isfinite(levels))
    if not len(finite):
        return
    line: dict[str, Any] = {"color": MUTED, "lw": 0.8, "ls": (0, (3, 2)), "zorder": 1.5}
    first = levels[finite[0]]
    if len(_different([levels])) == 1:
        ax.axhline(first, **line)
        at: tuple[float, Any] = (0, ax.get_yaxis_transform())
    else:
        ax.hlines(levels[finite], finite - 0.42, finite + 0.42, **line)
        at = (finite[0] - 0.42, ax.transData)
    ax.annotate(
        "uniform",
        # Early blocks are the local ones: at the left the label meets fewest heads.
        (at[0], first),
        xycoords=at[1],
        xytext=(2, 1),
        textcoords="offset points",
        ha="left",
        va="bottom",
        color=MUTED,
        fontsize="small",
    )
