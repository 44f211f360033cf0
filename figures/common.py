"""What the figures share: colours of the methods, lines and dots over seeds, saving, captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from analyses.fashion.reading import Study
from vitprobe.plots.style import COLORS, COLUMN, GRID, INK, MUTED
from vitprobe.statistics import t_interval

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = COLORS
LOOKS: dict[str, dict[str, Any]] = {
    "Random": {"color": MUTED, "marker": "x", "linestyle": (0, (3, 1.5)), "markeredgewidth": 0.9},
    "Supervised": {"color": INK, "marker": "o"},
    "MoCo-v3": {"color": BLUE, "marker": "s"},
    "DINO": {"color": SKY, "marker": "D"},
    "MAE": {"color": VERMILION, "marker": "^"},
    "D-MAE": {"color": GREEN, "marker": "v"},
    "MAE fine-tuned": {"color": ORANGE, "marker": "P"},
    "Teacher": {"color": PINK, "marker": "*", "markersize": 5},
}
"""Colour and marker of every method, the same in every figure, in the order they are listed."""
LAYERS = np.arange(13)
BLOCKS = np.arange(12)
DPI = 200


def look(method: str) -> dict[str, Any]:
    return {"markeredgewidth": 0, "markersize": 3.2, "linewidth": 1.1, **LOOKS[method]}


def present(study: Study, methods: Iterable[str] = tuple(LOOKS)) -> list[str]:
    """Those that were trained, in the order of `LOOKS`."""
    wanted = tuple(methods)
    return [name for name in LOOKS if name in wanted and study.seeds(name)]


def grid(rows: int, columns: int, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """Axes of a figure of one column width."""
    return plt.subplots(rows, columns, figsize=(COLUMN, height), squeeze=False, **kwargs)


def mosaic(layout: str, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """Axes of a figure of one column width, laid out as `plt.subplot_mosaic` does."""
    figure, axes = plt.subplot_mosaic(layout, figsize=(COLUMN, height), **kwargs)
    return figure, list(axes.values())


def line(ax: Axes, x: Any, values: Any, style: dict[str, Any]) -> None:
    """The mean over seeds (first axis), and where there are several the 95 % interval of it."""
    mean, low, high = t_interval(values)[:3]
    if np.isfinite(low).any():
        ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    ax.plot(x, mean, **style)


def dots(ax: Axes, y: float, values: Any, style: dict[str, Any]) -> None:
    """A row of seeds: dots, and where there are several a tick at their mean and its 95 %
    interval."""
    values = np.asarray(values, dtype=float)
    if not values.size:
        return
    mean, low, high = (float(one) for one in t_interval(values)[:3])
    if np.isfinite(low):
        ax.plot([low, high], [y, y], color=style["color"], lw=4, alpha=0.25, solid_capstyle="butt")
        ax.plot([mean], [y], "|", color=INK, ms=7, mew=1.1)
    own = {key: style[key] for key in ("color", "marker", "markersize", "markeredgewidth")}
    ax.plot(values, np.full(len(values), y), ls="", **own)


def heat(ax: Axes, x: Any, y: Any, cells: Any) -> QuadMesh:
    """Cells coloured from 0 to 1, as in every heatmap of similarity."""
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    # Edges in the colour of the face close the hairlines between vector cells.
    return ax.pcolormesh(x, y, cells, vmin=0, vmax=1, edgecolors="face", linewidth=0.3)


def scale(mesh: QuadMesh, axes: Any, label: str, **kwargs: Any) -> None:
    """The colour bar of heatmaps."""
    bar = np.ravel(axes)[0].figure.colorbar(mesh, ax=axes, label=label, **kwargs)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.collections[0].set(edgecolor="face", linewidth=0.5)


def rows_of(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of dots from the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.grid(axis="x", color=GRID, linewidth=0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def layered(ax: Axes, ticks: np.ndarray, label: str) -> None:
    """An axis of layers or blocks, every third of them numbered, and lines to read heights by."""
    ax.set_xlim(ticks[0] - 0.6, ticks[-1] + 0.6)
    ax.set_xticks(ticks[::3])
    ax.set_xlabel(label)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.tick_params(axis="x", length=0)


def letters(axes: Iterable[Axes], titles: Sequence[str]) -> None:
    """Titles with the letters by which the caption names the panels."""
    for letter, ax, title in zip("abcdefghij", axes, titles, strict=False):
        ax.set_title(f"({letter}) {title}")


def legend(figure: Figure, styles: dict[str, dict[str, Any]], columns: int, **kwargs: Any) -> None:
    """Above everything, where it hides nothing."""
    handles = [Line2D([], [], **style) for style in styles.values()]
    figure.legend(
        handles, list(styles), loc="outside upper center", ncols=columns, frameon=False, **kwargs
    )


def write(figure: Figure, stem: Path) -> list[Path]:
    """STEM.pdf and STEM.png, the same bytes for the same figure."""
    paths = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
    # Laid out once, the two files agree and take half the time.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    figure.savefig(paths[0], metadata={"CreationDate": None})
    figure.set_dpi(DPI)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    # A palette takes a third of the space; by coverage, since colour bars have rare colours.
    palette = pixels.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(paths[1], dpi=(DPI, DPI), optimize=True)
    plt.close(figure)
    return paths


def counted(study: Study, methods: Sequence[str]) -> str:
    """How many seeds each method has, as words: "3 seeds a method (DINO: 1)"."""
    numbers = {name: len(study.seeds(name)) for name in methods}
    usual = max(numbers.values(), default=0)
    others = ", ".join(f"{name}: {count}" for name, count in numbers.items() if count != usual)
    return f"{plural(usual, 'seed')} a method{f' ({others})' if others else ''}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def setting(study: Study) -> str:
    """Which schedule made it."""
    plan = study.schedule
    return (
        f"Schedule `{plan['name']}`: {plan['images']:,} training images, "
        f"{plural(plan['epochs'], 'epoch')}."
    )


def updates_of(study: Study) -> str:
    """How long fine-tunings were: whole epochs, so that shares of the labels differ."""
    counts = study.updates or (study.schedule["finetune_updates"],)
    ends = dict.fromkeys((counts[0], counts[-1]))
    return f"{' to '.join(f'{one:,}' for one in ends)} update{'s' * (counts[-1] != 1)}"


def images_of(study: Study) -> str:
    return f"{study.systems.provenance['images']['count']:,} test images of Fashion-MNIST"


INTERVALS = (
    "Bands: 95 % interval of the mean over seeds (Student's t, not bounded by what a measure can "
    "be); none for one seed."
)
