"""What F2 and F3 share: a measure of every head by block, a panel a method."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import BLOCKS, grid, layered, line, look, present
from vitprobe.plots.style import MUTED


def panels(study: Study, measure: str, label: str) -> Figure:
    """Dots are heads of all seeds, the line their mean over heads and seeds."""
    methods = present(study)
    rows = -(-len(methods) // 2)
    figure, axes = grid(rows, 2, 1.12 * rows + 0.15, sharex=True, sharey=True)
    uniform = float(study.systems.uniform(measure, study.systems.models[0])[0])
    for ax, method in zip(axes.flat, methods, strict=False):
        heads, style = study.attention(measure, method), look(method)
        # Heads side by side, seeds on top of each other: heads of two seeds are no pair.
        spread = np.linspace(-0.3, 0.3, heads.shape[2])
        places = np.broadcast_to(BLOCKS[:, None] + spread, heads.shape)
        ax.plot(places.ravel(), heads.ravel(), "o", color=style["color"], ms=1.5, mew=0, alpha=0.5)
        line(ax, BLOCKS, heads.mean(2), {**style, "marker": "", "linestyle": "-"})
        layered(ax, BLOCKS, "")
        ax.axhline(uniform, color=MUTED, lw=0.8, ls=(0, (3, 2)), zorder=1.5)
        ax.set_title(method)
    for ax in axes.flat[len(methods) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    shown = axes.flat[: len(methods)]
    for ax in shown[-2:]:
        ax.set_xlabel("Block")
        ax.tick_params(labelbottom=True)
    return figure
