"""Which differences stand, between models over images and between methods over seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.differences import UNDECIDED, rows_of
from vitprobe.report.findings.models import MAIN, in_text, shown
from vitprobe.report.findings.similarity import with_interval
from vitprobe.report.words import LEVEL, amount, bracket, count, join

if TYPE_CHECKING:
    import pandas as pd

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison


def differences(table: pd.DataFrame) -> list[str]:
    """How many paired differences stand after Holm's correction, and which pairs are undecided."""
    if not len(table):
        return []
    open_ = table[table["verdict"] == UNDECIDED]
    if not len(open_):
        if len(table) == 1:
            return ["The one paired difference between models holds."]
        return [f"All {len(table)} paired differences between models hold after Holm's correction."]
    of = count(len(table), "paired difference")
    first = f"{len(table) - len(open_)} of {of} between models hold after Holm's correction"
    if len(open_) > 4:
        return [f"{first}; in the other {len(open_)}, the two models cannot be told apart."]
    listed = [
        f"{row.model_a} and {row.model_b} in {in_text(row.measure)}" for row in rows_of(open_)
    ]
    return [f"{first}; {join(listed)} cannot be told apart."]


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
    known = [name for name in MAIN if name in set(table["measure"])] or [table["measure"].iloc[0]]
    sentences = []
    for measure in known:
        rows = table[table["measure"] == measure]
        told = [
            f"{row.group_a} {_apart(row)} than {row.group_b}"
            for row in rows_of(rows[rows["verdict"].isin(("higher", "lower"))])
        ]
        parts = ["; ".join(told)] if told else []
        open_ = rows[rows["verdict"] == UNDECIDED]
        if len(open_):
            pairs = [f"{row.group_a} and {row.group_b}" for row in rows_of(open_)]
            parts.append(f"{UNDECIDED}: {', '.join(pairs)}")
        single = rows[~rows["verdict"].isin(("higher", "lower", UNDECIDED))]
        if len(single):
            pairs = [f"{row.group_a} and {row.group_b}" for row in rows_of(single)]
            parts.append(f"one seed, so nothing can be said: {', '.join(pairs)}")
        sentences.append(f"{MEASURES[measure].title}, with seeds as the unit: {'; '.join(parts)}.")
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


def forest(table: pd.DataFrame, measure: str) -> str:
    """How a forest of paired differences is read, and how much of it stands."""
    rows = table[table["measure"] == measure]
    open_ = int((rows["verdict"] == UNDECIDED).sum())
    images = int(rows["images"].min())
    return (
        f"{MEASURES[measure].title}: point, mean of A minus B over {count(images, 'image')}; line, "
        f"its {LEVEL} interval (paired, pointwise). Filled: the difference holds after Holm's "
        f"correction over all {len(table)} listed differences; hollow and grey: cannot be told "
        f"apart ({open_} of {len(rows)})."
    )


def seeds(table: pd.DataFrame, measure: str) -> str:
    """How a figure of seeds is read, with the spread between seeds of each method."""
    rows = table[table["measure"] == measure]
    spread = [
        f"{row.group} {amount(row.between_seeds, row.units)}"
        for row in rows_of(rows)
        if np.isfinite(row.between_seeds)
    ]
    between = f" Standard deviation between seeds: {join(spread)}." if spread else ""
    return (
        f"Point: a seed (mean over images, heads and layers); tick and bar: mean of the method and "
        f"its {LEVEL} interval over seeds (Student's t).{between}"
    )


def _apart(row: Any) -> str:
    """`higher by 3.1 px [2.0, 4.2]`, or that nothing can be said."""
    if row.verdict == UNDECIDED:
        return UNDECIDED
    ends = (row.low, row.high) if row.difference > 0 else (-row.high, -row.low)
    return f"{row.verdict} by {bracket(abs(row.difference), *ends, row.units)}"
