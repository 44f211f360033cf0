"""Attention over photographs: every layer's mean, and single heads of one patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitprobe.errors import ResultError
from vitprobe.plots.style import COLORS, PAGE, attention_noun, style

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

Query = Literal["patches", "class"]

# More maps beside a photograph would be smaller than their patches can be seen.
_MOST_MAPS = 12
_HEAT = "inferno"


@dataclass(frozen=True)
class Head:
    """One head, and why it is shown."""

    layer: int
    head: int
    why: str


def attention_maps(
    result: Comparison, name: str, *, query: Query = "patches", samples: int = 3
) -> Figure:
    """Draw where a model's attention goes, layer by layer, over the first photographs.

    A row is an image, a column an attention layer (of more than 12, evenly spaced ones). Attention
    is averaged over heads and over the patch queries that the result keeps, or is that of the first
    prefix token (`query="class"`); rows are renormalised over patch keys. Colour and opacity run
    from 0 to the largest value of each map, so maps show places and not amounts.

    Raises:
        ResultError: no such model, the result keeps no attention maps of it, or the model has no
            prefix token to ask.
    """
    maps = _maps(result, name)
    photos = _photos(result)
    prefix = int(maps.attrs["prefix_tokens"])
    if query == "class" and not prefix:
        raise ResultError(f"'{name}' has no class token, so no attention of it can be drawn")
    rows = min(samples, maps.sizes["sample"])
    every = np.unique(maps["layer"].values)
    chosen = _spaced(every)
    noun = attention_noun(result, (name,))
    with style():
        figure, axes = _panels(rows, 1 + len(chosen))
        for i in range(rows):
            _photo(axes[i, 0], photos[i])
            for ax, layer in zip(axes[i, 1:], chosen, strict=True):
                own = maps.isel(sample=i, unit=maps["layer"].values == layer)
                _overlay(ax, photos[i], mean_map(own, result.grid(name), query))
                if not i:
                    ax.set_title(f"{noun} {layer}" if layer == chosen[0] else str(layer))
    return figure


def head_maps(
    result: Comparison, name: str, heads: Sequence[Head] | None = None, *, samples: int = 3
) -> Figure:
    """Draw what single heads attend to from one patch, over the first photographs.

    The patch, marked by a square, is the kept one nearest to the centre of the image. Colour as in
    `attention_maps`.

    heads: which; unless given those that `telling_heads` chooses.

    Raises:
        ResultError: as `attention_maps`; no heads are given and the result can choose none; or the
            maps of a given one are not kept.
    """
    maps = _maps(result, name)
    photos = _photos(result)
    chosen = telling_heads(result, name) if heads is None else list(heads)
    if not chosen:
        raise ResultError(f"neither attention distance nor entropy of '{name}' chooses its heads")
    rows = min(samples, maps.sizes["sample"])
    grid, noun = result.grid(name), attention_noun(result, (name,))
    token, place = central_query(maps, grid)
    with style():
        figure, axes = _panels(rows, 1 + len(chosen), most=8, title=0.42)
        for i in range(rows):
            _photo(axes[i, 0], photos[i])
            _mark(axes[i, 0], place, grid)
            for ax, head in zip(axes[i, 1:], chosen, strict=True):
                unit = (maps["layer"].values == head.layer) & (maps["head"].values == head.head)
                if not unit.any():
                    raise ResultError(
                        f"no maps of head {head.head} in {noun} {head.layer} of '{name}' are kept"
                    )
                own = maps["attention"].isel(sample=i, unit=unit, query=[token])
                _overlay(ax, photos[i], _renormalised(own.values, maps, grid).reshape(grid))
                _mark(ax, place, grid)
                if not i:
                    ax.set_title(f"{head.why}\n{noun} {head.layer}, head {head.head}")
    return figure


def telling_heads(result: Comparison, name: str) -> list[Head]:
    """The most local, the farthest, the narrowest and the broadest head, of those with maps."""
    maps = result.samples(name)
    if maps is None:
        return []
    kept = set(zip(maps["layer"].values.tolist(), maps["head"].values.tolist(), strict=True))
    found: dict[tuple[int, int], list[str]] = {}
    for measure, least, most in (
        ("attention_distance", "most local", "farthest"),
        ("attention_entropy", "narrowest", "broadest"),
    ):
        if measure not in result.measures or name not in result.measured(measure):
            continue
        values = result.attention(measure, name)
        known = [
            (float(values.values[i, j]), place)
            for i, layer in enumerate(values["layer"].values.tolist())
            for j, head in enumerate(values["head"].values.tolist())
            if (place := (layer, head)) in kept and np.isfinite(values.values[i, j])
        ]
        if known:
            found.setdefault(min(known)[1], []).append(least)
            found.setdefault(max(known)[1], []).append(most)
    return [Head(*place, ", ".join(why)) for place, why in found.items()]


def mean_map(maps: xr.Dataset, grid: tuple[int, int], query: Query = "patches") -> np.ndarray:
    """Attention over patches (rows, columns) of one image, averaged over the heads of `maps`.

    maps: `attention` over (unit, query, key), as in `Comparison.samples`. query: see
    `attention_maps`. It sums to 1; nan where no row has mass on patches.
    """
    prefix = int(maps.attrs["prefix_tokens"])
    queries = maps["query"].values
    rows = queries >= prefix if query == "patches" else queries == 0
    return _renormalised(maps["attention"].values[:, rows], maps, grid).reshape(grid)


def central_query(maps: xr.Dataset, grid: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The kept patch query nearest to the centre: (place among queries, (row, column))."""
    prefix = int(maps.attrs["prefix_tokens"])
    queries = maps["query"].values
    patches = np.flatnonzero(queries >= prefix)
    rows, columns = np.divmod(queries[patches] - prefix, grid[1])
    # Of an even grid the four middle patches are equally near; the first of them is taken.
    off = np.hypot(rows - (grid[0] - 1) / 2, columns - (grid[1] - 1) / 2)
    nearest = int(np.argmin(off))
    return int(patches[nearest]), (int(rows[nearest]), int(columns[nearest]))


def _renormalised(attention: np.ndarray, maps: xr.Dataset, grid: tuple[int, int]) -> np.ndarray:
    """The mean of rows over patch keys, each summing to 1; rows without mass are left out."""
    patches = attention.astype(float)[..., int(maps.attrs["prefix_tokens"]) :]
    patches = patches.reshape(-1, grid[0] * grid[1])
    mass = patches.sum(-1, keepdims=True)
    held = mass[:, 0] > 0
    if not held.any():
        return np.full(patches.shape[1], np.nan)
    return np.asarray((patches[held] / mass[held]).mean(0))


def _maps(result: Comparison, name: str) -> xr.Dataset:
    maps = result.samples(name)
    if maps is None:
        raise ResultError(f"no attention maps of '{name}' are kept in this result")
    return maps


def _photos(result: Comparison) -> np.ndarray:
    photos = result.thumbnails()
    if photos is None:
        raise ResultError("no images are kept in this result")
    return np.asarray(photos.values)


def _spaced(layers: np.ndarray) -> list[int]:
    if len(layers) > _MOST_MAPS:
        layers = layers[np.rint(np.linspace(0, len(layers) - 1, _MOST_MAPS)).astype(int)]
    return [int(layer) for layer in layers]


def _panels(
    rows: int, columns: int, *, most: int = 13, title: float = 0.2
) -> tuple[Figure, np.ndarray]:
    """Square panels, as wide as a page together, and not larger than a sixth of it each."""
    side = PAGE / max(columns, min(most, 6))
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(side * columns, side * rows + title),
        gridspec_kw={"wspace": 0.04, "hspace": 0.04},
    )
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _photo(ax: Axes, photo: np.ndarray) -> None:
    ax.imshow(photo, extent=(0, 1, 0, 1), interpolation="none")


def _overlay(ax: Axes, photo: np.ndarray, attention: np.ndarray) -> None:
    # Without its colours the photograph takes none of those of the map.
    grey = np.rint(photo @ [0.299, 0.587, 0.114]).astype(np.uint8)
    ax.imshow(np.repeat(grey[..., None], 3, -1), extent=(0, 1, 0, 1), interpolation="none")
    most = np.nanmax(attention) if np.isfinite(attention).any() else 0
    share = np.nan_to_num(attention / most) if most > 0 else np.zeros_like(attention)
    heat = mpl.colormaps[_HEAT](0.15 + 0.85 * share)
    heat[..., 3] = 0.25 + 0.6 * share
    ax.imshow(np.rint(255 * heat).astype(np.uint8), extent=(0, 1, 0, 1), interpolation="none")


def _mark(ax: Axes, place: tuple[int, int], grid: tuple[int, int]) -> None:
    height, width = 1 / grid[0], 1 / grid[1]
    corner = (place[1] * width, 1 - (place[0] + 1) * height)
    for color, line in (("white", 1.6), (COLORS[0], 0.8)):
        ax.add_patch(
            plt.Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line)
        )
