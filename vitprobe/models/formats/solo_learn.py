"""solo-learn, https://github.com/vturrisi/solo-learn: checkpoints of Lightning.

Container `state_dict` with `hyper_parameters`; timm's keys under `backbone.` and, in methods with a
moving average, `momentum_backbone.`; projectors, predictors and an online classifier beside them.
Under MoCo v3 and MAE its Tiny and Small have 12 heads, where timm's have 3 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprobe.models.formats.base import Branch, Dialect, Settings
from vitprobe.models.formats.timm import TIMM

_HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16}
_TWELVE = {"mocov3": 12, "mae": 12}


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    prefixes = {branch.prefix for branch in branches}
    return prefixes == {"backbone.", "momentum_backbone."} or (
        prefixes == {"backbone."}
        and isinstance(settings.get("method"), str)
        and "backbone" in settings
    )


def _stated(settings: Settings) -> Mapping[str, Any]:
    backbone, method = settings.get("backbone"), settings.get("method")
    if isinstance(backbone, Mapping):
        backbone = backbone.get("name")
    heads = _HEADS.get(backbone) if isinstance(backbone, str) else None
    twelve = _TWELVE.get(method) if isinstance(method, str) else None
    return {"num_heads": max(heads, twelve or 0) if heads else None}


SOLO_LEARN = Dialect(
    name="solo_learn",
    recognise=_recognise,
    branches=("model", "momentum_backbone"),
    ignored=rf"{TIMM.ignored}|(momentum_)?(\w*projector|classifier|decoder)|predictor|prototypes",
    stated=_stated,
)
