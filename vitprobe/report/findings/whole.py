"""Models as wholes: the numbers to see first, the map of models, depth, and accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vitprobe.plots.accuracy_panels import by_protocol
from vitprobe.plots.depth import depths, panels_of
from vitprobe.plots.differences import rows_of
from vitprobe.plots.style import attention_noun, measured, subjects
from vitprobe.report.findings.layers import first_blocks, per_image, undecided
from vitprobe.report.findings.models import patch_layers
from vitprobe.report.findings.similarity import mean_with_interval
from vitprobe.report.words import LEVEL, bracket, count
from vitprobe.statistics import paired, t_interval
from vitprobe.wording import join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

_MOST_LISTED = 5


def headline(result: Comparison, lists: Lists) -> list[tuple[str, str, str]]:
    """The numbers to see first, as (what, number, of which model or pair); up to four."""
    found = [*_similarity(result, lists)]
    if "attention_distance" in result.measures:
        names = measured(result, "attention_distance", subjects(result))
        noun = attention_noun(result, names)
        firsts = {name: slice(first_blocks(result, name)) for name in names}
        what = f"Most local attention, first {noun}s"
        found += _least(result, "attention_distance", firsts, what)
    if "attention_entropy" in result.measures:
        names = measured(result, "attention_entropy", subjects(result))
        chosen = {name: slice(None) for name in names if patch_layers(result, name)}
        what = "Narrowest attention, mean entropy"
        table = lists.differences
        judged = table[table["measure"] == "attention_entropy"]
        found += _least(result, "attention_entropy", chosen, what, judged)
    return [*_best(result), *found][:4]


def accuracy(result: Comparison) -> list[str]:
    """What models score, a sentence for each of the first protocols."""
    tables = by_protocol(result)
    sentences = []
    for table in tables[:3]:
        units = str(table.attrs["units"])
        ranked = table.sort_values("value", ascending=False, kind="stable")
        texts = [
            f"{row.model} {bracket(row.value, row.low, row.high, units)}" for row in rows_of(ranked)
        ]
        if len(texts) > _MOST_LISTED:
            texts = [*texts[:3], f"… {texts[-1]}"]
        sentences.append(f"{table.attrs['title']}, {table.attrs['metric']}: {', '.join(texts)}.")
    if rest := len(tables) - len(sentences):
        sentences.append(f"{count(rest, 'other evaluation')} under Accuracy.")
    return sentences


def accuracy_caption(tables: Sequence[pd.DataFrame]) -> list[str]:
    """How the figure of accuracy is read."""
    if not tables:
        return []
    text = f"Point: a model; line: its {LEVEL} interval over test images, of each evaluation alone."
    if any((table["seeds"] > 1).any() for table in tables):
        text += " A model evaluated with several seeds has the mean of its numbers and ends."
    return [text, "Axes do not start at 0. Overlap of two intervals is no test of a difference."]


def map_caption(result: Comparison, table: pd.DataFrame) -> list[str]:
    """How the map of models is read, and which two lie nearest."""
    near, far = (table.iloc[choose(table["distance"])] for choose in (_where_least, _where_most))
    return [
        f"Nearest: {near.model_a} and {near.model_b} (mean CKA at equal depth "
        f"{bracket(near.similarity, near.low, near.high, least=2)}); farthest: {far.model_a} and "
        f"{far.model_b} ({bracket(far.similarity, far.low, far.high, least=2)}).",
        "Left: models joined by average linkage, where the distance of two is the angle "
        "arccos(CKA) averaged over their layers at equal depth. Right: their mean CKA there, in "
        "the same order.",
    ]


def depth_caption(result: Comparison) -> list[str]:
    """How the view along depth is read."""
    names, panels = subjects(result), panels_of(result)
    parts = []
    shown = {panel.kind for panel in panels}
    if "similarity" in shown:
        same = len(depths(result)) == 1
        where = "at the same depth" if same else "nearest in share of depth"
        parts.append(f"CKA of each layer with the layer of {names[0]} {where}")
    if by_layer := [kind for kind in ("attention", "accuracy") if kind in shown]:
        parts.append(f"{join(by_layer)} by layer")
    bands = f"Bands: {LEVEL} intervals over images, layer by layer (pointwise)."
    text = "; ".join(parts)
    return [f"{text[0].upper()}{text[1:]}. {bands}"] if text else [bands]


def _where_least(values: pd.Series) -> int:
    return int(values.to_numpy().argmin())


def _where_most(values: pd.Series) -> int:
    return int(values.to_numpy().argmax())


def _similarity(result: Comparison, lists: Lists) -> list[tuple[str, str, str]]:
    names, table = subjects(result), lists.models
    if table is None or len(names) < 2 or result.groups:
        return []
    if len(names) == 2:
        mean = mean_with_interval(result, "cka", *names)
        found = [("Mean CKA over layer pairs", mean, join(names))]
        last = result.cka(*names).values[-1, -1]
        low, high = (end.values[-1, -1] for end in result.interval("cka", *names))
        if np.isfinite(last):
            found.append(("CKA of the last layers", bracket(last, low, high, least=2), join(names)))
        return found if mean != "nan" else []
    if table["similarity"].isnull().any():
        return []
    found = []
    choices: tuple[tuple[str, Callable[[pd.Series], int]], ...] = (
        ("Most alike, mean CKA at equal depth", _where_most),
        ("Least alike", _where_least),
    )
    for what, choose in choices:
        row = table.iloc[choose(table["similarity"])]
        text = bracket(row.similarity, row.low, row.high, least=2)
        found.append((what, text, f"{row.model_a} and {row.model_b}"))
    return found


def _least(
    result: Comparison,
    measure: str,
    blocks: dict[str, slice],
    what: str,
    judged: pd.DataFrame | None = None,
) -> list[tuple[str, str, str]]:
    """The model with the least of a measure, or both that lead and cannot be told apart.

    `judged` holds the Holm-corrected verdicts where the list of differences has these numbers.
    """
    if len(blocks) < 2 or result.groups:
        return []
    relative = result.needs_relative(measure, tuple(blocks))
    series = {
        name: per_image(result, measure, name, chosen, relative=relative)
        for name, chosen in blocks.items()
    }
    units = result.attention(measure, next(iter(blocks)), relative=relative).attrs["units"]
    means = {name: t_interval(values) for name, values in series.items()}
    ranked = [name for name in means if np.isfinite(means[name].value)]
    ranked.sort(key=lambda name: float(means[name].value))
    if len(ranked) < 2:
        return []
    best, runner = ranked[:2]
    apart = paired(series[runner], series[best])
    found = means[best]
    text = bracket(float(found.value), float(found.low), float(found.high), units)
    told = bool(apart.low > 0) and not (judged is not None and undecided(judged, best, runner))
    return [(what, text, best if told else f"{best}, not told apart from {runner}")]


def _best(result: Comparison) -> list[tuple[str, str, str]]:
    for table in by_protocol(result):
        if len(table) > 1 and table["value"].notna().any():
            row = table.iloc[_where_most(table["value"].fillna(-np.inf))]
            text = bracket(row.value, row.low, row.high, str(table.attrs["units"]))
            return [(f"Highest {table.attrs['metric']}, {table.attrs['title']}", text, row.model)]
    return []
