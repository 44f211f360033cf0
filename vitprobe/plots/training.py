"""Training curves of several runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from vitprobe.plots.style import COLORS, COLUMN, GRID, PAGE, shorten, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What can be compared across methods: title and unit. Everything else is a method's own affair.
_SHARED = {
    "test_accuracy": ("Test accuracy", "share of images"),
    "knn_accuracy": ("k-NN accuracy", "share of images"),
    "images_per_s": ("Speed", "images/s"),
    "lr": ("Learning rate", ""),
}
_METHODS = {
    "mae": "MAE",
    "moco_v3": "MoCo v3",
    "dino": "DINO",
    "supervised": "supervised",
    "finetune": "fine-tuning",
}
# Of a method's own metrics. MoCo v3 multiplies its cross-entropy by twice the temperature, and the
# loss of a distilled method adds terms of different units: those have none.
_UNITS = {
    ("mae", "loss"): "mean squared error",
    ("moco_v3", "loss"): "2τ × nats",
    ("moco_v3", "accuracy"): "share of queries",
    ("dino", "loss"): "nats",
    ("dino", "teacher_entropy"): "nats",
    ("dino", "kl"): "nats",
    ("supervised", "loss"): "nats",
    ("supervised", "accuracy"): "share of images",
    ("finetune", "loss"): "nats",
    ("finetune", "accuracy"): "share of images",
}
# Colours repeat with another dash: 24 runs can be told apart.
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
# Up to so many points each has a mark; more would merge into a thick line.
_MOST_MARKS = 24


def training_curves(runs: pd.DataFrame) -> Figure:
    """Draw every metric over the epochs, a line a run, a panel a metric.

    What methods cannot share (the loss and its terms) has a panel for each method. A run keeps its
    colour in all panels; one legend is above them. The figure is as wide as a page, or a column
    where there is one panel.

    runs: of `vitprobe.runs.read_runs` or `select`, whose order of metrics is that of the panels.
    """
    panels: dict[tuple[str, str], pd.DataFrame] = {}
    for metric in runs["metric"].unique():
        rows = runs[runs["metric"] == metric]
        if metric in _SHARED:
            panels[metric, ""] = rows
        else:
            for method, own in rows.groupby("method"):
                panels[metric, str(method)] = own
    names = sorted(runs["run"].unique())
    columns = len(panels) if len(panels) < 4 else 2 if len(panels) == 4 else 3
    lines = -(-len(panels) // columns)
    width = COLUMN if len(panels) == 1 else PAGE
    labels = [shorten(name, 40) for name in names]
    # Letters of the legend are about 0.06 inches wide, and a handle as wide as seven of them.
    across = max(1, min(len(names), int(width / (0.06 * (max(map(len, labels)) + 7)))))
    legend_lines = -(-len(names) // across)
    with style():
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(width, 1.75 * lines + 0.13 * legend_lines + 0.1),
            squeeze=False,
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, ((metric, method), rows) in zip(axes.flat, panels.items(), strict=False):
            _draw(ax, rows, names)
            _dress(ax, metric, method)
        figure.align_ylabels()
        handles = [plt.Line2D([], [], **_look(names, name)) for name in names]
        figure.legend(handles, labels, loc="outside upper left", ncols=across)
    return figure


def _look(names: list[str], name: str) -> dict[str, Any]:
    index = names.index(name)
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _DASHES[index // len(COLORS) % len(_DASHES)],
    }


def _draw(ax: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for name, run in rows.groupby("run"):
        run = run.sort_values("step")
        few = len(run) <= _MOST_MARKS
        marks: dict[str, Any] = (
            {"marker": "o", "markersize": 2.5, "markeredgewidth": 0} if few else {}
        )
        ax.plot(run["epoch"], run["value"], **_look(names, str(name)), **marks)


def _dress(ax: Axes, metric: str, method: str) -> None:
    if metric in _SHARED:
        title, unit = _SHARED[metric]
    else:
        name, distilled, _ = method.partition(", distilled")
        # Terms keep the name that the log, and who asks for them, knows them by.
        what = "Loss" if metric == "loss" else metric
        title = f"{what}, {_METHODS.get(name, name)}{distilled}"
        unit = _UNITS.get((method, metric), "")
    ax.set_title(title)
    ax.set_xlabel("Epoch")
    ax.set_ylabel(unit[:1].upper() + unit[1:])
    ax.set_xlim(left=0)
    ax.locator_params(axis="x", integer=True)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    if metric in ("images_per_s", "lr"):
        ax.set_ylim(0, 1.05 * ax.dataLim.y1 or 1)
    if metric == "images_per_s":
        ax.yaxis.set_major_formatter("{x:,.0f}")
