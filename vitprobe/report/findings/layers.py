"""What attention and tokens show layer by layer, in sentences."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from vitprobe.plots.attention import uniform
from vitprobe.plots.differences import UNDECIDED
from vitprobe.plots.style import attention_noun, has_prefix, measured, subjects
from vitprobe.report.findings.models import in_text, patch_layers, shown, windowed
from vitprobe.report.words import LEVEL, bracket, count, digits_of, percent, quantity
from vitprobe.statistics import paired, t_interval
from vitprobe.wording import join, layers_in_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import xarray as xr

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

_TIE = 1e-9
# A sentence of more models is no summary; the table beside it has all of them.
_MOST_LISTED = 4
# Of numbers that are kept in single precision.
_ROUNDING = 1e-6


def locality(result: Comparison) -> str:
    """Which model attends most locally in the first quarter of its attention layers."""
    names = measured(result, "attention_distance", subjects(result))
    noun = attention_noun(result, names)
    firsts = {name: first_blocks(result, name) for name in names}
    blocks = {name: slice(first) for name, first in firsts.items()}
    if len(set(firsts.values())) > 1:
        where = f"In the first quarter of their {noun}s"
    elif firsts[names[0]] == 1:
        where = f"In the first {noun}"
    else:
        where = f"In the first {firsts[names[0]]} {noun}s"
    relative = result.needs_relative("attention_distance", names)
    # A small window is local whatever its heads do, which relative units take out.
    within = " for its reach" if relative and windowed(result, names) else ""
    ranking = _ranking(
        result,
        "attention_distance",
        blocks,
        where,
        superlative=f"attends most locally{within}",
        equally=f"attend equally locally{within}",
        noun="mean attention distance",
    )
    if not within or len({result.input_size(name)[1:] for name in names}) > 1:
        return ranking
    pixels = {name: per_image(result, "attention_distance", name, blocks[name]) for name in names}
    texts = [f"{quantity(float(np.nanmean(v)), 'px')} in {n}" for n, v in pixels.items()]
    return f"{ranking} In pixels, windows and all: {join(texts)}."


def focus(result: Comparison, lists: Lists) -> str:
    """Which model spreads its attention over the fewest patches, over all attention layers."""
    table = lists.differences
    attending = measured(result, "attention_entropy", subjects(result))
    names = tuple(name for name in attending if patch_layers(result, name)) or attending
    others = [name for name in attending if name not in names]
    ranking = _ranking(
        result,
        "attention_entropy",
        {name: slice(None) for name in names},
        f"Over all {attention_noun(result, names)}s",
        superlative="attends most narrowly",
        equally="attend equally narrowly",
        noun="mean attention entropy",
        judged=table[table["measure"] == "attention_entropy"],
    )
    if not others:
        return ranking
    verb = "does" if len(others) == 1 else "do"
    return f"{ranking} {join(others)} {verb} not attend between patches, and so {verb} not compare."


def trend(result: Comparison, measure: str, name: str) -> str:
    """How a measure moves from a model's first block to its last, and its extreme head."""
    relative = result.needs_relative(measure, subjects(result))
    by_block = result.by_layer(measure, name, relative=relative)
    layer = attention_noun(result, (name,))
    noun, units = in_text(measure), by_block.attrs["units"]
    by_block = by_block.where(by_block["value"].notnull(), drop=True)
    blocks = by_block["layer"].values
    if not len(blocks):
        return f"{name}: {noun} is undefined in every {layer}."
    value, low, high = (by_block[key].values for key in ("value", "low", "high"))
    start, end = int(blocks[0]), int(blocks[-1])
    least = digits_of(float(np.ptp(value)), units)
    first, last = (of_layer(by_block.isel(layer=index), units, least) for index in (0, -1))
    if len(blocks) == 1:
        move = f"is {of_layer(by_block.isel(layer=0), units)} in {layer} {start}"
    elif _is_one(value, low, high):
        mean = overall(result, measure, name, relative=relative)
        move = f"stays near its mean of {mean} in every {layer}"
    elif _grows(value, low, high):
        move = f"grows from {first} in {layer} {start} to {last} in {layer} {end}"
    elif _grows(-value, -high, -low):
        move = f"falls from {first} in {layer} {start} to {last} in {layer} {end}"
    else:
        move = f"lies {_range(by_block, units, layer)}"
    extreme = _extreme_head(result, measure, name, relative=relative)
    other = _not_between_patches(result, measure, (name,))
    return f"{name}: {noun} {move}{extreme}.{f' Not between patches: {other}.' if other else ''}"


def token_trend(result: Comparison, measure: str) -> str:
    """A token measure of each model in its first layer and its last."""
    parts = []
    for name in shown(result):
        table = result.by_layer(measure, name)
        units = table.attrs["units"]
        table = table.where(table["value"].notnull(), drop=True)
        if not table.sizes["layer"]:
            parts.append(f"undefined for {name}")
            continue
        ends = [table.isel(layer=index) for index in (0, -1)]
        first, last = (of_layer(end, units) for end in ends)
        layers = [int(end["layer"]) for end in ends]
        parts.append(f"{name}: {first} in layer {layers[0]}, {last} in layer {layers[1]}")
    return f"{'; '.join(parts)}."


def sinks(result: Comparison) -> str:
    """How much attention prefix tokens draw, where most."""
    parts = []
    names = measured(result, "sink_mass", shown(result))
    if len(names) >= _MOST_LISTED:
        return _strongest_sinks(result, names)
    for name in names:
        noun = attention_noun(result, (name,))
        if not has_prefix(result, name):
            parts.append(f"{name} has no prefix tokens, so its sink mass is 0 by construction")
            continue
        by_block = result.by_layer("sink_mass", name)
        by_block = by_block.where(by_block["value"].notnull(), drop=True)
        if not by_block.sizes["layer"]:
            parts.append(f"it is undefined for {name}")
            continue
        if not _is_one(*(by_block[key].values for key in ("value", "low", "high"))):
            where = f", by {noun} {_range(by_block, 'share', noun)}"
        else:
            where = f" (alike in every {noun})" if by_block.sizes["layer"] > 1 else ""
        parts.append(f"{overall(result, 'sink_mass', name)} in {name}{where}")
    return f"Share of patch attention that goes to prefix tokens: {'; '.join(parts)}."


def _strongest_sinks(result: Comparison, names: Sequence[str]) -> str:
    """Of many models, those with the strongest and the weakest sinks."""
    having = [name for name in names if has_prefix(result, name)]
    means = {
        name: float(mean)
        for name in having
        if np.isfinite(mean := t_interval(per_image(result, "sink_mass", name, slice(None))).value)
    }
    without = len(names) - len(having)
    tail = f" {count(without, 'model')} without prefix tokens can have none." if without else ""
    if not means:
        return f"No model here has attention on prefix tokens.{tail}"
    ends = [choose(means, key=means.__getitem__) for choose in (max, min)]
    most, least = (f"{overall(result, 'sink_mass', name)} in {name}" for name in ends)
    return (
        "Share of patch attention that goes to prefix tokens, mean over heads and "
        f"{attention_noun(result, having)}s: from {least} to {most}.{tail}"
    )


def spectrum(result: Comparison, name: str) -> str:
    """How much of the highest frequency each end of a model holds, and what the bands are."""
    curves = result.fourier_curves(name)
    ends = []
    for layer in (0, -1):
        line = curves.isel(layer=layer).dropna("step", subset=["value"])
        if line.sizes["step"]:
            text = of_layer(line.isel(step=-1), "")
            ends.append(f"{text} in layer {int(line['layer'])}")
    band = f"Band: {LEVEL} interval of the mean over images, frequency by frequency (pointwise)."
    return f"{name} at the highest frequency: {join(ends)}. {band}" if ends else "Undefined."


def band_of_overlay(result: Comparison, measure: str) -> str:
    """What line, band and bars of an overlay are."""
    names = measured(result, measure, subjects(result))
    noun = attention_noun(result, names)
    images = count(result.provenance["images"]["count"], "image")
    fused = result.attention(measure, names[0]).sizes["head"] == 1
    line = "Line: mean over images" if fused else "Line: mean over heads and images"
    band = f"band: {LEVEL} interval of that mean over {images}, {noun} by {noun} (pointwise)"
    bars = "" if fused else "; thin bars beside: middle half of the heads, which is no uncertainty"
    other = _not_between_patches(result, measure, names)
    hollow = f" Hollow: not between patches ({other})." if other else ""
    return f"{line}; {band}{bars}.{hollow}{_dashed(result)}"


def _not_between_patches(result: Comparison, measure: str, names: Sequence[str]) -> str:
    """Which attention layers that have a measure are over channels, or of the class token alone."""
    parts = []
    for name in names:
        defined = result.attention(measure, name).notnull().any("head").values
        kinds = [layer["kind"] for layer in result.attention_layers(name)]
        for kind, text in (("channels", "over channels"), ("class token", "of the class token")):
            found = [i for i, other in enumerate(kinds) if other == kind and defined[i]]
            if found:
                parts.append(f"{text} in {layers_in_words(found, 'attention layer')} of {name}")
    return join(parts)


def band_of_tokens(result: Comparison, measure: str) -> str:
    """What line and band of a token measure are."""
    name = subjects(result)[0]
    if not result.by_layer(measure, name)["low"].notnull().any():
        return f"This measure has no interval.{_dashed(result)}"
    if result.is_per_image(measure):
        images = count(result.provenance["images"]["count"], "image")
        what = f"Line: mean over images; band: {LEVEL} interval of that mean over {images}"
    else:
        what = f"Line: value over all images; band: its {LEVEL} interval over images"
    return f"{what}, layer by layer (pointwise).{_dashed(result)}"


def overall(result: Comparison, measure: str, name: str, *, relative: bool = False) -> str:
    """The mean of a measure over heads, layers and images, with its interval over images."""
    found = t_interval(per_image(result, measure, name, slice(None), relative=relative))
    if not np.isfinite(found.value):
        return "undefined"
    units = result.layer_images(measure, name, relative=relative).attrs["units"]
    return bracket(float(found.value), float(found.low), float(found.high), units)


def of_layer(row: xr.Dataset, units: str, least: int = 0) -> str:
    """The number of one layer with its interval, at least to so many decimals."""
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    return bracket(value, low, high, units, least)


def first_blocks(result: Comparison, name: str) -> int:
    """How many attention layers count as a model's first: a quarter, rounded up."""
    return ceil(result.attention("attention_distance", name).sizes["layer"] / 4)


def _dashed(result: Comparison) -> str:
    return " Dashed: untrained twins." if result.references else ""


def _is_one(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether all intervals hold one common value; a number without an interval is its own."""
    low, high = (np.where(np.isfinite(end), end, value) for end in (low, high))
    return bool(np.nanmax(low) - np.nanmin(high) <= _ROUNDING * np.nanmax(np.abs(value)))


def _grows(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether the last interval lies above the first, and none below that of an earlier block."""
    low, high = (np.where(np.isfinite(end), end, value) for end in (low, high))
    return bool(low[-1] > high[0] and (high >= np.maximum.accumulate(low)).all())


def _range(by_block: xr.Dataset, units: str, noun: str) -> str:
    """`between 0.88 % [0.83, 0.92] (block 0) and 1.48 % [1.43, 1.53] (block 3)`."""
    value, low, high = (by_block[key].values for key in ("value", "low", "high"))
    ends = []
    for at in (int(value.argmin()), int(value.argmax())):
        text, same = _as_printed(value, low, high, at, units)
        ends.append(f"{text} ({layers_in_words(by_block['layer'].values[same], noun)})")
    return f"between {' and '.join(ends)}"


def _as_printed(
    value: np.ndarray, low: np.ndarray, high: np.ndarray, at: int, units: str
) -> tuple[str, list[int]]:
    """One of several numbers to the digits that tell their ends apart, and all printed alike.

    Only a number that no other is printed like comes with its interval.
    """
    least = digits_of(float(np.nanmax(value) - np.nanmin(value)), units)

    def text(of: float) -> str:
        return bracket(of, low[at], high[at], units, least).partition(" [")[0]

    same = [i for i, other in enumerate(value) if text(other) == text(value[at])]
    alone = bracket(value[at], low[at], high[at], units, least)
    return alone if len(same) == 1 else text(value[at]), same


def _extreme_head(result: Comparison, measure: str, name: str, *, relative: bool) -> str:
    """The head to look at first, unless it is printed as others are; as the end of a sentence."""
    values = result.attention(measure, name, relative=relative)
    units = values.attrs["units"]
    ends = result.interval(measure, name, relative=relative)
    value, low, high = (array.values.ravel() for array in (values, *ends))
    defined = int(np.isfinite(value).sum())
    if _is_one(value, low, high):
        return "; all heads are alike" if defined > 1 else ""
    # Local and narrow heads are the remarkable ones, but of sinks the strongest.
    superlative, at = (
        ("highest", np.nanargmax(value)) if units == "share" else ("lowest", np.nanargmin(value))
    )
    text, same = _as_printed(value, low, high, int(at), units)
    if len(same) > 1:
        return f"; the {superlative} heads, {len(same)} of {defined}, are at {text}"
    row, column = divmod(int(at), values.sizes["head"])
    head, layer = int(values["head"][column]), int(values["layer"][row])
    noun = attention_noun(result, (name,))
    return f"; the {superlative} head is head {head} of {noun} {layer} ({text})"


def _ranking(
    result: Comparison,
    measure: str,
    blocks: dict[str, slice],
    where: str,
    *,
    superlative: str,
    equally: str,
    noun: str,
    judged: pd.DataFrame | None = None,
) -> str:
    """Order models by the mean of a measure over heads and chosen blocks, lowest first.

    `judged` holds the Holm-corrected verdicts where the sentence is about the same numbers.
    """
    names = tuple(blocks)
    relative = result.needs_relative(measure, names)
    series = {
        name: per_image(result, measure, name, chosen, relative=relative)
        for name, chosen in blocks.items()
    }
    units = result.attention(measure, names[0], relative=relative).attrs["units"]
    estimates = {name: t_interval(values) for name, values in series.items()}
    means = {name: float(estimate.value) for name, estimate in estimates.items()}
    ranked = sorted((name for name in means if np.isfinite(means[name])), key=means.__getitem__)
    texts = {
        name: bracket(means[name], float(estimates[name].low), float(estimates[name].high), units)
        for name in ranked
    }
    undefined = [name for name in names if name not in ranked]
    tail = f" It is undefined for {join(undefined)}." if undefined else ""
    if not ranked:
        return f"{where}, {noun} is undefined for {join(undefined)}."
    best = ranked[0]
    if len(ranked) == 1:
        value = texts[best]
        if not relative:
            value += _of_uniform(result, measure, best, means[best])
        return f"{where}, {best} has a {noun} of {value}.{tail}"
    runner = ranked[1]
    # Dots that stand for a single model would be longer than its number.
    first = ranked if len(ranked) <= _MOST_LISTED + 1 else ranked[:_MOST_LISTED]
    listed = ", ".join(f"{name} {texts[name]}" for name in first)
    if len(first) < len(ranked):
        listed += f", … {ranked[-1]} {texts[ranked[-1]]}"
    difference = series[runner] - series[best]
    difference = difference[np.isfinite(difference)]
    if len(difference) == 1:
        verdict = f"{best} {superlative} on a single image, too few to judge"
    elif not len(difference):
        verdict = f"{best} and {runner} share no image on which both are defined"
    elif np.abs(difference).max() < _TIE * max(abs(means[best]), 1.0):
        tied = [name for name in ranked if means[name] - means[best] < _TIE]
        verdict = f"{join(tied)} {equally}"
    else:
        found = paired(series[runner], series[best])
        text = bracket(float(found.value), float(found.low), float(found.high), units)
        test = f"{LEVEL} interval, paired over {count(len(difference), 'image')}"
        if found.low <= 0 <= found.high:
            verdict = f"{best} and {runner} cannot be told apart: they differ by {text} ({test})"
        elif judged is not None and undecided(judged, best, runner):
            verdict = (
                f"{best} and {runner} cannot be told apart after Holm's correction: they differ "
                f"by {text} ({test})"
            )
        else:
            verdict = f"{best} {superlative}, ahead of {runner} by {text} ({test})"
    return f"{where}, {verdict}. {noun[0].upper()}{noun[1:]}: {listed}.{tail}"


def undecided(table: pd.DataFrame, a: str, b: str) -> bool:
    """Whether a list of differences has two models that cannot be told apart."""
    pair = table["model_a"].isin((a, b)) & table["model_b"].isin((a, b))
    return bool((table[pair]["verdict"] == UNDECIDED).any())


def per_image(
    result: Comparison, measure: str, name: str, blocks: slice, *, relative: bool = False
) -> np.ndarray:
    """The mean over heads, then over some blocks, of every image."""
    images = result.layer_images(measure, name, relative=relative, patches=True)
    return np.asarray(images.isel(layer=blocks).mean("layer").values)


def _of_uniform(result: Comparison, measure: str, name: str, value: float) -> str:
    levels = uniform(result, measure, name)
    # A mean over layers has no one level where layers differ in theirs.
    if not np.isfinite(levels).any() or np.nanmax(levels) > (1 + _ROUNDING) * np.nanmin(levels):
        return ""
    return f" ({percent(value / np.nanmax(levels))} of uniform attention)"
