"""The lists of differences that several parts of a report read, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from vitprobe.tables import between_models

if TYPE_CHECKING:
    from vitprobe.results import Comparison


@dataclass(frozen=True)
class Lists:
    differences: pd.DataFrame
    """Paired over images; no rows where nothing can be paired."""
    group_means: pd.DataFrame | None
    """None without groups, as all that follow."""
    group_differences: pd.DataFrame | None
    group_similarity: dict[str, pd.DataFrame]
    """By similarity measure; empty without groups."""
    models: pd.DataFrame | None = None
    """CKA and distance of models as wholes; None without CKA."""

    def tables(self) -> dict[str, pd.DataFrame]:
        """Those that hold anything, by file name."""
        tables = {
            "differences": self.differences,
            "group_means": self.group_means,
            "group_differences": self.group_differences,
            "models": self.models,
        }
        if self.group_similarity:
            tables["group_similarity"] = pd.concat(
                self.group_similarity, names=["measure", None]
            ).reset_index(0)
        return {name: table for name, table in tables.items() if table is not None and len(table)}


def lists_of(result: Comparison) -> Lists:
    """All lists of a result; verdicts hold together within each of them (Holm)."""
    differences = result.differences()
    models = between_models(result) if "cka" in result.measures else None
    if not result.groups:
        return Lists(differences, None, None, {}, models)
    alike = [name for name in result.measures if result.group_of(name) == "similarity"]
    return Lists(
        differences,
        result.group_means(),
        result.group_differences(),
        {measure: result.group_similarity(measure) for measure in alike},
        models,
    )
