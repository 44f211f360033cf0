"""Which models a report shows, how measures are called, and what of a model was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.style import kind_of, subjects
from vitprobe.report.words import show
from vitprobe.wording import join, layers_in_words, ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    return MEASURES[measure].in_text


def assumed_heads(result: Comparison) -> list[tuple[str, int]]:
    """Models whose number of heads was assumed rather than read, with that number."""
    return [
        (name, description["facts"]["heads"]["value"])
        for name in result.models
        if "heads" in (description := result.describe(name))["assumed"]
    ]


def windowed(result: Comparison, names: Sequence[str]) -> list[str]:
    """Those of some models whose attention, somewhere, does not reach every patch."""
    return [
        name
        for name in names
        if any(layer["kind"] == "windows" for layer in result.attention_layers(name))
    ]


def patch_layers(result: Comparison, name: str) -> list[int]:
    """The attention layers of a model that are between patches."""
    kinds = [layer["kind"] for layer in result.attention_layers(name)]
    return [i for i, kind in enumerate(kinds) if kind not in ("channels", "class token")]


def refused(result: Comparison) -> list[tuple[str, str, str, str]]:
    """What models have no number of: (model, measures, attention layers, why)."""
    rows = []
    for name in subjects(result):
        for part in result.describe(name).get("refused", ()):
            what = join([in_text(measure) for measure in part["measures"]])
            if not part["layers"]:
                layers = "has none"
            elif len(part["layers"]) == len(result.attention_layers(name)):
                layers = "all"
            else:
                layers = ranges(part["layers"])
            rows.append((name, f"{what[0].upper()}{what[1:]}", layers, part["reason"]))
    return rows


def remarks(result: Comparison) -> list[str]:
    """What a reader must know of the attention layers of each model, a sentence each."""
    sentences = []
    for name in subjects(result):
        layers: dict[str, list[int]] = {}
        for i, layer in enumerate(result.attention_layers(name)):
            if note := layer.get("note"):
                layers.setdefault(note.rstrip("."), []).append(i)
        sentences += [
            f"{name}, {layers_in_words(found, 'attention layer')}: {note}."
            for note, found in layers.items()
        ]
    return sentences


def not_measured(result: Comparison) -> str:
    """Models of which a main measure of attention has no value at all, or nothing."""
    parts = []
    for name in subjects(result):
        found = result.describe(name).get("refused", ())
        missing = [
            measure
            for measure in MAIN
            if any(measure in part["measures"] for part in found)
            and (measure not in result.measures or name not in result.measured(measure))
        ]
        if not result.attention_layers(name) and found:
            parts.append(f"{name} has no attention: {found[0]['reason']}")
        elif missing:
            reasons = [part["reason"] for part in found if set(part["measures"]) & set(missing)]
            titles = join([in_text(measure) for measure in missing])
            parts.append(f"{name} has no {titles}: {'; '.join(dict.fromkeys(reasons))}")
    return " ".join(f"{part}." for part in parts)


def other_assumptions(result: Comparison) -> str:
    """Every other fact that was assumed, and of which models, or nothing."""
    alike: dict[str, list[str]] = {}
    for name in result.models:
        description = result.describe(name)
        facts = [
            f"{key.replace('_', ' ')} ({show(description['facts'][key]['value'])})"
            for key in description["assumed"]
            if key != "heads"
        ]
        if facts:
            alike.setdefault(join(facts), []).append(name)
    parts = [f"{facts} of {join(names)}" for facts, names in alike.items()]
    return f"Assumed, not read: {'; '.join(parts)}." if parts else ""
