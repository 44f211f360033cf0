"""mae-lite (Wang et al. 2023), https://github.com/wangsr126/mae-lite: `.pth.tar` files.

Container `model`, keys under `module.model.`, otherwise as MAE's. Its ViT-Tiny is 192 wide with 12
heads, where timm's has 3; the file does not say so, hence the number is an assumption.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect
from vitprobe.models.formats.mae import MAE

MAE_LITE = Dialect(
    name="mae_lite",
    recognise=lambda branches, settings: any(
        branch.container == "model" and branch.prefix == "module.model." for branch in branches
    ),
    ignored=MAE.ignored,
    usual_heads={192: 12},
    fixed=MAE.fixed,
)
