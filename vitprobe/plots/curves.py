"""Lines by layer with the interval of their mean: token measures, and spectra of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap

from vitprobe.plots.style import (
    COLUMN,
    GRID,
    axis_label,
    canvas,
    fit,
    layer_ticks,
    legend_above,
    look,
    shorten,
    subjects,
    with_twins,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from vitprobe.results import Comparison


def token_curves(result: Comparison, measure: str, *, ax: Axes | None = None) -> Axes:
    """Draw a token measure of all models by layer.

    The band around a line is the 95 % interval of its value, layer by layer (pointwise); a measure
    without intervals has none. Untrained twins are dashed and thin. Without `ax` a figure of one
    column width is made.

    Raises:
        ResultError: the measure is not in the result, or is not one of tokens.
    """
    names = with_twins(result, subjects(result))
    values = {name: result.tokens(measure, name) for name in names}
    tables = {name: result.by_layer(measure, name) for name in names}
    with canvas(ax, (COLUMN, 2.3)) as axes:
        drawn = curves(axes, result, tables)
        about = values[names[0]].attrs
        longest = max(int(array["layer"].values[-1]) for array in values.values())
        axes.set_xlim(-0.6, longest + 0.6)
        axes.set_xticks(layer_ticks(np.arange(longest + 1), 13))
        share = measure == "first_direction_share"
        axes.set_ylim((0, 1) if share else fit(drawn, from_zero=about["units"] == "share"))
        axes.set_xlabel("Layer")
        axes.set_ylabel(axis_label(about["long_name"], about["units"]))
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        axes.tick_params(axis="x", length=0)
        legend_above(axes, result, names)
    return axes


def first_direction_share(result: Comparison, *, ax: Axes | None = None) -> Axes:
    """Draw the share of each layer's variance along its first principal direction, by model.

    Where it is large, CKA mostly compares that one direction. As `token_curves`.
    """
    return token_curves(result, "first_direction_share", ax=ax)


def fourier_curves(result: Comparison, name: str, *, ax: Axes | None = None) -> Axes:
    """Draw the relative log-amplitude of a model's tokens by frequency, a line a layer.

    Colour runs from the first layer to the last. The band around a line is the 95 % interval of the
    mean over images, frequency by frequency (pointwise). Without `ax` a figure of one column width
    is made.

    Raises:
        ResultError: no such model, or `fourier_amplitude` is not in the result.
    """
    spectra = result.fourier_curves(name)
    layers = spectra["layer"].values
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    with canvas(ax, (COLUMN, 2.3)) as axes:
        for layer, color in zip(layers, colors, strict=True):
            line = spectra.sel(layer=layer)
            frequency = line["frequency"].values
            _band(axes, frequency, line["low"].values, line["high"].values, color)
            axes.plot(frequency, line["value"].values, color=color, lw=0.9)
        axes.set_title(shorten(name, 44))
        axes.set_xlim(0, max(1.0, float(spectra["frequency"].max())))
        axes.set_xlabel("Frequency (π rad per patch)")
        axes.set_ylabel("Amplitude relative to\nfrequency 0 (log)")
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        bar = axes.inset_axes((1.03, 0, 0.035, 1))
        edges = np.append(layers - 0.5, layers[-1] + 0.5)
        scale = ScalarMappable(BoundaryNorm(edges, len(layers)), ListedColormap(colors))
        drawn = axes.figure.colorbar(scale, cax=bar, label="Layer", ticks=layer_ticks(layers, 7))
        bar.collections[0].set(edgecolor="face", linewidth=0.5)
        drawn.outline.set_visible(False)
        bar.tick_params(which="both", length=0)
    return axes


def curves(ax: Axes, result: Comparison, tables: Mapping[str, xr.Dataset]) -> list[np.ndarray]:
    """Draw the line and band of every model; returns all that the axis has to hold."""
    drawn = []
    for name, table in tables.items():
        layers, value, low, high = (table[k].values for k in ("layer", "value", "low", "high"))
        style = look(result, name)
        _band(ax, layers, low, high, style["color"])
        ax.plot(layers, value, label=name, **style)
        drawn += [value, low, high]
    return drawn


def _band(ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str) -> None:
    if np.isfinite(low).any():
        ax.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
