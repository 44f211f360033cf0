"""The measures by name, in the order in which reports and docs have them."""

from __future__ import annotations

import inspect
from typing import TypeVar

from vitprobe.errors import MeasureError
from vitprobe.measures.attention import ATTENTION_MEASURES, AttentionMeasure
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.cka import CKA, CKARBF
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.similarity import SUBSET_MEASURES
from vitprobe.measures.subset import SubsetMeasure
from vitprobe.measures.tokens import TOKEN_MEASURES, RankMe, TokenMeasure

ALL_MEASURES: tuple[type[Measure], ...] = (
    CKA,
    CKARBF,
    *SUBSET_MEASURES,
    *ATTENTION_MEASURES,
    FirstDirectionShare,
    *TOKEN_MEASURES,
    RankMe,
)

MEASURES: dict[str, Info] = {cls.info.name: cls.info for cls in ALL_MEASURES}
SUBSET: dict[str, type[SubsetMeasure]] = {cls.info.name: cls for cls in SUBSET_MEASURES}
ATTENTION: dict[str, type[AttentionMeasure]] = {cls.info.name: cls for cls in ATTENTION_MEASURES}
TOKENS: dict[str, type[TokenMeasure]] = {cls.info.name: cls for cls in TOKEN_MEASURES}
PER_BLOCK = {name for name, cls in ATTENTION.items() if cls.per_block}
"""Attention measures of a whole block, its heads fused."""
SYMMETRIC: dict[str, bool] = {
    "cka": True,
    "cka_rbf": True,
    **{name: cls.symmetric for name, cls in SUBSET.items()},
}
"""Similarity measures, and whether it does not matter which layer is the first."""

_OURS = frozenset(MEASURES)
M = TypeVar("M", bound=type[Measure])


def register(measure: M) -> M:
    """Let comparisons, probe files and reports know a measure of your own, by its `info.name`.

    A decorator of subclasses of `TokenMeasure` (a number an image, from its patches),
    `AttentionMeasure` (a number an image and head) or `SubsetMeasure` (two layers, on the first
    `max_images`). It holds for this process; a result that was saved with it opens only where it
    is registered too. A class that is registered again takes the place of the one before.

    Raises:
        MeasureError: a class of another kind, one that is not finished, or a name that a measure of
            vitprobe has.
    """
    kinds = {"tokens": TokenMeasure, "attention": AttentionMeasure, "similarity": SubsetMeasure}
    group = next((name for name, cls in kinds.items() if _is_kind(measure, cls)), None)
    if group is None:
        raise MeasureError(
            f"{measure!r} is no class of a measure; derive it from TokenMeasure, AttentionMeasure "
            "or SubsetMeasure"
        )
    info = getattr(measure, "info", None)
    open_ = sorted(getattr(measure, "__abstractmethods__", ()))
    if not isinstance(info, Info) or open_:
        what = "info" if not isinstance(info, Info) else ", ".join(open_)
        raise MeasureError(f"the measure {measure.__name__} has no {what}; write that first")
    if info.group != group:
        raise MeasureError(
            f"'{info.name}' says that it is of {info.group}, but its class is of {group}"
        )
    if info.name in _OURS:
        raise MeasureError(f"'{info.name}' is a measure of vitprobe; choose another name")
    MEASURES[info.name] = info
    if issubclass(measure, TokenMeasure):
        TOKENS[info.name] = measure
    elif issubclass(measure, AttentionMeasure):
        ATTENTION[info.name] = measure
        PER_BLOCK.discard(info.name)
        if measure.per_block:
            PER_BLOCK.add(info.name)
    elif issubclass(measure, SubsetMeasure):
        SUBSET[info.name] = measure
        SYMMETRIC[info.name] = measure.symmetric
    return measure


def is_ours(name: str) -> bool:
    """Whether a measure comes with vitprobe, and so is known to every process."""
    return name in _OURS


def _is_kind(measure: object, kind: type) -> bool:
    return inspect.isclass(measure) and issubclass(measure, kind)
