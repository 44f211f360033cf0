"""The protocol `knn`: weighted k-nearest-neighbour classification of pooled features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vitprobe.errors import MeasureError
from vitprobe.evaluation.intervals import accuracy_interval
from vitprobe.evaluation.knn import knn_predictions
from vitprobe.evaluation.pooled import Banks, FeatureProtocol
from vitprobe.scores import Score


@dataclass(frozen=True, kw_only=True)
class Knn(FeatureProtocol):
    """Top-1 accuracy by weighted cosine k-NN, see `vitprobe.evaluation.knn`.

    k: numbers of neighbours, a row each.
    temperature: of their weights.
    """

    name: ClassVar[str] = "knn"

    k: tuple[int, ...] = (20,)
    temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "k", (self.k,) if isinstance(self.k, int) else tuple(dict.fromkeys(self.k))
        )
        if not self.k or min(self.k) < 1:
            raise MeasureError(f"k of {self.k} is none; give one or more numbers of neighbours")
        if not 0 < self.temperature < math.inf:
            raise MeasureError(f"temperature must be a number above 0, not {self.temperature}")

    def rows(self, banks: Banks) -> Sequence[Score]:
        """A row for each feature, layer and k; neighbours are at most all training images."""
        rows = []
        ks = {k: min(k, len(banks.train_labels)) for k in self.k}
        for choice in self.features_of(banks.model):
            found = knn_predictions(
                banks.train[choice],
                banks.train_labels,
                banks.test[choice],
                ks=list(dict.fromkeys(ks.values())),
                temperature=self.temperature,
                classes=banks.classes,
            )
            for asked, k in ks.items():
                hits = int((found[k] == banks.test_labels).sum())
                settings = {"k": k, "temperature": self.temperature}
                if k < asked:
                    settings["k_asked"] = asked
                value = accuracy_interval(hits, len(banks.test_labels))
                rows.append(self.feature_score(banks, choice, "knn", value, settings))
        return rows
