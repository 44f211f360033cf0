"""The numbers of a figure as a table, and where on the figure each of them lies.

The table is what a reader without script or sight has; the script of the page reads it too, and
tells the number under a pointer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.attention import head_places
from vitprobe.plots.depth import panels_of
from vitprobe.plots.differences import of_seed, rows_of
from vitprobe.plots.models import leaves, matrix
from vitprobe.plots.similarity import below_floor, is_symmetric
from vitprobe.plots.style import attention_noun, figure_of, measured, subjects, with_twins
from vitprobe.report.words import bracket, number, of_difference, two_digits

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison


@dataclass(frozen=True)
class Numbers:
    """The numbers of one axes."""

    what: str
    """The quantity."""
    row: str
    """What the headers of rows are, such as `layer of MAE`."""
    column: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    """Text of (rows, columns); empty where there is no number."""
    places: str
    """JSON: [0, x, y, width, height] of a frame that the cells fill from its lower left, or
    [1, x, y, …] of points row by row, null for none; in units of the SVG's view box."""


def of_heatmap(result: Comparison, measure: str, a: str, b: str, ax: Axes) -> Numbers:
    """Of a heatmap of two models."""
    values, floor = result.similarity(measure, a, b), result.floor(measure, a, b)
    low, high = result.interval(measure, a, b)
    below = below_floor(values, floor)
    cells = [
        [
            f"{_text(values, low, high, i, j)}{' ≤ floor' if below[i, j] else ''}"
            for j in range(values.sizes["layer_b"])
        ]
        for i in range(values.sizes["layer_a"])
    ]
    of, by = ("", "") if is_symmetric(result, measure) else (", predicted", ", predicting")
    return Numbers(
        MEASURES[measure].title,
        f"{a}{of}, layer",
        f"{b}{by}, layer",
        tuple(map(str, values["layer_a"].values)),
        tuple(map(str, values["layer_b"].values)),
        _frozen(cells),
        _frame(ax),
    )


def of_grid(
    result: Comparison, measure: str, models: Sequence[str], figure: Figure
) -> list[Numbers]:
    """Of `similarity_grid`."""
    count, symmetric = len(models), is_symmetric(result, measure)
    return [
        of_heatmap(result, measure, a, b, figure.axes[i * count + j])
        for i, a in enumerate(models)
        for j, b in enumerate(models)
        if not (symmetric and j > i)
    ]


def of_map(table: pd.DataFrame, models: Sequence[str], figure: Figure) -> Numbers:
    """Of `model_map`."""
    order, _ = leaves(table, models)
    values = matrix(table, order)
    ends = {frozenset((row.model_a, row.model_b)): (row.low, row.high) for row in rows_of(table)}
    cells = [
        [
            "1 by definition"
            if a == b
            else bracket(values[i, j], *ends[frozenset((a, b))], least=2)
            for j, b in enumerate(order)
        ]
        for i, a in enumerate(order)
    ]
    what = "Mean CKA at equal depth"
    axes = figure.axes[1]
    return Numbers(what, "", "", tuple(order), tuple(order), _frozen(cells), _frame(axes))


def of_curves(
    what: str, noun: str, tables: Mapping[str, xr.Dataset], units: str, ax: Axes
) -> Numbers:
    """Of lines by layer, a model a column."""
    layers = sorted({int(i) for table in tables.values() for i in table["layer"].values})
    cells = [["" for _ in tables] for _ in layers]
    points = np.full((len(layers), len(tables), 2), np.nan)
    for j, table in enumerate(tables.values()):
        arrays = (table[key].values for key in ("value", "low", "high"))
        for layer, value, low, high in zip(table["layer"].values, *arrays, strict=True):
            i = layers.index(int(layer))
            if np.isfinite(value):
                cells[i][j] = bracket(value, low, high, units)
                points[i, j] = layer, value
    names = tuple(str(name) for name in tables)
    places = _points(ax, points.reshape(-1, 2))
    return Numbers(what, noun, "", tuple(map(str, layers)), names, _frozen(cells), places)


def of_attention(result: Comparison, measure: str, ax: Axes) -> Numbers:
    """Of `attention_overlay`."""
    names = measured(result, measure, with_twins(result, subjects(result)))
    relative = result.needs_relative(measure, names)
    tables = {name: result.by_layer(measure, name, relative=relative) for name in names}
    units = tables[names[0]].attrs["units"]
    noun = attention_noun(result, names)
    return of_curves(MEASURES[measure].title, noun, tables, units, ax)


def of_tokens(result: Comparison, measure: str, ax: Axes) -> Numbers:
    """Of `token_curves`."""
    names = with_twins(result, subjects(result))
    tables = {name: result.by_layer(measure, name) for name in names}
    units = tables[names[0]].attrs["units"]
    return of_curves(MEASURES[measure].title, "layer", tables, units, ax)


def of_depth(result: Comparison, figure: Figure) -> list[Numbers]:
    """Of `depth_view`, a table a panel."""
    found = []
    for panel, ax in zip(panels_of(result), figure.axes, strict=True):
        layers = sorted({layer for line in panel.lines for layer in line.layers})
        cells = [["" for _ in panel.lines] for _ in layers]
        points = np.full((len(layers), len(panel.lines), 2), np.nan)
        for j, line in enumerate(panel.lines):
            numbers = zip(line.layers, line.x, line.value, line.low, line.high, strict=True)
            for layer, x, value, low, high in numbers:
                if np.isfinite(value):
                    i = layers.index(layer)
                    cells[i][j] = bracket(value, low, high, panel.units, least=2)
                    points[i, j] = x, value
        found.append(
            Numbers(
                panel.label,
                panel.of,
                "",
                tuple(map(str, layers)),
                tuple(line.name for line in panel.lines),
                _frozen(cells),
                _points(ax, points.reshape(-1, 2)),
            )
        )
    return found


def of_heads(result: Comparison, measure: str, name: str, *, relative: bool, ax: Axes) -> Numbers:
    """Of a measure of every head of a model."""
    values = result.attention(measure, name, relative=relative)
    low, high = result.interval(measure, name, relative=relative)
    units = values.attrs["units"]
    cells = [
        [_text(values, low, high, i, j, units, 0) for j in range(values.sizes["head"])]
        for i in range(values.sizes["layer"])
    ]
    points = np.stack([head_places(result, name, values), values.values], -1)
    return Numbers(
        MEASURES[measure].title,
        attention_noun(result, (name,)),
        "head",
        tuple(map(str, values["layer"].values)),
        tuple(map(str, values["head"].values)),
        _frozen(cells),
        _points(ax, points.reshape(-1, 2)),
    )


def of_spectrum(result: Comparison, name: str, ax: Axes) -> Numbers:
    """Of `fourier_curves`."""
    curves = result.fourier_curves(name)
    value, low, high, frequency = (
        curves[key].values for key in ("value", "low", "high", "frequency")
    )
    steps = frequency[np.isfinite(frequency).sum(1).argmax()]
    cells = [
        [
            bracket(value[i, j], low[i, j], high[i, j]) if np.isfinite(value[i, j]) else ""
            for j in range(value.shape[1])
        ]
        for i in range(value.shape[0])
    ]
    return Numbers(
        "Amplitude relative to frequency 0 (log)",
        "layer",
        "frequency (π rad per patch)",
        tuple(map(str, curves["layer"].values)),
        tuple(number(step) for step in steps),
        _frozen(cells),
        _points(ax, np.stack([frequency, value], -1).reshape(-1, 2)),
    )


def of_forest(table: pd.DataFrame, figure: Figure) -> list[Numbers]:
    """Of paired differences of one measure, a panel a unit."""
    found = []
    for (_, panel), ax in zip(
        table.groupby(["measure", "units"], sort=False), figure.axes, strict=False
    ):
        rows = list(rows_of(panel))
        points = np.array([(row.difference, i) for i, row in enumerate(rows)], float)
        texts = [
            bracket(row.difference, row.low, row.high, of_difference(row.units)) for row in rows
        ]
        cells = [[f"{text}; {row.verdict}"] for text, row in zip(texts, rows, strict=True)]
        found.append(
            Numbers(
                f"Difference in {MEASURES[rows[0].measure].in_text}",
                "A − B",
                "",
                tuple(f"{row.model_a} − {row.model_b}" for row in rows),
                ("difference",),
                _frozen(cells),
                _points(ax, points),
            )
        )
    return found


def of_seeds(result: Comparison, measure: str, ax: Axes) -> Numbers:
    """Of `group_spread`, a seed a row."""
    members = [name for names in result.groups.values() for name in names]
    relative = result.needs_relative(measure, members)
    units = result.group_means([measure])["units"].iloc[0]
    values = [of_seed(result, measure, name, relative) for name in members]
    groups = list(result.groups.values())
    rows = [next(i for i, names in enumerate(groups) if name in names) for name in members]
    return Numbers(
        MEASURES[measure].title,
        "",
        "",
        tuple(members),
        ("mean over images, heads and layers",),
        tuple(
            (bracket(value, np.nan, np.nan, units) if np.isfinite(value) else "",)
            for value in values
        ),
        _points(ax, np.stack([values, rows], -1)),
    )


def of_scores(tables: Sequence[pd.DataFrame], figure: Figure) -> list[Numbers]:
    """Of `accuracy`, a panel a protocol."""
    found = []
    for table, ax in zip(tables, figure.axes, strict=False):
        rows = list(rows_of(table))
        units = str(table.attrs["units"])
        # Shares are drawn in per cent.
        scale = 100 if units == "share" else 1
        points = np.array([(scale * row.value, i) for i, row in enumerate(rows)], float)
        found.append(
            Numbers(
                str(table.attrs["title"]),
                "",
                "",
                tuple(row.model for row in rows),
                (str(table.attrs["metric"]),),
                tuple((bracket(row.value, row.low, row.high, units),) for row in rows),
                _points(ax, points),
            )
        )
    return found


def _text(
    value: xr.DataArray,
    low: xr.DataArray,
    high: xr.DataArray,
    i: int,
    j: int,
    units: str = "",
    least: int = 2,
) -> str:
    ends = (float(array.values[i, j]) for array in (value, low, high))
    middle, below, above = ends
    if not np.isfinite(middle):
        return ""
    if not np.isfinite(below) and least:
        return two_digits(middle)
    return bracket(middle, below, above, units, least)


def _frozen(cells: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row) for row in cells)


def _frame(ax: Axes) -> str:
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    x, bottom, x_1, top = _in_svg(ax, np.array([(left, low), (right, high)])).ravel()
    return f"[0,{x:.1f},{top:.1f},{x_1 - x:.1f},{bottom - top:.1f}]"


def _points(ax: Axes, points: np.ndarray) -> str:
    defined = np.isfinite(points).all(1)
    found = np.full(points.shape, np.nan)
    found[defined] = _in_svg(ax, points[defined]) if defined.any() else points[defined]
    texts = ",".join("null" if np.isnan(end) else f"{end:.1f}" for end in found.ravel())
    return f"[1,{texts}]"


def _in_svg(ax: Axes, points: np.ndarray) -> np.ndarray:
    """Points of axes in units of the view box: pt from the upper left corner."""
    figure = figure_of(ax)
    found = ax.transData.transform(points) * 72 / figure.dpi
    found[:, 1] = figure.get_figheight() * 72 - found[:, 1]
    return np.asarray(found)
