"""What a result shows, in sentences computed from its numbers.

Pure functions from a `Comparison` to sentences: no number is judged by a threshold that the
sentence does not state, and "cannot be told apart" always means that the 95 % interval of a paired
difference contains 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from vitprobe.plots.attention import needs_relative
from vitprobe.report.words import (
    LEVEL,
    count,
    join,
    layers_in_words,
    percent,
    quantity,
    show,
    two_digits,
)

if TYPE_CHECKING:
    import xarray as xr

    from vitprobe.results import Comparison

DOMINANT = 0.5
"""Share of variance from which one direction is said to dominate a layer's CKA."""

_NORMAL_95 = 1.959964
_TIE = 1e-9


def summary(result: Comparison) -> list[tuple[str, str]]:
    """The findings to read first, as (topic, sentence)."""
    findings = []
    if "cka" in result.measures:
        findings.append(("Similarity", overall_similarity(result)))
        findings += [("Last layers", sentence) for sentence in last_layers(result)]
    if "attention_distance" in result.measures:
        findings.append(("Locality", locality(result)))
    if "attention_entropy" in result.measures:
        findings.append(("Focus", focus(result)))
    if "sink_mass" in result.measures:
        findings.append(("Sinks", sinks(result)))
    if "cka" in result.measures:
        findings += [("One direction", sentence) for sentence in dominance(result)]
    return findings


def similarity(result: Comparison, a: str, b: str) -> list[str]:
    """What the CKA of two models, or of a model with itself, shows: extremes, mean, gaps."""
    if a == b:
        return _self_similarity(result, a)
    cka = result.cka(a, b)
    cells = _cells(cka)
    if not cells:
        return [f"CKA is undefined for every layer pair of {a} and {b}."]
    (most, ties_above), (least, ties_below) = _extreme(cells, max), _extreme(cells, min)
    if most[0] - least[0] < _TIE:
        value = two_digits(most[0])
        return [f"All {len(cells)} layer pairs of {a} and {b} have CKA {value}.", *_undefined(cka)]
    return [
        f"Layer {most[1]} of {a} and layer {most[2]} of {b} are most alike "
        f"(CKA {_with_interval(result, a, b, *most)}{ties_above}), layers {least[1]} and "
        f"{least[2]} least ({_with_interval(result, a, b, *least)}{ties_below}).",
        f"The mean over {len(cells)} layer pairs is {two_digits(_mean(cells))}.",
        *_undefined(cka),
    ]


def overall_similarity(result: Comparison) -> str:
    """Which two models are most and least alike over all layer pairs; one model: its own layers."""
    if len(result.models) == 1:
        return _self_similarity(result, result.models[0])[0]
    pairs = list(combinations(result.models, 2))
    if len(pairs) == 1:
        return similarity(result, *pairs[0])[0]
    means = [(_mean(cells), pair) for pair in pairs if (cells := _cells(result.cka(*pair)))]
    if not means:
        return "CKA is undefined for every pair of models."
    (high, most), (low, least) = max(means), min(means)
    if high - low < _TIE:
        return (
            f"All pairs of models are equally alike: mean CKA over layer pairs {two_digits(high)}."
        )
    return (
        f"Over all layers, {join(most)} are the most alike pair of models (mean CKA "
        f"{two_digits(high)}) and {join(least)} the least ({two_digits(low)})."
    )


def last_layers(result: Comparison) -> list[str]:
    """The CKA of the last layers of every two models, for up to six pairs; else the extremes."""
    found = []
    for a, b in combinations(result.models, 2):
        cka = result.cka(a, b)
        row, column = cka.sizes["layer_a"] - 1, cka.sizes["layer_b"] - 1
        value = float(cka[row, column])
        if np.isfinite(value):
            found.append(
                (value, f"{_with_interval(result, a, b, value, row, column)} for {a} and {b}")
            )
    if not found:
        return []
    found.sort(key=lambda item: -item[0])
    if len(found) > 6:
        return [f"CKA of the last layers runs from {found[-1][1]} to {found[0][1]}."]
    return [f"CKA of the last layers is {join([text for _, text in found])}."]


def dominance(result: Comparison) -> list[str]:
    """Layers in which one direction holds more than `DOMINANT` of the variance."""
    sentences = []
    for name in result.models:
        share = result.first_direction_share(name)
        layers = share["layer"].values[share.values > DOMINANT]
        if len(layers):
            layer, value = _peak(share)
            sentences.append(
                f"In {name}, one direction holds more than half of the variance of "
                f"{layers_in_words(layers)} (up to {percent(value)} in layer {layer}): CKA there "
                "mostly compares that direction."
            )
    return sentences


def largest_share(result: Comparison) -> str:
    """Where one direction holds the largest share of a layer's variance."""
    tops = []
    for name in result.models:
        share = result.first_direction_share(name)
        if share.notnull().any():
            layer, value = _peak(share)
            tops.append(f"{name} {percent(value)} in layer {layer}")
    return f"Largest share by model: {join(tops)}." if tops else "Undefined in every layer."


def locality(result: Comparison) -> str:
    """Which model attends most locally in the first quarter of its blocks."""
    firsts = {name: _first_blocks(result, name) for name in result.models}
    blocks = {name: slice(first) for name, first in firsts.items()}
    if len(set(firsts.values())) == 1:
        where = f"In the first {count(firsts[result.models[0]], 'block')}"
    else:
        where = "In the first quarter of their blocks"
    return _ranking(
        result,
        "attention_distance",
        blocks,
        where,
        superlative="attends most locally",
        equally="attend equally locally",
        noun="mean attention distance",
    )


def focus(result: Comparison) -> str:
    """Which model spreads its attention over the fewest patches, over all blocks."""
    return _ranking(
        result,
        "attention_entropy",
        {name: slice(None) for name in result.models},
        "Over all blocks",
        superlative="attends most narrowly",
        equally="attend equally narrowly",
        noun="mean attention entropy",
    )


def trend(result: Comparison, measure: str, name: str) -> str:
    """How a measure moves from a model's first block to its last, and its extreme head."""
    values = result.attention(measure, name)
    by_block = values.mean("head")
    blocks = values["layer"].values[np.isfinite(by_block.values)]
    noun = str(values.attrs["long_name"]).lower()
    if not len(blocks):
        return f"{name}: {noun} is undefined in every block."
    first, last = (float(by_block.sel(layer=block)) for block in (blocks[0], blocks[-1]))
    units = values.attrs["units"]
    # Local and narrow heads are the remarkable ones, but of sinks the strongest.
    superlative, extreme = (
        ("highest", values.max()) if units == "share" else ("lowest", values.min())
    )
    row, column = np.argwhere(values.values == float(extreme))[0]
    head = f"head {int(values['head'][column])} of block {int(values['layer'][row])}"
    verb = _verb(first, last, scale=float(np.nanmax(np.abs(values.values))))
    if len(blocks) == 1:
        move = f"{name}: {noun} is {quantity(first, units)} in block {int(blocks[0])}"
    elif verb == "stays":
        move = (
            f"{name}: {noun} stays near {quantity(first, units)} from block {int(blocks[0])} to "
            f"block {int(blocks[-1])}"
        )
    else:
        move = (
            f"{name}: {noun} {verb} from {quantity(first, units)} in block {int(blocks[0])} to "
            f"{quantity(last, units)} in block {int(blocks[-1])}"
        )
    return f"{move}; the {superlative} head is {head} ({quantity(float(extreme), units)})."


def sinks(result: Comparison) -> str:
    """How much attention prefix tokens draw, where most."""
    parts = []
    for name in result.models:
        if result.describe(name)["facts"]["prefix_tokens"]["value"] == 0:
            parts.append(f"{name} has no prefix tokens")
            continue
        by_block = result.sink_mass(name).mean("head")
        if not np.isfinite(by_block.values).any():
            parts.append(f"it is undefined for {name}")
            continue
        block, value = _peak(by_block)
        parts.append(
            f"{percent(by_block.mean())} in {name} (most in block {block}, {percent(value)})"
        )
    return f"Share of patch attention that goes to prefix tokens: {'; '.join(parts)}."


def assumptions(result: Comparison) -> list[str]:
    """Every architectural fact that was assumed rather than read, model by model."""
    sentences = []
    for name in result.models:
        description = result.describe(name)
        facts = [
            f"{key.replace('_', ' ')} ({show(description['facts'][key]['value'])})"
            for key in description["assumed"]
        ]
        if facts:
            verb = "is" if len(facts) == 1 else "are"
            sentences.append(f"{name}: {join(facts)} {verb} assumed, not read from the source.")
    return sentences


def _self_similarity(result: Comparison, name: str) -> list[str]:
    cka = result.cka(name, name)
    cells = [cell for cell in _cells(cka) if cell[1] < cell[2]]
    if not cells:
        return [f"{name} has no two layers whose CKA is defined."]
    least, ties = _extreme(cells, min)
    sentences = [
        f"Within {name}, layers {least[1]} and {least[2]} are least alike "
        f"(CKA {_with_interval(result, name, name, *least)}{ties})."
    ]
    steps = [cell for cell in cells if cell[2] == cell[1] + 1]
    if len(steps) > 1 and max(steps)[0] - min(steps)[0] > _TIE:
        (value, layer, after), ties = _extreme(steps, min)
        sentences.append(
            f"From one layer to the next, most changes between layers {layer} and {after} "
            f"({_with_interval(result, name, name, value, layer, after)}{ties})."
        )
    return sentences + _undefined(cka)


def _undefined(cka: xr.DataArray) -> list[str]:
    missing = int(cka.isnull().sum())
    if not missing:
        return []
    verb = "is" if missing == 1 else "are"
    return [f"{missing} of {cka.size} layer pairs {verb} undefined and hatched in the figure."]


def _ranking(
    result: Comparison,
    measure: str,
    blocks: dict[str, slice],
    where: str,
    *,
    superlative: str,
    equally: str,
    noun: str,
) -> str:
    """Order models by the mean of a measure over heads and chosen blocks, lowest first."""
    relative = needs_relative(result, measure)
    series = {
        name: result.per_image(measure, name, relative=relative)
        .isel(layer=blocks[name])
        .mean(("layer", "head"))
        .values.astype(float)
        for name in result.models
    }
    units = result.attention(measure, result.models[0], relative=relative).attrs["units"]
    means = {name: _nanmean(values) for name, values in series.items()}
    ranked = sorted((name for name in means if np.isfinite(means[name])), key=means.__getitem__)
    undefined = [name for name in result.models if name not in ranked]
    tail = f" It is undefined for {join(undefined)}." if undefined else ""
    if not ranked:
        return f"{where}, {noun} is undefined for {join(undefined)}."
    best = ranked[0]
    if len(ranked) == 1:
        value = quantity(means[best], units)
        if not relative:
            value += _of_uniform(result, measure, best, means[best])
        return f"{where}, {best} has a {noun} of {value}.{tail}"
    runner = ranked[1]
    difference = series[runner] - series[best]
    difference = difference[np.isfinite(difference)]
    listed = ", ".join(f"{name} {quantity(means[name], units)}" for name in ranked)
    if len(difference) == 1:
        verdict = f"{best} {superlative} on a single image, too few to judge"
    elif not len(difference):
        verdict = f"{best} and {runner} share no image on which both are defined"
    elif np.abs(difference).max() < _TIE * max(abs(means[best]), 1.0):
        tied = [name for name in ranked if means[name] - means[best] < _TIE]
        verdict = f"{join(tied)} {equally}"
    else:
        middle = float(difference.mean())
        margin = float(_NORMAL_95 * difference.std(ddof=1) / np.sqrt(len(difference)))
        interval = f"{quantity(middle - margin, units)} to {quantity(middle + margin, units)}"
        if middle <= margin:
            verdict = (
                f"{best} and {runner} cannot be told apart by these {len(difference)} images "
                f"({LEVEL} interval of the paired difference {interval})"
            )
        else:
            verdict = (
                f"{best} {superlative}, ahead of {runner} by {quantity(middle, units)} ({LEVEL} "
                f"interval {interval}, paired over {len(difference)} images)"
            )
    return f"{where}, {verdict}. {noun[0].upper()}{noun[1:]}: {listed}.{tail}"


def _nanmean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _first_blocks(result: Comparison, name: str) -> int:
    depth = result.attention("attention_distance", name).sizes["layer"]
    return max(1, round(depth / 4))


def _of_uniform(result: Comparison, measure: str, name: str, value: float) -> str:
    ratio = result.attention(measure, name) / result.attention(measure, name, relative=True)
    uniform = float(ratio.median())
    return f" ({percent(value / uniform)} of uniform attention)" if np.isfinite(uniform) else ""


def _peak(by_layer: xr.DataArray) -> tuple[int, float]:
    """The layer of the largest value, and the value."""
    top = int(np.nanargmax(by_layer.values))
    return int(by_layer["layer"].values[top]), float(by_layer.values[top])


def _cells(cka: xr.DataArray) -> list[tuple[float, int, int]]:
    """Defined cells as (value, row, column); row and column are layer numbers, which start at 0."""
    rows, columns = np.nonzero(np.isfinite(cka.values))
    return [(float(cka.values[i, j]), int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _extreme(
    cells: Sequence[tuple[float, int, int]], choose: Callable[[Iterable[float]], float]
) -> tuple[tuple[float, int, int], str]:
    """The first cell of the largest or smallest value, and a remark if others tie with it."""
    value = choose(cell[0] for cell in cells)
    ties = [cell for cell in cells if abs(cell[0] - value) < _TIE]
    others = f", tied with {count(len(ties) - 1, 'other layer pair')}" if len(ties) > 1 else ""
    return ties[0], others


def _mean(cells: Sequence[tuple[float, int, int]]) -> float:
    return float(np.mean([value for value, _, _ in cells]))


def _with_interval(result: Comparison, a: str, b: str, value: float, row: int, column: int) -> str:
    low, high = (float(end[row, column]) for end in result.interval("cka", a, b))
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{two_digits(value)}"
    return f"{two_digits(value)} [{two_digits(low)}, {two_digits(high)}]"


def _verb(first: float, last: float, *, scale: float) -> str:
    if abs(last - first) < 0.01 * scale:
        return "stays"
    return "grows" if last > first else "falls"
