"""The protocol `frozen`: k-NN and linear classification from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from vitprobe.evaluation.features import Choice
from vitprobe.evaluation.linear import Linear
from vitprobe.evaluation.nearest import Knn
from vitprobe.evaluation.pooled import Banks, FeatureProtocol
from vitprobe.models import Model
from vitprobe.scores import Score


@dataclass(frozen=True, kw_only=True)
class Frozen(FeatureProtocol):
    """The rows of `knn` and then of `linear`, with the options of both."""

    name: ClassVar[str] = "frozen"

    k: tuple[int, ...] = Knn.k
    temperature: float = Knn.temperature
    l2: tuple[float, ...] = Linear.l2

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.both

    @property
    def both(self) -> tuple[FeatureProtocol, ...]:
        """The two, with the options that are theirs."""
        own: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        return tuple(
            kind(**{one.name: own[one.name] for one in fields(kind)}) for kind in (Knn, Linear)
        )

    def features_of(self, model: Model) -> list[Choice]:
        """All features that either looks at, each once."""
        found = [choice for protocol in self.both for choice in protocol.features_of(model)]
        return list(dict.fromkeys(found))

    def rows(self, banks: Banks) -> Sequence[Score]:
        """Those of k-NN, then those of the linear classifier."""
        return [row for protocol in self.both for row in protocol.rows(banks)]
