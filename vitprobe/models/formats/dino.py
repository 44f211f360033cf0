"""DINO (Caron et al. 2021), https://github.com/facebookresearch/dino.

Containers `teacher` and `student` with `args`, keys under `module.` and `backbone.`, the projector
under `head.`. The teacher is what its authors evaluate, hence the default.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect

_BRANCHES = ("teacher", "student")

DINO = Dialect(
    name="dino",
    recognise=lambda branches, settings: all(branch.name in _BRANCHES for branch in branches),
    branches=_BRANCHES,
    ignored=r"head\.|masked_embed$|mask_token$",
    heads={"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "deit_small": 6},
    fixed={"norm_eps": 1e-6, "activation": "gelu", "antialias": False},
)
