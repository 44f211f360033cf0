"""How models lie to each other as wholes: a dendrogram beside the matrix of their similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from vitprobe.errors import ResultError
from vitprobe.plots.style import INK, MUTED, PAGE, color_of, look, shorten, style, subjects
from vitprobe.tables import between_models

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

# Beyond so many models the numbers in the cells do not fit.
_MOST_NUMBERS = 14
# scipy puts the leaves of a dendrogram at 5, 15, 25, …
_LEAF = 10


def model_map(result: Comparison, *, models: Sequence[str] | None = None) -> Figure:
    """Draw which models are alike: a dendrogram, and the matrix of mean CKA in its order.

    The distance of two models is the angle arccos(CKA), averaged over their layers at equal depth
    (see `vitprobe.tables.between_models`); the dendrogram joins the two nearest groups, whose
    distance is the mean over their pairs (average linkage), and leaves are ordered so that
    neighbours are near (`scipy.cluster.hierarchy`). The cells hold the mean CKA itself.

    models: which to draw; all but untrained twins unless given.

    Raises:
        ResultError: no such model, CKA is not in the result or undefined for a pair, or fewer than
            three models, of which there is no map.
    """
    names = subjects(result) if models is None else tuple(models)
    if len(names) < 3:
        raise ResultError("a map of models needs three of them")
    table = between_models(result, names)
    if table["distance"].isnull().any():
        pair = table[table["distance"].isnull()].iloc[0]
        raise ResultError(f"CKA of {pair.model_a} and {pair.model_b} is undefined: no map")
    order, tree = leaves(table, names)
    side = min(0.32 * len(names) + 0.6, PAGE - 2.2)
    with style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(PAGE, side + 0.9), width_ratios=(1, 2.4), sharey=True
        )
        dendrogram(
            tree,
            orientation="left",
            ax=left,
            color_threshold=0,
            above_threshold_color=INK,
            no_labels=True,
        )
        left.collections[0].set_linewidth(0.9)
        for place, name in enumerate(order):
            marker = str(look(result, name).get("marker", "o"))
            y = _LEAF * (place + 0.5)
            left.plot(0, y, marker, color=color_of(result, name), ms=4, mew=0, clip_on=False)
        left.set_xlabel("Mean angle between\nlayers (rad)")
        left.set_xlim(1.04 * tree[:, 2].max(), 0)
        left.spines["left"].set_visible(False)
        left.tick_params(axis="y", length=0, labelleft=False)
        _matrix(right, table, order)
    return figure


def leaves(table: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The models in the order of the dendrogram, upwards, and scipy's linkage of it."""
    distance = np.zeros((len(names), len(names)))
    row: Any
    for row in table.itertuples(index=False):
        i, j = names.index(row.model_a), names.index(row.model_b)
        distance[i, j] = distance[j, i] = row.distance
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    found = dendrogram(tree, no_plot=True)["leaves"]
    return [names[i] for i in found], tree


def matrix(table: pd.DataFrame, order: Sequence[str]) -> np.ndarray:
    """Mean CKA of every two models in this order, 1 on the diagonal."""
    cells = np.eye(len(order))
    row: Any
    for row in table.itertuples(index=False):
        i, j = order.index(row.model_a), order.index(row.model_b)
        cells[i, j] = cells[j, i] = row.similarity
    return cells


def _matrix(ax: Axes, table: pd.DataFrame, order: Sequence[str]) -> None:
    cells, count = matrix(table, order), len(order)
    edges = _LEAF * np.arange(count + 1)
    mesh = ax.pcolormesh(
        edges, edges, cells, cmap=plt.get_cmap("viridis", 48), vmin=0, vmax=1, edgecolors="face",
        linewidth=0.5,
    )  # fmt: skip
    if count <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(cells):
            text = "1" if row == column else f"{value:.2f}".replace("-", "−")
            ax.text(
                _LEAF * (column + 0.5),
                _LEAF * (row + 0.5),
                text,
                ha="center",
                va="center",
                fontsize=6,
                color="#111111" if value > 0.6 else "white",
            )
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, edges[-1])
    middles = edges[:-1] + _LEAF / 2
    labels = [shorten(name, 22) for name in order]
    ax.set_yticks(middles, labels)
    ax.tick_params(axis="y", labelleft=True)
    ax.set_xticks(middles, labels, rotation=40, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(mesh, ax=ax, fraction=0.035, pad=0.02, label="Mean CKA at equal depth")
    bar.ax.collections[0].set(edgecolor="face", linewidth=0.5)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, color=MUTED)
