"""Accuracy of models under each protocol that they were evaluated with."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd

from vitprobe.errors import ResultError
from vitprobe.plots.accuracy import labels_of
from vitprobe.plots.style import (
    COLUMN,
    GRID,
    PAGE,
    color_of,
    fit,
    look,
    shorten,
    style,
    subjects,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison


def accuracy_panels(result: Comparison) -> Figure:
    """Draw what models score in the evaluations that are joined to a result, a panel a protocol.

    A point is a model (the mean over the seeds of its evaluation), the line its 95 % interval over
    test images, of several seeds the mean of their ends. Untrained twins are left out.

    Raises:
        ResultError: the result holds no scores of whole models.
    """
    tables = by_protocol(result)
    if not tables:
        raise ResultError("no scores are joined to this result")
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    most = max(len(table) for table in tables)
    with style():
        figure, axes = plt.subplots(
            lines,
            columns,
            squeeze=False,
            figsize=(COLUMN if columns == 1 else PAGE, lines * (0.62 + 0.2 * max(most, 2))),
        )
        for ax in axes.flat[len(tables) :]:
            ax.set_axis_off()
        for ax, table in zip(axes.flat, tables, strict=False):
            scale = 100 if table.attrs["units"] == "share" else 1
            row: Any
            for place, row in enumerate(table.itertuples(index=False)):
                color = color_of(result, row.model)
                ends = [scale * row.low, scale * row.high]
                ax.plot(ends, [place, place], color=color, lw=1.2)
                marker = str(look(result, row.model).get("marker", "o"))
                ax.plot(scale * row.value, place, marker, color=color, ms=4, mew=0)
            ax.set_yticks(range(len(table)), [shorten(name, 18) for name in table["model"]])
            ax.set_ylim(len(table) - 0.5, -0.5)
            drawn = [scale * table[end].to_numpy(float) for end in ("value", "low", "high")]
            ax.set_xlim(fit(drawn, from_zero=False))
            ax.locator_params(axis="x", nbins=5)
            unit = " (%)" if scale == 100 else ""
            ax.set_xlabel(f"{table.attrs['metric']}{unit}")
            ax.set_title(textwrap.fill(str(table.attrs["title"]), 30))
            ax.grid(axis="x", color=GRID, linewidth=0.5)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
    return figure


def named(metric: str) -> tuple[str, str]:
    """A metric as it is called in text, and the unit of its numbers."""
    if metric.startswith("top"):
        return metric.replace("top", "top-"), "share"
    return metric.replace("_", " "), "1"


def by_protocol(result: Comparison) -> list[pd.DataFrame]:
    """Scores of whole models, a table a protocol, data set, metric, share of labels, setting and
    number of kept blocks: `model`, `value`, `low`, `high`, `seeds`, `images`, in the order of the
    models.

    A model evaluated with several seeds has the mean of its numbers and of their ends. The
    attributes are `title`, `metric`, and `units`, "share" or "1".
    """
    table = result.scores
    table = table[table["layer"].isna() & table["model"].isin(subjects(result))]
    return [_protocol(result, *part) for part in _parts(table.reset_index(drop=True))]


def probed(result: Comparison) -> tuple[str, str, pd.DataFrame] | None:
    """Of the protocol that most layers were probed with: its title, its units, and its scores.

    The scores are those of models that have a figure of their own. None where there are none.
    """
    table = result.scores
    table = table[table["layer"].notna() & table["kept"].isna()]
    table = table[table["model"].isin(subjects(result))].reset_index(drop=True)
    if not len(table):
        return None
    title, metric, rows = max(_parts(table), key=lambda part: len(part[2]))
    name, units = named(metric)
    return f"{title}, {name}", units, rows


def _parts(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(title, metric, rows) of scores that differ in model, seed and layer alone."""
    if not len(table):
        return []
    table = table.assign(row=labels_of(table))
    found = []
    unit = ["row", "dataset", "metric", "kept"]
    key: Any  # pandas types what groups share as hashable and no more
    for key, rows in table.groupby(unit, sort=False, dropna=False):
        row, dataset, metric, kept = key
        title = row if dataset in row else f"{row} on {dataset}"
        title += "" if pd.isna(kept) else f", first {kept} blocks kept"
        found.append((title, metric, rows))
    return found


def _protocol(result: Comparison, title: str, metric: str, rows: pd.DataFrame) -> pd.DataFrame:
    means = rows.groupby("model", sort=False).agg(
        value=("value", "mean"),
        low=("low", "mean"),
        high=("high", "mean"),
        seeds=("seed", "nunique"),
        images=("images", "max"),
    )
    part = means.loc[[name for name in subjects(result) if name in means.index]].reset_index()
    name, units = named(metric)
    part.attrs.update(title=title, metric=name, units=units)
    return part
