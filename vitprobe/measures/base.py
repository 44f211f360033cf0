"""What every measure says about itself, and the contract of the streaming ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self


@dataclass(frozen=True)
class Info:
    """A measure in words: what reports, tables and docs print beside its numbers."""

    name: str
    title: str
    unit: str
    range: str
    direction: str
    """What a higher value means."""
    what: str
    """One plain sentence for a reader who has not met the measure."""
    formula: str
    source: str
    invariances: tuple[str, ...]
    streams: Literal["exact", "blocked", "subset"]
    """`exact`: any split of the images gives the same number; `blocked`: the number belongs to the
    block size; `subset`: computed on the first `max_images`."""


class Measure(ABC):
    """A streaming measure: a sum of sufficient statistics.

    `update` takes what one block or chunk of images gives, `merge` adds the statistics of another
    instance (of other images) exactly, `compute` turns the sums into numbers.
    """

    info: ClassVar[Info]

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the statistics of `other`, which has seen other images."""

    @abstractmethod
    def compute(self) -> Any:
        """The numbers, from the sums seen so far."""
