"""Accuracy of models under each protocol that they were evaluated with."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vitprobe.errors import ResultError
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

_UNIT = ("protocol", "dataset", "metric", "labels", "kept")
PROTOCOLS = {
    "head": "own head",
    "knn": "k-NN",
    "linear": "linear probe",
    "finetune": "fine-tuned",
    "transfer": "transfer",
    "detection": "detection",
    "segmentation": "segmentation",
}


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
    """Scores of whole models, a table a protocol, data set, metric, share of labels and kept
    blocks: `model`, `value`, `low`, `high`, `seeds`, `images`, in the order of the models.

    A model evaluated with several seeds has the mean of its numbers and of their ends. The
    attributes are `title`, `metric`, and `units`, "share" or "1".
    """
    table: pd.DataFrame | None = getattr(result, "scores", None)
    if table is None:
        return []
    table = table[table["layer"].isna() & table["model"].isin(subjects(result))]
    found = []
    for key, rows in table.groupby(list(_UNIT), sort=False, dropna=False):
        protocol, dataset, metric, labels, kept = _parts(key)
        means = rows.groupby("model", sort=False).agg(
            value=("value", "mean"),
            low=("low", "mean"),
            high=("high", "mean"),
            seeds=("seed", "nunique"),
            images=("images", "max"),
        )
        chosen = [name for name in subjects(result) if name in means.index]
        part = means.loc[chosen].reset_index()
        title = f"{PROTOCOLS.get(protocol, protocol)} on {dataset}"
        title = f"{title[0].upper()}{title[1:]}" if protocol != "knn" else title
        if not np.isclose(labels, 1):
            title += f", {100 * labels:.3g} % of labels"
        if not pd.isna(kept):
            title += f", first {kept} blocks kept"
        metric, units = named(metric)
        part.attrs.update(title=title, metric=metric, units=units, protocol=protocol)
        found.append(part)
    return found


def _parts(key: Any) -> tuple[Any, ...]:
    """The values that a group of rows shares; pandas types them as one."""
    return tuple(key)
