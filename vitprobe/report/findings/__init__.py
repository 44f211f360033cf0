"""What a result shows, in sentences computed from its numbers.

Pure functions from a `Comparison` to sentences: no number is judged by a threshold that the
sentence does not state, and "cannot be told apart" always rests on the paired difference over the
same images, or on seeds where the sentence is about methods. Blocks and heads are said to be alike
only where all their intervals share a value; an extreme is printed to the digits that tell it from
the others, or named together with those printed like it. Brackets are 95 % intervals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.style import attention_noun, measured, subjects
from vitprobe.report.findings.layers import (
    band_of_overlay,
    band_of_tokens,
    first_blocks,
    focus,
    locality,
    of_layer,
    overall,
    sinks,
    spectrum,
    token_trend,
    trend,
)
from vitprobe.report.findings.models import (
    MAIN,
    assumed_heads,
    in_text,
    not_measured,
    other_assumptions,
    patch_layers,
    refused,
    remarks,
    several_seeds,
    shown,
    windowed,
)
from vitprobe.report.findings.similarity import (
    dominance,
    floors,
    grid,
    is_defined,
    largest_share,
    last_layers,
    mean_by_pair,
    overall_similarity,
    similarity,
    widths,
)
from vitprobe.report.findings.verdicts import (
    beyond_untrained,
    differences,
    forest,
    methods,
    methods_similarity,
    seeds,
)
from vitprobe.report.findings.whole import (
    accuracy,
    accuracy_caption,
    depth_caption,
    headline,
    map_caption,
)
from vitprobe.report.words import count
from vitprobe.wording import join

if TYPE_CHECKING:
    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

# Lines of a summary about measures that have no sentence of their own.
_FEW = 4

__all__ = [
    "MAIN",
    "accuracy",
    "accuracy_caption",
    "assumed_heads",
    "band_of_overlay",
    "band_of_tokens",
    "beyond_untrained",
    "depth_caption",
    "differences",
    "dominance",
    "first_blocks",
    "floors",
    "focus",
    "forest",
    "grid",
    "headline",
    "in_text",
    "is_defined",
    "largest_share",
    "last_layers",
    "locality",
    "map_caption",
    "methods",
    "methods_similarity",
    "not_measured",
    "of_layer",
    "other_assumptions",
    "overall",
    "overall_similarity",
    "patch_layers",
    "refused",
    "remarks",
    "seeds",
    "several_seeds",
    "shown",
    "similarity",
    "sinks",
    "spectrum",
    "summary",
    "token_trend",
    "trend",
    "widths",
    "windowed",
]


def summary(result: Comparison, lists: Lists) -> list[tuple[str, str]]:
    """The findings to read first, as (topic, sentence)."""
    findings: list[tuple[str, str]] = []
    scored = [("Accuracy", sentence) for sentence in accuracy(result)]
    if result.groups:
        alike = lists.group_similarity
        first = ["cka"] if "cka" in alike else list(alike)[:_FEW]
        return [
            *scored,
            *(("Similarity", methods_similarity(alike[m], MEASURES[m].title)) for m in first),
            *(("Methods", sentence) for sentence in methods(result, lists)),
        ]
    if "cka" in result.measures:
        findings.append(("Similarity", overall_similarity(result, lists)))
        findings += [("Last layers", sentence) for sentence in last_layers(result)]
    if "attention_distance" in result.measures:
        findings.append(("Locality", locality(result)))
    if "attention_entropy" in result.measures:
        findings.append(("Focus", focus(result, lists)))
    if "sink_mass" in result.measures:
        findings.append(("Sinks", sinks(result)))
    if "cka" in result.measures:
        findings += [("One direction", sentence) for sentence in dominance(result)]
    if not findings:
        findings += _others(result)
    if sentence := not_measured(result):
        findings.append(("Not measured", sentence))
    findings += scored
    findings += [("Training", sentence) for sentence in beyond_untrained(result, lists)]
    findings += [("Differences", sentence) for sentence in differences(result, lists.differences)]
    return findings


def _others(result: Comparison) -> list[tuple[str, str]]:
    """A line for each of the first measures, of those that have no sentence of their own."""
    lines = []
    for measure in result.measures[:_FEW]:
        group, title = result.group_of(measure), MEASURES[measure].title
        if group == "similarity":
            text = mean_by_pair(result, measure)
        elif group == "tokens":
            text = f"{title} of {token_trend(result, measure)}"
        else:
            names = measured(result, measure, subjects(result))
            relative = result.needs_relative(measure, names)
            means = [f"{overall(result, measure, n, relative=relative)} in {n}" for n in names]
            noun = attention_noun(result, names)
            text = f"{title}, mean over heads, {noun}s and images: {join(means)}."
        lines.append((group.capitalize(), text))
    if rest := len(result.measures) - len(lines):
        lines.append(("More", f"{count(rest, 'other measure')} in the sections below."))
    return lines
