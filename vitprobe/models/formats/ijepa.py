"""I-JEPA (Assran et al. 2023), https://github.com/facebookresearch/ijepa.

Containers `target_encoder`, the moving average that its authors evaluate and hence the default,
and `encoder`, with keys under `module.`; no class token.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect

_BRANCHES = ("target_encoder", "encoder")

IJEPA = Dialect(
    name="ijepa",
    recognise=lambda branches, settings: all(
        branch.name in _BRANCHES and "cls_token" not in branch.keys for branch in branches
    ),
    branches=_BRANCHES,
    ignored=r"predictor\.|head\.",
    usual_heads={1280: 16, 1408: 16},
    fixed={"norm_eps": 1e-6, "activation": "gelu", "antialias": False},
)
