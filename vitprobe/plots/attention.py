"""Attention distance, attention entropy and sink mass of every head, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from vitprobe.plots.style import (
    COLUMN,
    GRID,
    INK,
    MUTED,
    PAGE,
    canvas,
    color_of,
    layer_ticks,
    legend_above,
    marker_of,
    shorten,
    style,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

# The least height of an axis, as a share of its upper end: rounding errors shall not fill it.
_LEAST_SPAN = 0.1
# Above this the points of a panel merge into a smear, and the box tells more alone.
_MOST_POINTS = 300


def attention_distance(
    result: Comparison, name: str, *, relative: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw the attention distance of every head of a model, block by block.

    A point is a head (mean over images; heads keep their left-to-right order in every block), the
    box spans the middle half of the heads around their median, whiskers reach the extremes. The
    dashed line is the value under uniform attention. In pixels of the model's input, or divided by
    the uniform value; the axis fits the values and need not start at 0. Points are left out where
    they would merge (beyond 300). Without `ax` a figure of one column width is made.

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
    shared: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw any attention measure of a result as `attention_distance` does.

    `shared` draws on the scale that holds all models of the result.
    """
    values = result.attention(measure, name, relative=relative)
    with canvas(ax, (COLUMN, 2.1)) as axes:
        _boxes(axes, values, color_of(result.models, name))
        axes.set_title(shorten(name, 44))
        scaled_to = result.models if shared else (name,)
        _dress(axes, values, _limits(result, measure, relative, scaled_to))
        _remark(axes, result, measure, name, relative)
    return axes


def attention_panels(result: Comparison, measure: str) -> Figure:
    """Draw one row a model: the measure beside the sink mass that renormalising hides.

    All models share both scales; where their grids differ the measure is in relative units.
    """
    models = result.models
    relative = needs_relative(result, measure)
    columns = [measure]
    if measure != "sink_mass" and "sink_mass" in result.measures:
        columns.append("sink_mass")
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
                scaled = relative and shown == measure
                values = result.attention(shown, name, relative=scaled)
                _boxes(ax, values, color_of(models, name))
                _dress(ax, values, _limits(result, shown, scaled, models))
                _remark(ax, result, shown, name, scaled)
                if i < len(models) - 1:
                    ax.set_xlabel("")
            row[0].set_title(shorten(name, 60))
    return figure


def attention_overlay(result: Comparison, measure: str, *, ax: Axes | None = None) -> Axes:
    """Draw a measure of all models in one axes: the median head, and the middle half as a band.

    In relative units where the models' grids differ, for pixels and nats of different grids cannot
    be compared. Models are told apart by colour and by marker.
    """
    models = result.models
    relative = needs_relative(result, measure)
    arrays = {name: result.attention(measure, name, relative=relative) for name in models}
    table = pd.concat(
        [
            array.to_series().dropna().rename("value").reset_index().assign(model=name)
            for name, array in arrays.items()
        ],
        ignore_index=True,
    )
    with canvas(ax, (COLUMN, 2.3)) as axes:
        sns.lineplot(
            table,
            x="layer",
            y="value",
            hue="model",
            style="model",
            hue_order=models,
            style_order=models,
            palette={name: color_of(models, name) for name in models},
            markers={name: marker_of(models, name) for name in models},
            dashes=False,
            estimator="median",
            errorbar=("pi", 50),
            err_kws={"alpha": 0.15, "linewidth": 0},
            markeredgewidth=0,
            ax=axes,
        )
        longest = max(arrays.values(), key=lambda array: array.sizes["layer"])
        bands = [
            array.dropna("layer", how="all").quantile((0.25, 0.75), "head").values
            for array in arrays.values()
        ]
        levels = [_uniform(result, measure, name, relative) for name in models]
        _dress(axes, longest, _fit([*bands, np.array(levels)], from_zero=measure == "sink_mass"))
        # Where uniform attention differs between models, units are relative and its value is 1.
        _uniform_line(axes, _uniform(result, measure, models[0], relative))
        legend_above(axes, models)
    return axes


def needs_relative(result: Comparison, measure: str) -> bool:
    """Whether the models can share an axis only in relative units.

    So it is where uniform attention gives different values: other grids or patch sizes.
    """
    levels = [_uniform(result, measure, name, relative=False) for name in result.models]
    finite = [level for level in levels if np.isfinite(level)]
    return bool(finite) and not np.allclose(finite, finite[0], rtol=1e-5)


def _uniform(result: Comparison, measure: str, name: str, relative: bool) -> float:
    """The value of a measure under uniform attention; nan where that has no meaning."""
    if measure == "sink_mass":
        return float("nan")
    if relative:
        return 1.0
    ratio = result.attention(measure, name) / result.attention(measure, name, relative=True)
    return float(ratio.median())


def _limits(
    result: Comparison, measure: str, relative: bool, models: tuple[str, ...]
) -> tuple[float, float]:
    """The ends of an axis that holds every head of these models, and uniform attention."""
    drawn = [result.attention(measure, name, relative=relative).values for name in models]
    levels = [_uniform(result, measure, name, relative) for name in models]
    return _fit([*drawn, np.array(levels)], from_zero=measure == "sink_mass")


def _fit(drawn: list[np.ndarray], *, from_zero: bool) -> tuple[float, float]:
    """The ends of an axis that holds all finite values, with a little room."""
    values = np.concatenate([array.ravel() for array in drawn])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if from_zero:
        return 0.0, min(1.0, max(0.1, 1.06 * high))
    span = max(high - low, _LEAST_SPAN * abs(high)) or 1.0
    # The label of uniform attention, often the largest value, stands above its line.
    return max(0.0, high - 1.06 * span), high + 0.14 * span


def _boxes(ax: Axes, values: xr.DataArray, color: str) -> None:
    layers = values["layer"].values
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
    if sum(row.size for row in finite) <= _MOST_POINTS:
        count = values.sizes["head"]
        offsets = np.linspace(-0.28, 0.28, count) if count > 1 else np.zeros(1)
        x = layers[:, None] + offsets
        ax.plot(
            x.ravel(),
            values.values.ravel(),
            "o",
            color=color,
            ms=1.7,
            mew=0,
            zorder=3,
            clip_on=False,
        )


def _dress(ax: Axes, values: xr.DataArray, limits: tuple[float, float]) -> None:
    layers = values["layer"].values
    ax.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    ax.set_xticks(layer_ticks(layers, 13))
    ax.set_ylim(limits)
    ax.set_xlabel("Block")
    title, units = str(values.attrs["long_name"]), values.attrs["units"]
    ax.set_ylabel(f"{title[0].upper()}{title[1:]}\n({units})")
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.tick_params(axis="x", length=0)


def _remark(ax: Axes, result: Comparison, measure: str, name: str, relative: bool) -> None:
    """Add what the reader needs to judge the heights: uniform attention, or why all are zero."""
    prefix = result.describe(name)["facts"]["prefix_tokens"]["value"]
    if measure == "sink_mass" and prefix == 0:
        ax.text(0.5, 0.5, "no prefix tokens", transform=ax.transAxes, ha="center", color=MUTED)
    _uniform_line(ax, _uniform(result, measure, name, relative))


def _uniform_line(ax: Axes, level: float) -> None:
    if not np.isfinite(level):
        return
    ax.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1.5)
    ax.annotate(
        "uniform",
        # Early blocks are the local ones: at the left the label meets fewest heads.
        (0, level),
        xycoords=("axes fraction", "data"),
        xytext=(2, 1),
        textcoords="offset points",
        ha="left",
        va="bottom",
        color=MUTED,
        fontsize="small",
    )
