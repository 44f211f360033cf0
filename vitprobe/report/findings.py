"""What a result shows, in sentences computed from its numbers.

Pure functions from a `Comparison` to sentences: no number is judged by a threshold that the
sentence does not state, and "cannot be told apart" always means that the 95 % interval of a paired
difference contains 0. Where numbers are equal as printed, they are said to be equal, and no extreme
among them is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t

from vitprobe.plots.attention import needs_relative
from vitprobe.report.words import (
    LEVEL,
    NBSP,
    estimate,
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
    most, least = _alike(cells, max), _alike(cells, min)
    if two_digits(most[0][0]) == two_digits(least[0][0]):
        which = f"{len(cells)}{'' if len(cells) == cka.size else ' defined'} layer pairs"
        return [
            f"All {which} of {a} and {b} have CKA {two_digits(_mean(cells))}.",
            *_undefined(cka),
        ]
    (rows, columns), value = _blocks(most), _value(result, a, b, most)
    if rows:
        highest = f"{rows} of {a} and {columns} of {b}"
        highest = f"{highest[0].upper()}{highest[1:]} are most alike (CKA {value})"
    else:
        highest = f"{len(most)} layer pairs of {a} and {b} are most alike (CKA {value})"
    (rows, columns), value = _blocks(least), _value(result, a, b, least)
    if len(least) == 1:
        lowest = f"layers {least[0][1]} and {least[0][2]} least ({value})"
    elif rows:
        lowest = f"{rows} of {a} and {columns} of {b} least ({value})"
    else:
        lowest = f"{len(least)} layer pairs least ({value})"
    return [
        f"{highest}, {lowest}.",
        f"The mean over {len(cells)} layer pairs is {two_digits(_mean(cells))}.",
        *_undefined(cka),
    ]


def overall_similarity(result: Comparison) -> str:
    """Which two models are most and least alike over all layer pairs; one model: its own layers."""
    if len(result.models) == 1:
        return _self_similarity(result, result.models[0])[0]
    pairs = list(combinations(result.models, 2))
    if len(pairs) == 1:
        return similarity(result, *pairs[0])[0] + _untrained(result, pairs)
    means = {pair: _mean(cells) for pair in pairs if (cells := _cells(result.cka(*pair)))}
    if not means:
        return "CKA is undefined for every pair of models."
    high, low = (two_digits(choose(means.values())) for choose in (max, min))
    most = [pair for pair, mean in means.items() if two_digits(mean) == high]
    least = [pair for pair, mean in means.items() if two_digits(mean) == low]
    caution = _untrained(result, most)
    if high == low:
        return f"All pairs of models are equally alike: mean CKA over layer pairs {high}.{caution}"
    highest = (
        f"{join(most[0])} are the most alike pair of models"
        if len(most) == 1
        else f"{len(most)} pairs of models are most alike"
    )
    lowest = join(least[0]) if len(least) == 1 else f"{len(least)} pairs"
    return f"Over all layers, {highest} (mean CKA {high}) and {lowest} the least ({low}).{caution}"


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
        held = share[share.values > DOMINANT]
        if held.sizes["layer"]:
            peaks, value = _peaks(held)
            listed = layers_in_words(held["layer"].values)
            top = (
                value
                if len(peaks) == held.sizes["layer"]
                else f"up to {value} in {layers_in_words(peaks)}"
            )
            sentences.append(
                f"In {name}, one direction holds more than half of the variance of {listed} "
                f"({top}): CKA there mostly compares that direction."
            )
    return sentences


def largest_share(result: Comparison) -> str:
    """Where one direction holds the largest share of a layer's variance."""
    tops = []
    for name in result.models:
        share = result.first_direction_share(name)
        if share.notnull().any():
            peaks, value = _peaks(share)
            alike = len(peaks) == int(share.notnull().sum()) > 1
            where = "every layer" if alike else layers_in_words(peaks)
            tops.append(f"{name} {value} in {where}")
    return f"Largest share by model: {join(tops)}." if tops else "Undefined in every layer."


def locality(result: Comparison) -> str:
    """Which model attends most locally in the first quarter of its blocks."""
    firsts = {name: first_blocks(result, name) for name in result.models}
    blocks = {name: slice(first) for name, first in firsts.items()}
    if len(set(firsts.values())) > 1:
        where = "In the first quarter of their blocks"
    elif firsts[result.models[0]] == 1:
        where = "In the first block"
    else:
        where = f"In the first {firsts[result.models[0]]} blocks"
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
    values = result.attention(measure, name, relative=needs_relative(result, measure))
    by_block = values.mean("head")
    blocks = values["layer"].values[np.isfinite(by_block.values)]
    noun = str(values.attrs["long_name"]).lower()
    if not len(blocks):
        return f"{name}: {noun} is undefined in every block."
    units = values.attrs["units"]
    start, end = (int(blocks[0]), int(blocks[-1]))
    first, last = (float(by_block.sel(layer=block)) for block in (start, end))
    if len(blocks) == 1:
        move = f"{name}: {noun} is {quantity(first, units)} in block {start}"
    elif quantity(first, units) == quantity(last, units):
        move = (
            f"{name}: {noun} stays near {quantity(first, units)} from block {start} to block {end}"
        )
    else:
        move = (
            f"{name}: {noun} {'grows' if last > first else 'falls'} from {quantity(first, units)} "
            f"in block {start} to {quantity(last, units)} in block {end}"
        )
    return f"{move}{_extreme_head(values)}."


def _extreme_head(values: xr.DataArray) -> str:
    """The head to look at first, unless it is printed as others are; as the end of a sentence."""
    units = values.attrs["units"]
    # Local and narrow heads are the remarkable ones, but of sinks the strongest.
    superlative, extreme = (
        ("highest", values.max()) if units == "share" else ("lowest", values.min())
    )
    text = quantity(float(extreme), units)
    found = [
        (row, column)
        for row, column in np.argwhere(np.isfinite(values.values))
        if quantity(float(values.values[row, column]), units) == text
    ]
    defined = int(values.notnull().sum())
    if len(found) == defined:
        return "; all heads are alike" if defined > 1 else ""
    if len(found) > 1:
        return f"; the {superlative} heads, {len(found)} of {defined}, are at {text}"
    row, column = found[0]
    head, block = int(values["head"][column]), int(values["layer"][row])
    return f"; the {superlative} head is head {head} of block {block} ({text})"


def sinks(result: Comparison) -> str:
    """How much attention prefix tokens draw, where most."""
    parts = []
    for name in result.models:
        if not has_prefix(result, name):
            parts.append(f"{name} has no prefix tokens, so its sink mass is 0 by construction")
            continue
        by_block = result.sink_mass(name).mean("head")
        defined = int(by_block.notnull().sum())
        if not defined:
            parts.append(f"it is undefined for {name}")
            continue
        peaks, value = _peaks(by_block)
        if len(peaks) < defined:
            where = f" (most in {layers_in_words(peaks, 'block')}, {value})"
        else:
            where = " (alike in every block)" if defined > 1 else ""
        parts.append(f"{percent(by_block.mean())} in {name}{where}")
    return f"Share of patch attention that goes to prefix tokens: {'; '.join(parts)}."


def has_prefix(result: Comparison, name: str) -> bool:
    """Whether a model has prefix tokens, without which there is no sink."""
    return bool(result.describe(name)["facts"]["prefix_tokens"]["value"])


def assumed_heads(result: Comparison) -> list[tuple[str, int]]:
    """Models whose number of heads was assumed rather than read, with that number."""
    return [
        (name, description["facts"]["heads"]["value"])
        for name in result.models
        if "heads" in (description := result.describe(name))["assumed"]
    ]


def other_assumptions(result: Comparison) -> str:
    """Every other fact that was assumed, model by model, or nothing."""
    parts = []
    for name in result.models:
        description = result.describe(name)
        facts = [
            f"{key.replace('_', ' ')} ({show(description['facts'][key]['value'])})"
            for key in description["assumed"]
            if key != "heads"
        ]
        if facts:
            parts.append(f"{join(facts)} of {name}")
    return f"Assumed, not read: {'; '.join(parts)}." if parts else ""


def _self_similarity(result: Comparison, name: str) -> list[str]:
    cka = result.cka(name, name)
    cells = [cell for cell in _cells(cka) if cell[1] < cell[2]]
    if not cells:
        return [f"{name} has no two layers whose CKA is defined."]
    most, least = _alike(cells, max), _alike(cells, min)
    if len(cells) > 1 and two_digits(most[0][0]) == two_digits(least[0][0]):
        return [
            f"All layers of {name} are alike (CKA {two_digits(_mean(cells))}).",
            *_undefined(cka),
        ]
    value = _value(result, name, name, least)
    if len(least) == 1:
        which = f"layers {least[0][1]} and {least[0][2]} are"
    else:
        which = f"{len(least)} layer pairs are"
    sentences = [f"Within {name}, {which} least alike (CKA {value})."]
    steps = [cell for cell in cells if cell[2] == cell[1] + 1]
    if len(steps) > 1:
        least = _alike(steps, min)
        value = _value(result, name, name, least)
        if len(least) == len(steps):
            sentences.append(f"From one layer to the next, CKA stays near {value}.")
        elif len(least) == 1:
            sentences.append(
                f"From one layer to the next, most changes between layers {least[0][1]} and "
                f"{least[0][2]} ({value})."
            )
        else:
            after = layers_in_words([cell[1] for cell in least])
            sentences.append(
                f"From one layer to the next, most changes after {after} (each {value})."
            )
    return sentences + _undefined(cka)


def _untrained(result: Comparison, pairs: Sequence[tuple[str, str]]) -> str:
    """A caution where a pair of models said to be alike holds one that was never trained."""
    untrained = {name for name in result.models if _is_untrained(result.describe(name))}
    found = [name for name in result.models if any(name in pair for pair in pairs)]
    found = [name for name in found if name in untrained]
    if not found:
        return ""
    return (
        f" {join(found)} {'was' if len(found) == 1 else 'were'} never trained: such a model passes "
        "the image through almost unchanged, so a high CKA with it says how little the other has "
        "moved from its input."
    )


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
        critical = t.ppf(0.975, len(difference) - 1)
        margin = float(critical * difference.std(ddof=1) / np.sqrt(len(difference)))
        ahead, interval, unit = estimate(middle, margin, units)
        if abs(middle) <= margin:
            verdict = (
                f"{best} and {runner} cannot be told apart by these {len(difference)} images "
                f"({LEVEL} interval of the paired difference {interval}{NBSP}{unit})"
            )
        else:
            verdict = (
                f"{best} {superlative}, ahead of {runner} by {ahead}{NBSP}{unit} "
                f"({LEVEL} interval {interval}, paired over {len(difference)} images)"
            )
    return f"{where}, {verdict}. {noun[0].upper()}{noun[1:]}: {listed}.{tail}"


def _nanmean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def first_blocks(result: Comparison, name: str) -> int:
    """How many blocks count as a model's first: a quarter, rounded up."""
    return ceil(result.attention("attention_distance", name).sizes["layer"] / 4)


def _of_uniform(result: Comparison, measure: str, name: str, value: float) -> str:
    ratio = result.attention(measure, name) / result.attention(measure, name, relative=True)
    uniform = float(ratio.median())
    return f" ({percent(value / uniform)} of uniform attention)" if np.isfinite(uniform) else ""


def _peaks(by_layer: xr.DataArray) -> tuple[list[int], str]:
    """The layers that are printed with the largest share, and that share."""
    largest = percent(np.nanmax(by_layer.values))
    pairs = zip(by_layer["layer"].values, by_layer.values, strict=True)
    return [
        int(i) for i, value in pairs if np.isfinite(value) and percent(value) == largest
    ], largest


def _cells(cka: xr.DataArray) -> list[tuple[float, int, int]]:
    """Defined cells as (value, row, column); row and column are layer numbers, which start at 0."""
    rows, columns = np.nonzero(np.isfinite(cka.values))
    return [(float(cka.values[i, j]), int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _alike(
    cells: Sequence[tuple[float, int, int]],
    choose: Callable[[Iterable[tuple[float, int, int]]], tuple[float, int, int]],
) -> list[tuple[float, int, int]]:
    """The cells that are printed as the largest or smallest one is."""
    text = two_digits(choose(cells)[0])
    return [cell for cell in cells if two_digits(cell[0]) == text]


def _blocks(cells: Sequence[tuple[float, int, int]]) -> tuple[str, str]:
    """The rows and columns of cells in words, if every row is paired with every column."""
    rows, columns = sorted({cell[1] for cell in cells}), sorted({cell[2] for cell in cells})
    if len(rows) * len(columns) != len(cells):
        return "", ""
    return layers_in_words(rows), layers_in_words(columns)


def _value(result: Comparison, a: str, b: str, cells: Sequence[tuple[float, int, int]]) -> str:
    """What cells are printed as; a single cell also has its interval."""
    value, row, column = cells[0]
    if len(cells) > 1:
        return two_digits(value)
    return _with_interval(result, a, b, value, row, column)


def _mean(cells: Sequence[tuple[float, int, int]]) -> float:
    return float(np.mean([value for value, _, _ in cells]))


def _with_interval(result: Comparison, a: str, b: str, value: float, row: int, column: int) -> str:
    low, high = (float(end[row, column]) for end in result.interval("cka", a, b))
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{two_digits(value)}"
    return f"{two_digits(value)} [{two_digits(low)}, {two_digits(high)}]"


def _is_untrained(model: dict[str, Any]) -> bool:
    trained_for = (model["training"] or {}).get("epochs")
    return model["spec"].startswith("init:") or trained_for == 0
