"""Which models a report shows, how measures are called, and what of a model was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.style import kind_of, subjects
from vitprobe.report.words import join, show

if TYPE_CHECKING:
    from vitprobe.results import Comparison

MAIN = ("attention_distance", "attention_entropy", "sink_mass")
"""Attention measures that are shown head by head, and that sentences are about first."""


def shown(result: Comparison) -> tuple[str, ...]:
    """The models that figures of one model show: trained ones, of a group its first seed."""
    firsts: dict[str, str] = {}
    for name in subjects(result):
        firsts.setdefault(kind_of(result, name), name)
    return tuple(firsts.values())


def several_seeds(result: Comparison) -> bool:
    """Whether a method has two seeds, without which nothing has an interval over seeds."""
    return any(len(names) > 1 for names in result.groups.values())


def in_text(measure: str) -> str:
    """The title of a measure inside a sentence: `attention distance`, but `RankMe`."""
    title = MEASURES[measure].title
    first = title.split()[0]
    return f"{title[0].lower()}{title[1:]}" if first[1:] == first[1:].lower() else title


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
