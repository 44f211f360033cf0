"""timm's own checkpoints, and those of the many codes that train timm's VisionTransformer.

Containers `state_dict`, `model` or none, with `state_dict_ema` or `model_ema` beside; DDP, EMA and
torch.compile add `module.` and `_orig_mod.`. https://github.com/huggingface/pytorch-image-models
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitprobe.models.formats.base import Dialect, Settings, architecture_name


def _stated(settings: Settings) -> Mapping[str, Any]:
    """Facts in the `config.json` of timm's folders on the hub, and in the arguments of train.py."""
    config, *arguments = (
        value if isinstance(value := settings.get(key), Mapping) else {}
        for key in ("pretrained_cfg", "model_args", "model_kwargs")
    )
    size = config.get("input_size")
    return {
        "num_heads": next(
            (given["num_heads"] for given in arguments if "num_heads" in given), None
        ),
        "img_size": size[1:] if isinstance(size, list | tuple) else None,
        "mean": config.get("mean"),
        "std": config.get("std"),
    }


TIMM = Dialect(
    name="timm",
    recognise=lambda branches, settings: True,
    ignored=r"n_averaged$|mask_token$|(head|fc|classifier|head_dist|attn_pool)\.",
    stated=_stated,
)

# DeiT (Touvron et al. 2021), https://github.com/facebookresearch/deit:
# `model`, `model_ema`, `args`.
DEIT = Dialect(
    name="deit",
    recognise=lambda branches, settings: (
        architecture_name(settings).startswith("deit")
        or any("dist_token" in branch.keys for branch in branches)
    ),
    ignored=TIMM.ignored,
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
