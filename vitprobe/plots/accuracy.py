"""What models are worth by evaluation: side by side, and by depth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from vitprobe.errors import ResultError, suggest
from vitprobe.plots.style import (
    COLORS,
    COLUMN,
    GRID,
    MARKERS,
    MUTED,
    canvas,
    kind_of,
    layer_ticks,
    legend_above,
    look,
    shorten,
    subjects,
)
from vitprobe.results import Comparison
from vitprobe.scores import Scores, asked_for
from vitprobe.statistics import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROTOCOLS: Final = {
    "head": "Own head",
    "knn": "k-NN",
    "linear": "Linear",
    "finetune": "Fine-tuned",
    "transfer": "Transfer",
    "layers": "Fine-tuned",
    "detection": "Detection",
    "segmentation": "Segmentation",
}
_METRICS: Final = {"top1": "Accuracy", "miou": "Mean IoU", "box_ap": "Box AP", "mask_ap": "Mask AP"}
_DEPTHS: Final = {"layer": "Layer", "kept": "Pre-trained blocks kept"}


def accuracy(
    scores: Comparison | Scores, protocols: Sequence[str] = (), *, ax: Axes | None = None
) -> Axes:
    """Draw the scores of all models, a row a protocol (and data set, share of labels, setting).

    A point is a score, the line its 95 % interval over test images. Models that are seeds of one
    group of a comparison are one point, their mean, with Student's t interval over seeds. Scores of
    single layers, or with only some blocks kept, are left to `probes_by_depth`. Without `ax` a
    figure of one column width is made.

    Args:
        scores: a Comparison with scores, which gives models their colours, or `Scores`.
        protocols: which to draw, in this order; () for all.

    Raises:
        ResultError: no such scores.
    """
    table = _read(scores, protocols)
    table = table[table["layer"].isna() & table["kept"].isna()].reset_index(drop=True)
    if not len(table):
        raise ResultError("no scores of whole models to draw; make some with vitprobe evaluate")
    looks = _Looks(scores, table)
    table["row"] = labels_of(table)
    rows = list(dict.fromkeys(table["row"]))
    kinds = looks.kinds
    step = min(0.22, 0.8 / len(kinds))
    height = 0.75 + sum(0.14 + 0.115 * _width(table, row, looks) for row in rows)
    with canvas(ax, (COLUMN, height)) as axes:
        for place, row in enumerate(rows):
            points = [
                (kind, point)
                for kind in kinds
                for point in _points(table[table["row"] == row], looks.members(kind))
            ]
            for index, (kind, point) in enumerate(points):
                y = place + step * (index - (len(points) - 1) / 2)
                style = looks.style(kind)
                color = style["color"]
                line = {"color": color, "lw": 1.1, "ls": style.get("linestyle", "-")}
                axes.plot([point.low, point.high], [y, y], gid="interval", **line)
                axes.plot(
                    [point.value], [y], color=color, marker=style.get("marker", "o"), ms=3.6,
                    mfc=color if looks.trained(kind) else "white", mew=0.9, ls="",
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [shorten(row, 34) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        for place in range(1, len(rows)):
            axes.axhline(place - 0.5, color=GRID, lw=0.5, zorder=0)
        _percent(axes, "x", table)
        axes.tick_params(axis="y", length=0)
        looks.legend(axes)
    return axes


def probes_by_depth(
    scores: Comparison | Scores,
    protocol: str | None = None,
    *,
    by: Literal["layer", "kept"] = "layer",
    ax: Axes | None = None,
) -> Axes:
    """Draw a score of all models by depth: of the features of each layer, or with so many
    pre-trained blocks kept.

    The band around a line is the 95 % interval over test images, layer by layer (pointwise). Seeds
    of one group are lines of one colour. Without `ax` a figure of one column width is made.

    Args:
        scores: a Comparison with scores, which gives models their colours, or `Scores`.
        protocol: such as `linear`; by default the first that has scores by depth.
        by: `layer` (0 … L as everywhere), or `kept`.

    Raises:
        ResultError: no scores by depth, or none of that protocol.
    """
    if by not in _DEPTHS:
        raise ResultError(f"unknown depth '{by}': use 'layer' or 'kept'")
    table = _read(scores, () if protocol is None else (protocol,))
    table = table[table[by].notna()].reset_index(drop=True)
    if not len(table):
        of = f" by {protocol}" if protocol else ""
        how = "--layers" if by == "layer" else "vitprobe evaluate layers"
        raise ResultError(f"no scores{of} for each {by} to draw; make some with {how}")
    table = table[table["protocol"] == table["protocol"].iloc[0]].reset_index(drop=True)
    table["row"] = labels_of(table)
    row = table["row"].iloc[0]
    table = table[table["row"] == row]
    looks = _Looks(scores, table)
    with canvas(ax, (COLUMN, 2.3)) as axes:
        for name in dict.fromkeys(table["model"]):
            own = table[table["model"] == name].groupby(by)[["value", "low", "high"]].mean()
            x = own.index.to_numpy(dtype=float)
            style = looks.style(name)
            if own["low"].notna().any():
                axes.fill_between(x, own["low"], own["high"], color=style["color"], alpha=0.2, lw=0)
            axes.plot(x, own["value"], label=name, **style)
        depth = int(table[by].max())
        axes.set_xlim(-0.6, depth + 0.6)
        axes.set_xticks(layer_ticks(np.arange(depth + 1), 13))
        axes.set_xlabel(_DEPTHS[by])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        _percent(axes, "y", table, prefix=row)
        looks.legend(axes)
    return axes


@dataclass(frozen=True)
class _Point:
    value: float
    low: float
    high: float


class _Looks:
    """Colours and markers of models: those of the comparison, or in order."""

    def __init__(self, scores: Comparison | Scores, table: pd.DataFrame) -> None:
        self._result = scores if isinstance(scores, Comparison) else None
        names = list(dict.fromkeys(table["model"]))
        if self._result is not None:
            names = [name for name in self._result.models if name in names]
        self._names = names

    @property
    def kinds(self) -> list[str]:
        """Groups of seeds, and models of none."""
        if self._result is None:
            return self._names
        return list(dict.fromkeys(kind_of(self._result, name) for name in self._names))

    def members(self, kind: str) -> list[str]:
        if self._result is None:
            return [kind]
        return [name for name in self._names if kind_of(self._result, name) == kind]

    def trained(self, kind: str) -> bool:
        """Whether it is no untrained twin of another model."""
        return self._result is None or self.members(kind)[0] in subjects(self._result)

    def style(self, kind: str) -> dict[str, Any]:
        if self._result is not None:
            return look(self._result, self.members(kind)[0] if kind in self.kinds else kind)
        place = self._names.index(kind)
        marker = MARKERS[place % len(MARKERS)]
        return {"color": COLORS[place % len(COLORS)], "marker": marker, "markeredgewidth": 0}

    def legend(self, ax: Axes) -> None:
        if self._result is not None:
            legend_above(ax, self._result, self._names)
            return
        handles = [Line2D([], [], **self.style(name)) for name in self._names]
        labels = [shorten(name, 24 if len(handles) < 4 else 17) for name in self._names]
        columns = max(1, min(len(labels), 44 // (max(map(len, labels)) + 4)))
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns)


def _read(scores: Comparison | Scores, protocols: Sequence[str]) -> pd.DataFrame:
    table = scores.scores if isinstance(scores, Comparison) else scores.to_dataframe()
    known = list(dict.fromkeys(table["protocol"]))
    for name in protocols:
        if name not in known:
            raise ResultError(
                f"no scores by '{name}'; there are some by {', '.join(known) or 'nothing'}."
                f"{suggest(name, known)}"
            )
    order = list(protocols) or known
    return pd.concat([table[table["protocol"] == name] for name in order]) if order else table


def labels_of(table: pd.DataFrame) -> list[str]:
    """Of each score its row in a figure: the protocol, and what else those of a model differ in."""
    several = [name for name in ("dataset", "metric") if table[name].nunique() > 1]
    made = []
    for row, settings in zip(table.to_dict("records"), asked_for(table), strict=True):
        parts = [_PROTOCOLS.get(row["protocol"], str(row["protocol"]).capitalize())]
        parts += [str(row["dataset"])] if "dataset" in several else []
        parts += [_METRICS.get(row["metric"], row["metric"]).lower()] if "metric" in several else []
        parts += [f"{100 * row['labels']:.3g} % of labels"] if row["labels"] < 1 else []
        parts += [f"{key} = {value}" for key, value in json.loads(settings).items()]
        made.append(", ".join(parts))
    return made


def _points(rows: pd.DataFrame, members: Sequence[str]) -> Iterator[_Point]:
    """The point of a group of seeds, or of a model; nothing where it has no such score."""
    own = rows[rows["model"].isin(members)]
    if len(members) > 1 and own["model"].nunique() > 1:
        found = t_interval(own.groupby("model", sort=False)["value"].mean())
        yield _Point(float(found.value), float(found.low), float(found.high))
    elif len(own):
        mean = own[["value", "low", "high"]].mean()
        yield _Point(*map(float, mean))


def _width(table: pd.DataFrame, row: str, looks: _Looks) -> int:
    """How many points a row has."""
    return len({kind for kind in looks.kinds for name in looks.members(kind)
                if ((table["row"] == row) & (table["model"] == name)).any()})  # fmt: skip


def _percent(ax: Axes, axis: Literal["x", "y"], table: pd.DataFrame, prefix: str = "") -> None:
    """Label an axis of shares of 1 in percent."""
    metrics = [_METRICS.get(name, name) for name in dict.fromkeys(table["metric"])]
    title = f"{' or '.join(metrics)} (%)"
    title = f"{prefix}: {title[0].lower()}{title[1:]}" if prefix else title
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    chosen.set_major_formatter(lambda value, _: f"{100 * value:.4g}")
    (ax.set_xlabel if axis == "x" else ax.set_ylabel)(title)
    if axis == "x":
        ax.grid(axis="x", color=GRID, linewidth=0.5)
        ax.margins(x=0.04)
        ax.tick_params(axis="x", color=MUTED)
