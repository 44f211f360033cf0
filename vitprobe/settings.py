"""How a comparison is made, and a probe file for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from vitprobe.capture.features import Convention
from vitprobe.errors import DataError, MeasureError, VitprobeError, suggest
from vitprobe.measures.base import Group
from vitprobe.measures.cka import MINIMUM_IMAGES, Estimator
from vitprobe.measures.registry import MEASURES
from vitprobe.measures.tokens import TokenPolicy
from vitprobe.results import COMPANION

DEFAULT_MEASURES: Final = ("cka", "attention_distance", "attention_entropy")
ALL: Final = "all"

Precision = Literal["fp32", "bf16"]


def known() -> tuple[str, ...]:
    """The measures that can be asked for, those that users have registered among them."""
    return tuple(name for name in MEASURES if name != COMPANION)


@dataclass(frozen=True)
class Settings:
    """How a comparison is made; all of it is recorded in the result.

    Raises:
        VitprobeError: a setting that there is not, or that cannot be followed.
    """

    measures: Sequence[str] = DEFAULT_MEASURES
    layers: Convention = "normed"
    tokens: TokenPolicy = "patches"
    estimator: Estimator = "unbiased"
    block: int = 128
    batch_size: int | None = None
    device: str = "auto"
    precision: Precision = "fp32"
    workers: int = 2
    progress: bool = True
    max_images: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.measures, str):
            raise MeasureError(f"measures are a list of names: give ['{self.measures}']")
        for name in self.measures:
            if name not in (*known(), ALL):
                raise MeasureError(
                    f"unknown measure '{name}'.{suggest(name, known())} Use some of "
                    f"{' '.join(known())}, or {ALL}."
                )
        if not self.measures:
            raise MeasureError(f"no measure asked for: use some of {', '.join(known())}, or {ALL}")
        if self.tokens not in get_args(TokenPolicy):
            raise MeasureError(
                f"unknown tokens '{self.tokens}': use one of {', '.join(get_args(TokenPolicy))}"
            )
        if self.max_images < 4:
            raise MeasureError(f"max_images of {self.max_images} is too few; give 4 or more")
        if self.estimator not in MINIMUM_IMAGES:
            raise MeasureError(
                f"unknown CKA estimator '{self.estimator}': use 'unbiased' or 'biased'"
            )
        if self.block < MINIMUM_IMAGES[self.estimator]:
            raise MeasureError(
                f"a block of {self.block} images is too small: {self.estimator} CKA needs "
                f"{MINIMUM_IMAGES[self.estimator]}"
            )
        for what, number in (("batch size", self.batch_size), ("number of workers", self.workers)):
            if number is not None and number < 1:
                raise DataError(f"a {what} of {number} is none; give 1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise VitprobeError(f"unknown precision '{self.precision}': use 'fp32' or 'bf16'")

    @property
    def similarity(self) -> tuple[str, ...]:
        """Measures of two layers."""
        return self._of("similarity")

    @property
    def attention(self) -> tuple[str, ...]:
        """Attention measures; sink mass always goes with them, since renormalising hides it."""
        asked = self._of("attention")
        return tuple(dict.fromkeys([*asked, "sink_mass"])) if asked else ()

    @property
    def required(self) -> tuple[str, ...]:
        """Attention measures that some model must give: those asked for by name."""
        if ALL in self.measures or tuple(self.measures) == DEFAULT_MEASURES:
            return ()
        return self._of("attention")

    @property
    def layer_tokens(self) -> tuple[str, ...]:
        """Measures of the tokens of a layer."""
        return self._of("tokens")

    @property
    def named(self) -> tuple[str, ...]:
        """All measures, by name."""
        return (*self.similarity, *self.attention, *self.layer_tokens)

    @property
    def features(self) -> bool:
        """Whether anything is asked of layers."""
        return bool(self.similarity or self.layer_tokens)

    def _of(self, group: Group) -> tuple[str, ...]:
        asked = known() if ALL in self.measures else dict.fromkeys(self.measures)
        return tuple(name for name in asked if MEASURES[name].group == group)
