"""Checkpoint dialects, one small file each.

`DIALECTS` is asked in this order and the first that recognises a file reads it; timm's comes last,
for it takes anything with a Vision Transformer's keys.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Branch, Dialect
from vitprobe.models.formats.beit import BEIT
from vitprobe.models.formats.clip import (
    OPEN_CLIP,
    OPEN_CLIP_TIMM,
    OPEN_CLIP_WITHOUT_NORM,
    OPENAI_CLIP,
)
from vitprobe.models.formats.dino import DINO
from vitprobe.models.formats.dinov2 import DINOV2
from vitprobe.models.formats.dinov3 import DINOV3
from vitprobe.models.formats.huggingface import HUGGINGFACE
from vitprobe.models.formats.ibot import IBOT
from vitprobe.models.formats.ijepa import IJEPA
from vitprobe.models.formats.jax import JAX
from vitprobe.models.formats.lightly import LIGHTLY
from vitprobe.models.formats.mae import MAE
from vitprobe.models.formats.mae_lite import MAE_LITE
from vitprobe.models.formats.mmpretrain import MMPRETRAIN
from vitprobe.models.formats.moco import MOCO_V3
from vitprobe.models.formats.solo_learn import SOLO_LEARN
from vitprobe.models.formats.timm import DEIT, TIMM
from vitprobe.models.formats.torchvision import TORCHVISION

_CLIP = (OPENAI_CLIP, OPEN_CLIP, OPEN_CLIP_WITHOUT_NORM)
_OTHER_NAMES = (*HUGGINGFACE, *_CLIP, TORCHVISION, MMPRETRAIN, JAX)
_WRAPPED = (OPEN_CLIP_TIMM, LIGHTLY, SOLO_LEARN, MAE_LITE, MOCO_V3)
_TIMM_NAMES = (DINOV3, DINOV2, IBOT, DINO, BEIT, IJEPA, MAE, DEIT, TIMM)
DIALECTS = (*_OTHER_NAMES, *_WRAPPED, *_TIMM_NAMES)

__all__ = ["DIALECTS", "Branch", "Dialect"]
