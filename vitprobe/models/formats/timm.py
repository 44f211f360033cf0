"""timm's own checkpoints, and those of the many codes that train timm's VisionTransformer.

Containers `state_dict`, `model` or none, with `state_dict_ema` or `model_ema` beside; DDP, EMA and
torch.compile add `module.` and `_orig_mod.`. https://github.com/huggingface/pytorch-image-models
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect, architecture_name

TIMM = Dialect(
    name="timm",
    recognise=lambda branches, settings: True,
    ignored=r"n_averaged$|mask_token$|(head|fc|classifier|head_dist)\.",
    rename=((r"\.gamma_([12])$", r".ls\1.gamma"),),
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
    rename=TIMM.rename,
)
