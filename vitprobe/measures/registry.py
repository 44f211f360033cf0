"""The measures by name."""

from __future__ import annotations

from vitprobe.measures.attention import ATTENTION_MEASURES, AttentionMeasure
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.cka import CKA, FirstDirectionShare

_ALL: tuple[type[Measure], ...] = (CKA, *ATTENTION_MEASURES, FirstDirectionShare)

MEASURES: dict[str, Info] = {cls.info.name: cls.info for cls in _ALL}
ATTENTION: dict[str, type[AttentionMeasure]] = {cls.info.name: cls for cls in ATTENTION_MEASURES}
