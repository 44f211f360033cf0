"""What a result shows, in sentences computed from its numbers.

Pure functions from a `Comparison` to sentences: no number is judged by a threshold that the
sentence does not state, and "cannot be told apart" always rests on the paired difference over the
same images, or on seeds where the sentence is about methods. Where numbers are equal as printed,
they are said to be equal, and no extreme among them is named. Brackets are 95 % intervals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    has_prefix,
    in_text,
    other_assumptions,
    shown,
)
from vitprobe.report.findings.similarity import (
    dominance,
    floors,
    grid,
    is_defined,
    largest_share,
    last_layers,
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

if TYPE_CHECKING:
    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

__all__ = [
    "MAIN",
    "assumed_heads",
    "band_of_overlay",
    "band_of_tokens",
    "beyond_untrained",
    "differences",
    "dominance",
    "first_blocks",
    "floors",
    "focus",
    "forest",
    "grid",
    "has_prefix",
    "in_text",
    "is_defined",
    "largest_share",
    "last_layers",
    "locality",
    "methods",
    "methods_similarity",
    "of_layer",
    "other_assumptions",
    "overall",
    "overall_similarity",
    "seeds",
    "shown",
    "similarity",
    "sinks",
    "spectrum",
    "summary",
    "token_trend",
    "trend",
    "widths",
]


def summary(result: Comparison, lists: Lists) -> list[tuple[str, str]]:
    """The findings to read first, as (topic, sentence)."""
    findings: list[tuple[str, str]] = []
    if result.groups:
        if "cka" in lists.group_similarity:
            findings.append(("Similarity", methods_similarity(lists.group_similarity["cka"])))
        findings += [("Methods", sentence) for sentence in methods(result, lists)]
    elif "cka" in result.measures:
        findings.append(("Similarity", overall_similarity(result)))
        findings += [("Last layers", sentence) for sentence in last_layers(result)]
    if "attention_distance" in result.measures and not result.groups:
        findings.append(("Locality", locality(result)))
    if "attention_entropy" in result.measures and not result.groups:
        findings.append(("Focus", focus(result, lists)))
    if "sink_mass" in result.measures:
        findings.append(("Sinks", sinks(result)))
    if "cka" in result.measures:
        findings += [("One direction", sentence) for sentence in dominance(result)]
    findings += [("Training", sentence) for sentence in beyond_untrained(result, lists)]
    findings += [("Differences", sentence) for sentence in differences(lists.differences)]
    return findings
