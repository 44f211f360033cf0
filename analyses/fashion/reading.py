"""The committed results of the study by method and seed: what figures and findings are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import vitprobe as vp
from vitprobe.errors import ResultError
from vitprobe.scores import open_scores

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "D-MAE 0": "block 11 (D-MAE)",
    "D-MAE middle 0": "block 5",
    "D-MAE lower 0": "block 2",
    "D-MAE all 0": "all blocks",
    "D-MAE hidden 0": "hidden states",
}
"""What is distilled in each model of distillation.nc that a teacher taught."""


class Study:
    """Results of one run of the study. Arrays have the seeds of a method on their first axis, and
    none where it was not trained."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    @cached_property
    def systems(self) -> vp.Comparison:
        return vp.open_result(self.folder / "systems.nc")

    @cached_property
    def training(self) -> vp.Comparison:
        return vp.open_result(self.folder / "training.nc")

    @cached_property
    def distillation(self) -> vp.Comparison:
        return vp.open_result(self.folder / "distillation.nc")

    @cached_property
    def scores(self) -> pd.DataFrame:
        return open_scores(self.folder / "scores.json").to_dataframe()

    @property
    def updates(self) -> tuple[int, ...]:
        """Different numbers of updates of the fine-tunings, from the least."""
        tuned = self.scores[self.scores["protocol"] == "finetune"]
        found = {json.loads(one or "{}").get("updates") for one in tuned["settings"]}
        return tuple(sorted(found - {None}))

    @cached_property
    def costs(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "costs.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultError(f"no costs '{path}'; make study writes them") from error

    @property
    def schedule(self) -> dict[str, Any]:
        return self.systems.provenance["schedule"]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.systems.groups)

    def seeds(self, method: str) -> tuple[str, ...]:
        """Names of its models in systems.nc."""
        return self.systems.groups.get(method, ())

    def cka(self, a: str, b: str) -> NDArray[np.float64]:
        """Of every seed of one method with every seed of another: (seeds of a, seeds of b, layer of
        a, layer of b); nan for a model with itself."""
        pairs = [[self._pair(x, y) for y in self.seeds(b)] for x in self.seeds(a)]
        return np.array(pairs, dtype=float).reshape(len(self.seeds(a)), len(self.seeds(b)), 13, 13)

    def _pair(self, a: str, b: str) -> NDArray[np.float64]:
        return np.full((13, 13), np.nan) if a == b else cka_of(self.systems, a, b)

    def attention(
        self, measure: str, method: str, *, relative: bool = False
    ) -> NDArray[np.float64]:
        """A measure of every head: (seeds, blocks, heads), in its unit or that of uniform
        attention."""
        found = [
            self.systems.attention(measure, name, relative=relative).values
            for name in self.seeds(method)
        ]
        return np.array(found) if found else np.zeros((0, 12, 1))

    def accuracy(
        self, models: Sequence[str], protocol: str, *, labels: float = 1.0, kept: int | None = None
    ) -> pd.Series:
        """Top-1 accuracy in % by model, of those that were scored so."""
        rows = self._rows(models, protocol, labels)
        rows = rows[rows["layer"].isna()]
        rows = rows[rows["kept"].isna() if kept is None else rows["kept"] == kept]
        return 100 * rows.groupby("model", sort=False)["value"].mean()

    def by_kept(self, method: str, kept: Sequence[int], *, labels: float) -> pd.DataFrame:
        """Top-1 accuracy in % of every seed (rows) by the number of pre-trained blocks that
        fine-tuning kept (columns; 12 is all), nan where it was not run."""
        names = self.seeds(method)
        found = {
            number: self.accuracy(
                names, "finetune", labels=labels, kept=None if number == 12 else number
            )
            for number in kept
        }
        return pd.DataFrame(found, index=names)

    def by_layer(self, model: str, protocol: str) -> pd.Series:
        """Top-1 accuracy in % of a model by the layer whose features are used."""
        rows = self._rows([model], protocol, 1.0).dropna(subset="layer")
        return 100 * rows.groupby("layer")["value"].mean()

    def _rows(self, models: Sequence[str], protocol: str, labels: float) -> pd.DataFrame:
        table = self.scores
        return table[
            table["model"].isin(models)
            & (table["protocol"] == protocol)
            & (table["metric"] == "top1")
            & np.isclose(table["labels"].astype(float), labels)
        ]


def cka_of(result: vp.Comparison, a: str, b: str) -> NDArray[np.float64]:
    """`result.cka(a, b)`, read from the arrays: figures ask for hundreds of pairs."""
    dataset = result.tree["similarity"]
    rows, columns = (
        np.flatnonzero(dataset[f"model_{side}"].values == name)
        for side, name in (("a", a), ("b", b))
    )
    return dataset["cka"].values[np.ix_(rows, columns)].astype(float)


def same_layers(cka: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of equal layers: (…, layer)."""
    return np.diagonal(cka, axis1=-2, axis2=-1)
