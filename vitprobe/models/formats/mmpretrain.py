"""mmpretrain, https://github.com/open-mmlab/mmpretrain, and mmcls before it.

Container `state_dict` with `meta`; the encoder under `backbone.`, its blocks `layers.N`. Its ViT
and its BEiT are read. `ln1` is the final norm, `ln2` that of the pooled patches.
"""

from __future__ import annotations

from vitprobe.models.formats.base import Dialect, Tensors

_BLOCK = r"^layers\.(\d+)\."


def _convert(tensors: Tensors) -> Tensors:
    """Without what follows from the grid and, where it is normalised before pooling, after it."""
    twice = "norm.weight" in tensors
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not key.endswith("relative_position_index")
        and not (twice and key.startswith("fc_norm."))
    }


MMPRETRAIN = Dialect(
    name="mmpretrain",
    recognise=lambda branches, settings: any(
        key.startswith("layers.") for branch in branches for key in branch.keys
    ),
    landmark="patch_embed.projection.weight",
    ignored=r"(head|neck|decoder|target_generator|data_preprocessor|momentum)\b"
    r"|mask_token$|.*relative_position_index$",
    rename=(
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^pre_norm\.", "norm_pre."),
        (r"^(ln|norm)1\.", "norm."),
        (r"^(ln|norm)2\.", "fc_norm."),
        (_BLOCK + r"(?:ln|norm)([12])\.", r"blocks.\1.norm\2."),
        (_BLOCK + r"ffn\.(layers\.0\.0|w12)\.", r"blocks.\1.mlp.fc1."),
        (_BLOCK + r"ffn\.(layers\.1|w3)\.", r"blocks.\1.mlp.fc2."),
        (_BLOCK + r"(?:attn|ffn)\.gamma([12])\.(weight|scale)$", r"blocks.\1.ls\2.gamma"),
        (_BLOCK, r"blocks.\1."),
    ),
    convert=_convert,
    fixed={"antialias": False},
    usual={"norm_eps": 1e-6},
)
