"""Similarity, attention and accuracy of all models along one axis of depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np

from vitprobe.errors import ResultError
from vitprobe.measures.registry import MEASURES
from vitprobe.plots.accuracy_panels import probed
from vitprobe.plots.style import (
    GRID,
    PAGE,
    attention_noun,
    axis_label,
    fit,
    layer_ticks,
    legend_above,
    look,
    measured,
    shorten,
    style,
    subjects,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison

ATTENTION = ("attention_distance", "attention_entropy")


@dataclass(frozen=True)
class Line:
    """A quantity of one model along its depth."""

    name: str
    layers: tuple[int, ...]
    """Layers, or attention layers, as numbered everywhere."""
    x: np.ndarray
    """Where they lie on the axis."""
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Panel:
    """One quantity of all models."""

    kind: Literal["similarity", "attention", "accuracy"]
    label: str
    units: str
    of: str
    """What is numbered: `layer`, `block` or `attention layer`."""
    lines: tuple[Line, ...]


def depth_view(result: Comparison, reference: str | None = None) -> Figure:
    """Draw how models change with depth: panels that share one axis, a line a model.

    From above, of what the result holds: CKA of each layer with the layer of `reference` nearest
    to the same share of depth; attention distance and attention entropy (mean over heads and
    images); accuracy of probes of each layer, where the result has such scores. Bands are 95 %
    intervals, layer by layer (pointwise). The axis counts layers where all models are equally deep,
    else it is the share of depth; block b stands at layer b, which its attention reads.

    reference: the first model unless given.

    Raises:
        ResultError: no such model, or the result holds nothing that depends on depth.
    """
    panels = panels_of(result, reference)
    if not panels:
        raise ResultError("this result holds nothing to draw along depth")
    deepest = depths(result)
    with style():
        figure, axes = plt.subplots(
            len(panels), 1, sharex=True, squeeze=False, figsize=(PAGE, 0.5 + 1.1 * len(panels))
        )
        for ax, panel in zip(axes[:, 0], panels, strict=True):
            ends = []
            for line in panel.lines:
                options = look(result, line.name)
                if np.isfinite(line.low).any():
                    ax.fill_between(
                        line.x, line.low, line.high, color=options["color"], alpha=0.25, linewidth=0
                    )
                ax.plot(line.x, line.value, **options)
                ends += [line.value, line.low, line.high]
            ax.set_ylim(fit(ends, from_zero=False))
            # A panel is too low for longer lines, which would reach into its neighbours.
            ax.set_ylabel(axis_label(panel.label, panel.units, 20))
            ax.grid(axis="y", color=GRID, linewidth=0.5)
            ax.tick_params(axis="x", length=0)
        last = axes[-1, 0]
        if len(deepest) == 1:
            (most,) = deepest
            last.set_xlim(-0.4, most + 0.4)
            last.set_xticks(layer_ticks(np.arange(most + 1), 13))
            last.set_xlabel("Layer; a block at the layer that it reads")
        else:
            last.set_xlim(-0.03, 1.03)
            last.set_xlabel("Depth (share of the model's blocks)")
        figure.align_ylabels(axes[:, 0])
        drawn = {line.name for panel in panels for line in panel.lines}
        legend_above(axes[0, 0], result, [name for name in result.models if name in drawn])
    return figure


def panels_of(result: Comparison, reference: str | None = None) -> list[Panel]:
    """What `depth_view` draws, from above."""
    names = subjects(result)
    reference = names[0] if reference is None else reference
    panels = []
    if "cka" in result.measures:
        twin = result.references.get(reference)
        others = [name for name in names if name != reference] or ([twin] if twin else [])
        lines = [_similarity(result, name, reference) for name in others]
        if lines:
            label = f"CKA with {shorten(reference, 18)}"
            panels.append(Panel("similarity", label, "1", "layer", tuple(lines)))
    else:
        result.describe(reference)
    for measure in ATTENTION:
        if measure in result.measures and (having := measured(result, measure, names)):
            relative = result.needs_relative(measure, having)
            tables = {name: result.by_layer(measure, name, relative=relative) for name in having}
            lines = [
                Line(
                    name,
                    tuple(int(i) for i in table["layer"].values),
                    _attention_x(result, name),
                    *(table[key].values for key in ("value", "low", "high")),
                )
                for name, table in tables.items()
            ]
            units = tables[having[0]].attrs["units"]
            noun = attention_noun(result, having)
            title = MEASURES[measure].title
            panels.append(Panel("attention", title, units, noun, tuple(lines)))
    return [*panels, *_accuracy(result)]


def depths(result: Comparison) -> set[int]:
    """How many blocks the models have, each number once."""
    return {_depth(result, name) for name in subjects(result)}


def _depth(result: Comparison, name: str) -> int:
    if "cka" in result.measures:
        return int(np.sum(result.tree["similarity"]["model_a"].values == name)) - 1
    depth = result.describe(name)["facts"]["depth"]["value"]
    return int(np.sum(depth)) if depth else len(result.attention_layers(name))


def _x(result: Comparison, name: str, layers: np.ndarray) -> np.ndarray:
    if len(depths(result)) == 1:
        return layers.astype(float)
    return layers / max(_depth(result, name), 1)


def _attention_x(result: Comparison, name: str) -> np.ndarray:
    """Where attention layers lie: at their blocks, or evenly where they have none."""
    layers = result.attention_layers(name)
    blocks = [layer["block"] for layer in layers]
    if any(block is None for block in blocks):
        return _x(result, name, np.arange(len(layers)) / len(layers) * _depth(result, name))
    return _x(result, name, np.array(blocks, float))


def _similarity(result: Comparison, name: str, reference: str) -> Line:
    """CKA of the layers of a model with those of the reference nearest in share of depth."""
    cells = result.cka(name, reference)
    rows = np.arange(cells.sizes["layer_a"])
    last = cells.sizes["layer_b"] - 1
    columns = np.rint(rows / max(rows[-1], 1) * last).astype(int)
    ends = result.interval("cka", name, reference)
    value, low, high = (array.values[rows, columns] for array in (cells, *ends))
    layers = cells["layer_a"].values
    return Line(name, tuple(int(i) for i in layers), _x(result, name, layers), value, low, high)


def _accuracy(result: Comparison) -> list[Panel]:
    """Accuracy of probes of layers: of the protocol and data that most layers were probed with."""
    found = probed(result)
    if found is None:
        return []
    title, units, table = found
    lines = []
    for name, rows in table.groupby("model", sort=False):
        # Several seeds of an evaluation are averaged, and their intervals with them.
        means = rows.groupby("layer", sort=True)[["value", "low", "high"]].mean()
        layers = means.index.to_numpy(int)
        numbers = (means[end].to_numpy(float) for end in ("value", "low", "high"))
        lines.append(
            Line(str(name), tuple(map(int, layers)), _x(result, str(name), layers), *numbers)
        )
    return [Panel("accuracy", shorten(title, 44), units, "layer", tuple(lines))]
