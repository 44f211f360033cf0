"""The look all figures share, and saving them so that the same result gives the same bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from vitprobe.errors import ResultError
from vitprobe.wording import join

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

COLUMN = 3.25
"""Width of one column of a two-column paper, in inches."""
PAGE = 6.75
"""Width of the full text block of a two-column paper, in inches."""

FORMATS = ("pdf", "svg", "png")
"""That figures are written in."""

INK = "#24292f"
MUTED = "#6e7781"
GRID = "#dfe3e8"
# Okabe and Ito's hues again, as in vitprobe.mplstyle: a model keeps its colour in every figure.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE = Path(__file__).with_name("vitprobe.mplstyle")
# The least height of an axis, as a share of its upper end: rounding errors shall not fill it.
_LEAST_SPAN = 0.1
# The line of an untrained twin.
_TWIN: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (3, 1.5))}
# A creation date would make two runs on the same result differ.
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


@contextmanager
def style() -> Iterator[None]:
    """Apply vitprobe's matplotlib style inside a `with` block, and nowhere else: see `paper_style`.

    Save figures inside the block too: fonts in PDF and ids in SVG are settled while saving.
    """
    with mpl.rc_context(fname=_STYLE):
        yield


@contextmanager
def paper_style(rc: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Give everything that is drawn inside a `with` block the look of vitprobe's figures.

    One column of a two-column paper is 3.25 inches wide and a page 6.75; text is 7 points, stays
    text in SVG and is TrueType (no Type 3) in PDF. Save figures inside the block too: fonts in PDF
    and ids in SVG are settled while saving. Nothing outside the block is changed.

    rc: of matplotlib, on top of it, such as `{"font.family": "serif", "font.size": 8}`.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> with paper_style({"font.size": 8}):
        ...     figure, axes = plt.subplots(1, 2, figsize=(6.75, 2.4))
        ...     axes[0].title.get_fontsize()
        7.5
    """
    changes: Any = dict(rc or {})
    with style(), mpl.rc_context(rc=changes):
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


def check_formats(formats: Collection[str]) -> None:
    """Raise ResultError for a format that figures are not written in."""
    if isinstance(formats, str):
        raise ResultError(f"formats are a list: ['{formats}'] and not '{formats}'")
    for kind in formats:
        if kind not in FORMATS:
            raise ResultError(f"figures are not written as '{kind}'; choose from {join(FORMATS)}")


def save(drawn: Figure | Axes, stem: str | Path, formats: Collection[str] = FORMATS) -> list[Path]:
    """Write a figure as `stem`.pdf, .svg and .png, byte-identical for identical figures.

    `stem` may end in one of them: "cka" and "cka.pdf" name the same three files. PDF (TrueType
    fonts) and SVG (live text) have a transparent background, PNG a white one at 300 dpi.
    `formats`, a list, are those of the three to write, whatever `stem` ends in; their paths are
    returned.

    Raises:
        ResultError: another format.
    """
    check_formats(formats)
    figure = figure_of(drawn)
    stem = Path(stem)
    if stem.suffix in (f".{kind}" for kind in FORMATS):
        stem = stem.with_suffix("")
    paths = []
    # Without an engine set or by default, `None` means that the layout stays: done once, the three
    # files agree and are written in half the time.
    with mpl.rc_context(fname=_STYLE, rc={"figure.constrained_layout.use": False}):
        figure.draw_without_rendering()
        engine = figure.get_layout_engine()
        figure.set_layout_engine(None)
        for kind in (kind for kind in FORMATS if kind in formats):
            path = Path(f"{stem}.{kind}")
            figure.savefig(path, metadata=_UNDATED.get(kind), transparent=kind != "png")
            paths.append(path)
        figure.set_layout_engine(engine)
    return paths


def subjects(result: Comparison) -> tuple[str, ...]:
    """The models of a result without those that are the untrained twin of another."""
    twins = set(result.references.values())
    return tuple(name for name in result.models if name not in twins)


def measured(result: Comparison, measure: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some models of which a measure was taken: all but those that refuse it wholly."""
    return tuple(name for name in names if not _refuses(result, measure, name))


def _refuses(result: Comparison, measure: str, name: str) -> bool:
    if result.group_of(measure) != "attention":
        return False
    parts = result.describe(name).get("refused", ())
    closed = {i for part in parts if measure in part["measures"] for i in part["layers"]}
    return len(closed) == len(result.attention_layers(name))


def attention_noun(result: Comparison, names: Sequence[str]) -> str:
    """What the layers of attention of these models are: `block`, where each block has one."""
    for name in names:
        layers = result.attention_layers(name)
        if [layer["block"] for layer in layers] != list(range(len(layers))):
            return "attention layer"
    return "block"


def has_prefix(result: Comparison, name: str) -> bool:
    """Whether a model attends to prefix tokens, without which there is no sink."""
    layers = result.attention_layers(name)
    if any("key_prefix" in layer for layer in layers):
        return any(layer["key_prefix"] for layer in layers if layer["kind"] != "class token")
    return bool(result.describe(name)["facts"]["prefix_tokens"]["value"])


def with_twins(result: Comparison, names: Sequence[str]) -> tuple[str, ...]:
    """These models, and behind them the untrained twins they have."""
    twins = [result.references[name] for name in names if name in result.references]
    return tuple(dict.fromkeys([*names, *twins]))


def color_index(result: Comparison, name: str) -> int:
    """The place in `COLORS` of a model's colour, the same in every figure of a result.

    Seeds of one group share a colour, and so do a model and its untrained twin.
    """
    owners = {twin: model for model, twin in result.references.items()}
    kinds = list(dict.fromkeys(kind_of(result, model) for model in subjects(result)))
    return kinds.index(kind_of(result, owners.get(name, name))) % len(COLORS)


def color_of(result: Comparison, name: str) -> str:
    """The colour of a model in every figure of a result."""
    return COLORS[color_index(result, name)]


def kind_of(result: Comparison, name: str) -> str:
    """The group of seeds that a model belongs to, or the model itself."""
    return next((group for group, names in result.groups.items() if name in names), name)


def look(result: Comparison, name: str) -> dict[str, Any]:
    """How the line of a model is drawn; that of an untrained twin is thin, dashed and unmarked."""
    color = color_of(result, name)
    if name not in subjects(result):
        return {"color": color, "alpha": 0.75, **_TWIN}
    kinds = list(dict.fromkeys(kind_of(result, model) for model in subjects(result)))
    # With the colour the marker tells 42 models apart.
    marker = MARKERS[kinds.index(kind_of(result, name)) % len(MARKERS)]
    return {"color": color, "marker": marker, "markeredgewidth": 0}


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


def legend_above(ax: Axes, result: Comparison, names: Sequence[str]) -> None:
    """Put a legend of models above the axes, where it can hide no data.

    Seeds of one group have one entry, and so have all untrained twins.
    """
    handles: dict[str, Line2D] = {}
    drawn = subjects(result)
    for name in (name for name in names if name in drawn):
        handles.setdefault(kind_of(result, name), Line2D([], [], **look(result, name)))
    if any(name not in drawn for name in names):
        handles["untrained twin"] = Line2D([], [], **_TWIN, color=MUTED)
    labels = [shorten(label, 24 if len(handles) < 4 else 17) for label in handles]
    columns = max(1, min(len(labels), 44 // (max(map(len, labels)) + 4)))
    ax.legend(
        list(handles.values()),
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=columns,
        title=None,
    )


def axis_label(long_name: str, units: str, width: int = 30) -> str:
    """What is on an axis, in lines of at most `width` letters, and its unit on one of its own."""
    title = f"{long_name[0].upper()}{long_name[1:]}"
    # A name such as fashion-mnist stays whole while it fits.
    title = textwrap.fill(title, width, break_on_hyphens=False)
    return title if units in ("", "1") else f"{title}\n({units})"


def fit(drawn: Sequence[np.ndarray], *, from_zero: bool) -> tuple[float, float]:
    """The ends of an axis that holds all finite values, with a little room."""
    values = np.concatenate([np.asarray(array, dtype=float).ravel() for array in drawn])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if from_zero and low >= 0:
        return 0.0, min(1.0, max(0.1, 1.06 * high)) if high <= 1 else 1.06 * high
    span = max(high - low, _LEAST_SPAN * max(abs(low), abs(high))) or 1.0
    # The label of uniform attention, often the largest value, stands above its line.
    bottom = high - 1.06 * span
    return max(0.0, bottom) if low >= 0 else bottom, high + 0.14 * span
