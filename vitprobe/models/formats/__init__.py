"""Checkpoint dialects, one small file each.

`DIALECTS` is asked in this order and the first that recognises a file reads it; timm's comes last,
for it takes anything with a Vision Transformer's keys.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Branch, Dialect
from vitprobe.models.formats.dino import DINO
from vitprobe.models.formats.mae import MAE
from vitprobe.models.formats.mae_lite import MAE_LITE
from vitprobe.models.formats.moco import MOCO_V3
from vitprobe.models.formats.timm import DEIT, TIMM

DIALECTS = (MAE_LITE, MOCO_V3, DINO, MAE, DEIT, TIMM)

__all__ = ["DIALECTS", "Branch", "Dialect"]
