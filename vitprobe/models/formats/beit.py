"""BEiT (Bao et al. 2022) and BEiT v2 (Peng et al. 2022),
https://github.com/microsoft/unilm/tree/master/beit and beit2.

Container `model` or `module` with `args`. Queries and values have a bias, keys have none; tables of
relative positions stand in each block or, after pre-training, once in `rel_pos_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)

from vitprobe.models.formats.base import Branch, Dialect, Settings, Tensors


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    return any(
        key == "blocks.0.attn.q_bias" or key.endswith("relative_position_bias_table")
        for branch in branches
        for key in branch.keys
    )


def _stated(settings: Settings) -> Mapping[str, Any]:
    usual = settings.get("imagenet_default_mean_and_std")
    if not isinstance(usual, bool):
        return {}
    return {
        "mean": IMAGENET_DEFAULT_MEAN if usual else IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_DEFAULT_STD if usual else IMAGENET_INCEPTION_STD,
    }


def _check_mlps(tensors: Tensors) -> Tensors:
    rows, columns = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    packed = rows is not None and columns is not None and len(rows) == 2 * columns.shape[-1]
    if packed or "blocks.0.mlp.fc1_g.weight" in tensors:
        raise ValueError("gated MLPs are EVA-02's, whose rotary positions no tensor shows")
    return tensors


BEIT = Dialect(
    name="beit",
    recognise=_recognise,
    convert=_check_mlps,
    ignored=r".*relative_position_index$|mask_token$|(head|lm_head|cls_pt_layers)\.",
    stated=_stated,
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
