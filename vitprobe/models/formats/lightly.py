"""lightly, https://github.com/lightly-ai/lightly, around timm's VisionTransformer.

The wrapper that masks tokens keeps timm's model as `vit`: `backbone.vit.`, beside a
`student_backbone.vit.` (then the other is its moving average, as in lightly's DINO) or a
`teacher_backbone.vit.`. Around torchvision's model, its files are torchvision's dialect.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect
from vitprobe.models.formats.timm import TIMM

LIGHTLY = Dialect(
    name="lightly",
    recognise=lambda branches, settings: any(
        branch.prefix.endswith("backbone.vit.") for branch in branches
    ),
    branches=("model", "teacher_backbone", "student_backbone"),
    ignored=rf"{TIMM.ignored}|(teacher_|student_|momentum_)?(\w*head|decoder|online_classifier)\.",
)
