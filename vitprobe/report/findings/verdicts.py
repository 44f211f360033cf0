"""Which differences stand, between models over images and between methods over seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.differences import UNDECIDED, rows_of
from vitprobe.plots.style import attention_noun
from vitprobe.report.findings.models import MAIN, in_text, several_seeds, shown
from vitprobe.report.findings.similarity import with_interval
from vitprobe.report.words import LEVEL, bracket, count, of_difference, spread
from vitprobe.statistics import holm
from vitprobe.tables import ONE_SEED
from vitprobe.wording import join, layers_in_words

if TYPE_CHECKING:
    import pandas as pd

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison


_MOST_LISTED = 4
_LEVEL = 0.05
_OVER = "(of means over heads and layers: single layers may differ either way)"


def differences(result: Comparison, table: pd.DataFrame) -> list[str]:
    """How many paired differences stand after Holm's correction, which pairs are undecided, and
    which of these differ both ways along depth."""
    if not len(table):
        return []
    open_ = table[table["verdict"] == UNDECIDED]
    if not len(open_):
        if len(table) == 1:
            return [f"The one paired difference between models holds {_OVER}."]
        return [
            f"All {len(table)} paired differences between models hold after Holm's correction "
            f"{_OVER}."
        ]
    of = count(len(table), "paired difference")
    first = f"{len(table) - len(open_)} of {of} between models hold after Holm's correction {_OVER}"
    both = [text for row in rows_of(open_) if (text := _both_ways(result, row))]
    if len(both) > _MOST_LISTED:
        both = [
            f"In {len(both)} of these {len(open_)}, one model is above the other in some layers "
            "and below it in others."
        ]
    if len(open_) > _MOST_LISTED:
        return [f"{first}; in the other {len(open_)}, the two models cannot be told apart.", *both]
    listed = [
        f"{row.model_a} and {row.model_b} in {in_text(row.measure)}" for row in rows_of(open_)
    ]
    return [f"{first}; {join(listed)} cannot be told apart.", *both]


def _both_ways(result: Comparison, row: Any) -> str:
    """Where one of two models whose means cannot be told apart is above the other, and where below,
    after Holm's correction over layers; empty unless there is both."""
    found = result.difference(row.measure, row.model_a, row.model_b)
    stands = holm(found["p"].values) <= _LEVEL
    above, below = (
        found["layer"].values[stands & (sign * found["value"].values > 0)] for sign in (1, -1)
    )
    if not len(above) or not len(below):
        return ""
    of_layers = result.group_of(row.measure) != "attention"
    noun = "layer" if of_layers else attention_noun(result, (row.model_a, row.model_b))
    return (
        f"Though their means cannot be told apart, {row.model_a} is above {row.model_b} in "
        f"{in_text(row.measure)} in {layers_in_words(above, noun)} and below in "
        f"{layers_in_words(below, noun)}."
    )


def beyond_untrained(result: Comparison, lists: Lists) -> list[str]:
    """How each model differs from the same architecture with random weights."""
    sentences = []
    for name in shown(result):
        if name not in result.references:
            continue
        twin, parts = result.references[name], []
        if "cka" in result.measures:
            cka = result.cka(name, twin)
            last = cka.sizes["layer_a"] - 1, cka.sizes["layer_b"] - 1
            if np.isfinite(value := float(cka[last])):
                text = with_interval(result, name, twin, value, *last)
                parts.append(f"CKA of the last layers {text}")
        table = lists.differences
        rows = table[(table["model_a"] == name) & (table["model_b"] == twin)]
        main = rows[rows["measure"].isin(MAIN)]
        parts += [f"{in_text(row.measure)} {_apart(row)}" for row in rows_of(main)]
        rest = rows[~rows["measure"].isin(MAIN)]
        if len(rest):
            stand = int((rest["verdict"] != UNDECIDED).sum())
            parts.append(f"different in {stand} of {len(rest)} other measures")
        if parts:
            sentences.append(f"{name} against its untrained twin: {'; '.join(parts)}.")
    return sentences


def methods(result: Comparison, lists: Lists) -> list[str]:
    """What holds of methods rather than of single runs: differences with seeds as the unit."""
    table = lists.group_differences
    if table is None or not len(table):
        return []
    if not several_seeds(result):
        return ["There is one seed a method, and so no interval: no difference can be judged."]
    sentences = []
    told = table[table["verdict"].isin(("higher", "lower"))]
    for measure, rows in told.groupby("measure", sort=False):
        pairs = [f"{row.group_a} {_apart(row)} than {row.group_b}" for row in rows_of(rows)]
        sentences.append(f"{MEASURES[str(measure)].title}: {'; '.join(pairs)}.")
    of = count(len(table), "comparison")
    if open_ := int((table["verdict"] == UNDECIDED).sum()):
        sentences.append(f"In {open_} of {of}, the two methods cannot be told apart.")
    if single := int((table["verdict"] == ONE_SEED).sum()):
        sentences.append(f"{single} of {of} cannot be judged: one method has a single seed.")
    return sentences


def methods_similarity(table: pd.DataFrame, title: str = "CKA") -> str:
    """How alike seeds of one method are, beside how alike methods are."""

    def text(row: Any) -> str:
        return bracket(row.mean, row.low, row.high, least=2)

    within = [
        f"{text(row)} within {row.group_a}"
        for row in rows_of(table)
        if row.group_a == row.group_b and row.pairs
    ]
    between = [
        f"{text(row)} between {row.group_a} and {row.group_b}"
        for row in rows_of(table)
        if row.group_a != row.group_b
    ]
    return (
        f"Mean {title} of layers at equal depth, with seeds as the unit: {join(within + between)}."
    )


def forest(rows: pd.DataFrame, listed: int) -> str:
    """How a forest of these rows is read, how many stand, and how many differences were judged."""
    open_ = int((rows["verdict"] == UNDECIDED).sum())
    images = int(rows["images"].min())
    hollow = f"; hollow and grey: cannot be told apart ({open_} of {len(rows)})" if open_ else ""
    return (
        f"{MEASURES[rows['measure'].iloc[0]].title}: point, mean of A minus B over "
        f"{count(images, 'image')}; line, its {LEVEL} interval (paired, pointwise). Filled: the "
        f"difference holds after Holm's correction over {count(listed, 'listed difference')}"
        f"{hollow}."
    )


def seeds(table: pd.DataFrame, measure: str) -> str:
    """How a figure of seeds is read, with the spread between seeds of each method."""
    rows = table[table["measure"] == measure]
    spreads = [
        f"{row.group} {spread(row.between_seeds, row.units)}"
        for row in rows_of(rows)
        if np.isfinite(row.between_seeds)
    ]
    between = f" Standard deviation between seeds: {join(spreads)}." if spreads else ""
    return (
        f"Point: a seed (mean over images, heads and layers); tick and bar: mean of the method and "
        f"its {LEVEL} interval over seeds (Student's t).{between}"
    )


def _apart(row: Any) -> str:
    """`higher by 3.1 px [2.0, 4.2]`, or that nothing can be said."""
    if row.verdict == UNDECIDED:
        return UNDECIDED
    ends = (row.low, row.high) if row.difference > 0 else (-row.high, -row.low)
    size = bracket(abs(row.difference), *ends, of_difference(row.units))
    return f"{row.verdict} by {size}"
