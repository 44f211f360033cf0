"""What similarity between layers shows, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.differences import rows_of
from vitprobe.plots.similarity import below_floor
from vitprobe.plots.style import subjects
from vitprobe.report.findings.models import shown
from vitprobe.report.words import LEVEL, amount, bracket, count, percent, two_digits
from vitprobe.tables import mean_similarity
from vitprobe.wording import join, layers_in_words

if TYPE_CHECKING:
    import xarray as xr

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

# A sentence of more models is no summary.
_MOST_LISTED = 4

DOMINANT = 0.5
"""Share of variance from which one direction is said to dominate a layer's CKA."""


def similarity(result: Comparison, a: str, b: str) -> list[str]:
    """What the CKA of two models, or of a model with itself, shows: extremes, mean, gaps, floor."""
    floor = floors(result, "cka", [(a, b)])
    if a == b:
        return _self_similarity(result, a) + floor
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
            *floor,
        ]
    (rows, columns), value = _blocks(most), _value(result, a, b, most)
    if rows:
        highest = f"{rows} of {a} and {columns} of {b}"
        highest = f"{highest[0].upper()}{highest[1:]} are most alike (CKA {value})"
    else:
        highest = f"{len(most)} layer pairs of {a} and {b} are most alike (CKA {value})"
    (rows, columns), value = _blocks(least), _value(result, a, b, least)
    if len(least) == 1:
        lowest = f"layer {least[0][1]} of {a} and layer {least[0][2]} of {b} least ({value})"
    elif rows:
        lowest = f"{rows} of {a} and {columns} of {b} least ({value})"
    else:
        lowest = f"{len(least)} layer pairs least ({value})"
    return [
        f"{highest}, {lowest}.",
        *at_equal_depth(result, a, b),
        f"The mean over {len(cells)} layer pairs is {mean_with_interval(result, 'cka', a, b)}.",
        *_undefined(cka),
        *floor,
    ]


def at_equal_depth(result: Comparison, a: str, b: str) -> list[str]:
    """Which layers differ most of those at equal depth, as `Comparison.most_different` has it."""
    found = result.equal_depth("cka", a, b).dropna("layer", subset=["value"])
    texts = [two_digits(value) for value in found["value"].values]
    if len(set(texts)) < 2:
        return []
    at = int(np.argmin(found["value"].values))
    least = found.isel(layer=[i for i, text in enumerate(texts) if text == texts[at]])
    if least.sizes["layer"] > 1:
        which = f"{layers_in_words(least['layer'].values)} of {a} differ most from those of {b}"
        return [f"At equal depth, {which} (each {texts[at]})."]
    row, column = int(least["layer"][0]), int(least["layer_b"][0])
    value = with_interval(result, a, b, float(least["value"][0]), row, column)
    return [f"At equal depth, layer {row} of {a} and layer {column} of {b} differ most ({value})."]


def floors(result: Comparison, measure: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """How many cells do not exceed their floor, and what the dots and bracket of a figure mean."""
    cells = [(result.similarity(measure, a, b), result.floor(measure, a, b)) for a, b in pairs]
    judged = sum(int((value.notnull() & floor.notnull()).sum()) for value, floor in cells)
    if not judged:
        return []
    dotted = sum(int(below_floor(value, floor).sum()) for value, floor in cells)
    what = "(bracket at the colour bar) is what shuffling the images of one side reaches."
    if not dotted:
        return [f"Every cell exceeds its floor. The floor {what}"]
    which = "All" if dotted == judged else f"{dotted} of"
    verb = (
        "does not exceed its floor and is" if dotted == 1 else "do not exceed their floor and are"
    )
    return [f"{which} {judged} cells {verb} dotted. The floor {what}"]


def widths(result: Comparison, measure: str, a: str, b: str) -> str:
    """How wide the intervals of a pair are, for the figure of their widths."""
    low, high = result.interval(measure, a, b)
    width = (high - low).values
    finite = width[np.isfinite(width)]
    if not finite.size:
        return "No cell has an interval."
    return (
        f"Width of the {LEVEL} interval of each cell over images, one cell at a time: "
        f"{amount(float(np.median(finite)), '')} in the middle, "
        f"{amount(float(finite.max()), '')} at most."
    )


def is_defined(result: Comparison, measure: str, names: Sequence[str]) -> bool:
    """Whether a measure has a value for any layers or heads of these models."""
    if result.group_of(measure) != "similarity":
        return bool(set(result.measured(measure)) & set(names))
    values = (result.similarity(measure, a, b) for a in names for b in names)
    return any(bool(value.notnull().any()) for value in values)


def grid(result: Comparison, measure: str, names: Sequence[str]) -> list[str]:
    """What a similarity measure of these models shows over all layer pairs."""
    info = MEASURES[measure]
    pairs = list(combinations(names, 2)) or [(names[0], names[0])]
    blocks = {pair: result.similarity(measure, *pair) for pair in pairs}
    # Means over other cells have no common order.
    whole = all(bool(block.notnull().all()) for block in blocks.values())
    means = {pair: float(block.mean()) for pair, block in blocks.items()} if whole else {}
    sentences = [f"{info.title}. {info.what}"]
    if len(means) == 1:
        (((a, b), mean),) = means.items()
        which = f"within {a}" if a == b else f"of {a} and {b}"
        sentences.append(f"The mean over all layer pairs {which} is {two_digits(mean)}.")
    elif means:
        most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        sentences.append(
            f"The mean over layer pairs runs from {two_digits(means[least])} ({join(least)}) to "
            f"{two_digits(means[most])} ({join(most)})."
        )
    drawn = [(a, b) for i, b in enumerate(names) for a in names[i:]]
    images = result.similarity(measure, names[0], names[0]).attrs["images"]
    missing = sum(int(result.similarity(measure, *pair).isnull().sum()) for pair in drawn)
    if missing:
        verb = "is" if missing == 1 else "are"
        sentences.append(
            f"{count(missing, 'cell')} {verb} undefined and hatched: the notes say why."
        )
    return [
        *sentences,
        *floors(result, measure, drawn),
        f"On {count(images, 'image')}; the {LEVEL} interval of every cell is in the table.",
    ]


def mean_by_pair(result: Comparison, measure: str) -> str:
    """The mean of a similarity measure over layer pairs, of every two models."""
    names = subjects(result)
    parts = []
    for a, b in list(combinations(names, 2)) or [(names[0], names[0])]:
        value = result.similarity(measure, a, b)
        cells = _cells(value)
        mean = mean_with_interval(result, measure, a, b) if cells else "undefined"
        where = f"within {a}" if a == b else f"for {a} and {b}"
        some = f" (over {len(cells)} of {value.size})" if 0 < len(cells) < value.size else ""
        parts.append(f"{mean} {where}{some}")
    listed = join(parts) if len(parts) <= 6 else f"{', '.join(parts[:6])}, …"
    return f"{MEASURES[measure].title}, mean over layer pairs: {listed}."


def overall_similarity(result: Comparison, lists: Lists) -> str:
    """Which two models are most and least alike at equal depth; one model: its own layers.

    Of two models the layer pairs that are.
    """
    names = subjects(result)
    if len(names) == 1:
        return _self_similarity(result, names[0])[0]
    if len(names) == 2:
        a, b = names
        sentences = [similarity(result, a, b)[0], *at_equal_depth(result, a, b)]
        return " ".join(sentences) + _untrained(result, [(a, b)])
    # The numbers of the map of models: over all layer pairs, other models may be the most alike.
    table = lists.models
    rows = [] if table is None else list(rows_of(table[table["similarity"].notna()]))
    texts = {(row.model_a, row.model_b): two_digits(row.similarity) for row in rows}
    if not texts:
        return "CKA is undefined for every pair of models."
    values = [row.similarity for row in rows]
    high, low = (two_digits(choose(values)) for choose in (max, min))
    most, least = ([pair for pair, text in texts.items() if text == end] for end in (high, low))
    ends = {(row.model_a, row.model_b): (row.similarity, row.low, row.high) for row in rows}
    if len(most) == 1:
        high = bracket(*ends[most[0]], least=2)
    if len(least) == 1:
        low = bracket(*ends[least[0]], least=2)
    caution = _untrained(result, most)
    if most == least:
        return f"All pairs of models are equally alike: mean CKA at equal depth {high}.{caution}"
    highest = (
        f"{join(most[0])} are the most alike pair of models"
        if len(most) == 1
        else f"{len(most)} pairs of models are most alike"
    )
    lowest = join(least[0]) if len(least) == 1 else f"{len(least)} pairs"
    return f"At equal depth, {highest} (mean CKA {high}) and {lowest} the least ({low}).{caution}"


def last_layers(result: Comparison) -> list[str]:
    """The CKA of the last layers of every two models, for up to six pairs; else the extremes."""
    found = []
    for a, b in combinations(subjects(result), 2):
        cka = result.cka(a, b)
        row, column = cka.sizes["layer_a"] - 1, cka.sizes["layer_b"] - 1
        value = float(cka[row, column])
        if np.isfinite(value):
            found.append(
                (value, f"{with_interval(result, a, b, value, row, column)} for {a} and {b}")
            )
    if not found:
        return []
    found.sort(key=lambda item: -item[0])
    if len(found) > 6:
        return [f"CKA of the last layers runs from {found[-1][1]} to {found[0][1]}."]
    return [f"CKA of the last layers is {join([text for _, text in found])}."]


def dominance(result: Comparison) -> list[str]:
    """Layers in which one direction holds more than `DOMINANT` of the variance."""
    parts, tops = [], {}
    for name in shown(result):
        share = result.first_direction_share(name)
        held = share[share.values > DOMINANT]
        if held.sizes["layer"]:
            peaks, value = peaks_of(held)
            alike = len(peaks) == held.sizes["layer"]
            top = value if alike else f"up to {value} in {layers_in_words(peaks)}"
            parts.append(f"{layers_in_words(held['layer'].values)} of {name} ({top})")
            tops[name] = float(held.max())
    if not parts:
        return []
    where = join(parts)
    if len(parts) > _MOST_LISTED:
        name = max(tops, key=tops.__getitem__)
        where = (
            f"some layers of {len(parts)} of {len(shown(result))} models (up to "
            f"{percent(tops[name])} in {name})"
        )
    return [
        f"One direction holds more than half of the variance of {where}: CKA there mostly compares "
        "that direction."
    ]


def largest_share(result: Comparison) -> str:
    """Where one direction holds the largest share of a layer's variance."""
    tops = []
    for name in shown(result):
        share = result.first_direction_share(name)
        if share.notnull().any():
            peaks, value = peaks_of(share)
            alike = len(peaks) == int(share.notnull().sum()) > 1
            where = "every layer" if alike else layers_in_words(peaks)
            tops.append(f"{name} {value} in {where}")
    return f"Largest share by model: {join(tops)}." if tops else "Undefined in every layer."


def mean_with_interval(result: Comparison, measure: str, a: str, b: str) -> str:
    """The mean over layer pairs, with the interval that is too wide rather than too narrow."""
    return bracket(*mean_similarity(result, measure, a, b), least=2)


def with_interval(result: Comparison, a: str, b: str, value: float, row: int, column: int) -> str:
    low, high = (float(end[row, column]) for end in result.interval("cka", a, b))
    return bracket(value, low, high, least=2)


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


def peaks_of(by_layer: xr.DataArray) -> tuple[list[int], str]:
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
    return with_interval(result, a, b, value, row, column)


def _mean(cells: Sequence[tuple[float, int, int]]) -> float:
    return float(np.mean([value for value, _, _ in cells]))


def _is_untrained(model: dict[str, Any]) -> bool:
    trained_for = (model["training"] or {}).get("epochs")
    return model["spec"].startswith("init:") or trained_for == 0
