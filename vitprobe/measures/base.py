"""What every measure says about itself, and the contract of the streaming ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

Group = Literal["similarity", "attention", "tokens"]
"""What a measure is a number of: two layers, a head of a block, or a layer."""
Streams = Literal["exact", "blocked", "subset"]
Invariance = Literal[
    "orthogonal transformation",
    "invertible linear transformation",
    "isotropic scaling",
    "shift",
    "order of images",
    "order of tokens",
    "order of keys",
]
"""What may be done to the input without changing the number. Transformations, scalings and shifts
are of the features of one layer (of either, in a comparison of two); the order of images is changed
in both; the order of tokens or keys is changed in every image alike."""


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
    invariances: tuple[Invariance, ...]
    """All that hold, and no other: tests check both."""
    streams: Streams
    """`exact`: any split of the images gives the same number; `blocked`: the number belongs to the
    block size; `subset`: computed on the first `max_images`."""
    group: Group
    interval: str
    """How its interval is made, and of what the interval is."""
    null: str
    """The value without the effect: what independent or untrained models, or uniform attention,
    would give."""
    caveats: str
    """What misleads readers."""
    elsewhere: str
    """What others, by name, compute differently under the same name."""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Between which every value lies, and intervals are cut."""
    alike: tuple[Literal["grid", "width"], ...] = ()
    """What models must have in common for their values to be comparable; lists of differences leave
    out the others."""

    @property
    def in_text(self) -> str:
        """The title inside a sentence: `attention distance`, but `RankMe`."""
        first = self.title.split()[0]
        small = first[1:] == first[1:].lower()
        return f"{self.title[0].lower()}{self.title[1:]}" if small else self.title


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
