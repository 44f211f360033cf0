"""The measures by name, in the order in which reports and docs have them."""

from __future__ import annotations

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
PER_BLOCK = frozenset(name for name, cls in ATTENTION.items() if cls.per_block)
"""Attention measures of a whole block, its heads fused."""
SYMMETRIC: dict[str, bool] = {
    "cka": True,
    "cka_rbf": True,
    **{name: cls.symmetric for name, cls in SUBSET.items()},
}
"""Similarity measures, and whether it does not matter which layer is the first."""
