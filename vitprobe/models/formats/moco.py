"""MoCo v3 (Chen, Xie and He 2021), https://github.com/facebookresearch/moco-v3.

Container `state_dict` with `arch`; `module.base_encoder.` is the trained encoder and
`module.momentum_encoder.` its moving average, each with a projector as its `head`; `predictor` is
beside them. All its ViTs have 12 heads (vits.py), ViT-Small at width 384 included.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect

_BRANCHES = ("base_encoder", "momentum_encoder")

MOCO_V3 = Dialect(
    name="moco_v3",
    recognise=lambda branches, settings: any(branch.name in _BRANCHES for branch in branches),
    branches=_BRANCHES,
    ignored=r"head\.|predictor\.|projector\.|queue",
    heads={"vit_small": 12, "vit_base": 12},
    usual_heads={384: 12},
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
