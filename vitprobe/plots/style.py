"""The look all figures share, and saving them so that the same result gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.25
"""Width of one column of a two-column paper, in inches."""
PAGE = 6.75
"""Width of the full text block of a two-column paper, in inches."""

INK = "#24292f"
MUTED = "#6e7781"
GRID = "#dfe3e8"
# Okabe and Ito's hues again, as in vitprobe.mplstyle: a model keeps its colour in every figure.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE = Path(__file__).with_name("vitprobe.mplstyle")
# A creation date would make two runs on the same result differ.
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


@contextmanager
def style() -> Iterator[None]:
    """Apply vitprobe's matplotlib style inside a `with` block, and nowhere else.

    Save figures inside the block too: fonts in PDF and ids in SVG are settled while saving.
    """
    with mpl.rc_context(fname=_STYLE):
        yield


@contextmanager
def canvas(ax: Axes | None, size: tuple[float, float]) -> Iterator[Axes]:
    """`ax` under the caller's own style, or the only axes of a new figure under vitprobe's.

    `size` is the width and height of that new figure in inches.
    """
    if ax is not None:
        yield ax
        return
    with style():
        yield plt.subplots(figsize=size)[1]


def figure_of(drawn: Figure | Axes) -> Figure:
    """The figure that axes belong to, or the figure itself."""
    # A subfigure's own `figure` is the whole one.
    return drawn.figure.figure


def save(drawn: Figure | Axes, stem: str | Path) -> list[Path]:
    """Write a figure as `stem`.pdf, .svg and .png, byte-identical for identical figures.

    PDF (TrueType fonts) and SVG (live text) have a transparent background, PNG a white one at
    300 dpi. Returns the three paths.
    """
    figure = figure_of(drawn)
    paths = []
    # Without an engine set or by default, `None` means that the layout stays: done once, the three
    # files agree and are written in half the time.
    with mpl.rc_context(fname=_STYLE, rc={"figure.constrained_layout.use": False}):
        figure.draw_without_rendering()
        engine = figure.get_layout_engine()
        figure.set_layout_engine(None)
        for kind, metadata in _UNDATED.items():
            path = Path(f"{stem}.{kind}")
            figure.savefig(path, metadata=metadata, transparent=kind != "png")
            paths.append(path)
        figure.set_layout_engine(engine)
    return paths


def color_of(models: Sequence[str], name: str) -> str:
    """The colour of model `name` in every figure of a result on `models`."""
    return COLORS[models.index(name) % len(COLORS)]


def marker_of(models: Sequence[str], name: str) -> str:
    """The marker of model `name`; with the colour it tells 42 models apart."""
    return MARKERS[models.index(name) % len(MARKERS)]


def shorten(name: str, limit: int) -> str:
    """`name` cut in its middle to at most `limit` characters, for both ends tell models apart."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 3
    return f"{name[: limit - 1 - tail].rstrip()}…{name[-tail:].lstrip()}"


def layer_ticks(layers: np.ndarray, most: int) -> list[int]:
    """About `most` evenly spaced layer numbers, with the first and, if possible, the last."""
    first, last = int(layers[0]), int(layers[-1])
    span = last - first
    least = int(np.ceil(span / max(most - 1, 1))) or 1
    even = [step for step in range(least, 2 * least + 1) if span % step == 0]
    return list(range(first, last + 1, even[0] if even else least))


def legend_above(ax: Axes, models: Sequence[str]) -> None:
    """Put the legend above the axes, where it can hide no data."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [shorten(label, 24) for label in labels]
    columns = max(1, min(len(models), 44 // (max(map(len, labels)) + 4)))
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=columns,
        title=None,
    )
