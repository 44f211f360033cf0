"""Masked autoencoders (He et al. 2022), https://github.com/facebookresearch/mae.

Container `model` with `args`. Pre-training leaves the encoder with `mask_token` and `decoder_*`, or
the encoder alone; fine-tuning with average pooling has `fc_norm` in place of `norm`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitprobe.models.formats.base import Branch, Dialect, Settings, architecture_name


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    keys = branches[0].keys
    return (
        any(key.startswith("decoder_") for key in keys)
        or ({"fc_norm.weight", "cls_token"} <= set(keys) and "norm.weight" not in keys)
        or "norm_pix_loss" in settings
        or architecture_name(settings).startswith("mae_")
    )


MAE = Dialect(
    name="mae",
    recognise=_recognise,
    ignored=r"decoder_|decoder\.|mask_token$|(head|head_dist)\.",
    heads={
        "mae_vit_base_patch16": 12,
        "mae_vit_large_patch16": 16,
        "mae_vit_huge_patch14": 16,
        "vit_base_patch16": 12,
        "vit_large_patch16": 16,
        "vit_huge_patch14": 16,
    },
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
