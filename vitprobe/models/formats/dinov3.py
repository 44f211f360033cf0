"""DINOv3 (Siméoni et al. 2025), https://github.com/facebookresearch/dinov3, and timm's port of it.

A bare state dict, or `teacher` with keys under `backbone.`. Registers are `storage_tokens`;
positions are rotary, of which `rope_embed.periods` holds a quarter of a head's channels. The bias
of queries, keys and values comes with a `bias_mask` that is 0 for keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitprobe.models.formats.base import Branch, Dialect, Settings, Tensors, architecture_name


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    return "dinov3" in architecture_name(settings) or any(
        {"storage_tokens", "rope_embed.periods"} & set(branch.keys) for branch in branches
    )


def _mask_biases(tensors: Tensors) -> Tensors:
    masks = {key: mask for key, mask in tensors.items() if key.endswith(".attn.qkv.bias_mask")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in masks}
    for key, mask in masks.items():
        bias = key.removesuffix("_mask")
        if bias in rest:
            # Whatever stands in a masked place, be it no number, does not count.
            rest[bias] = rest[bias].where(mask != 0, 0)
    return rest


DINOV3 = Dialect(
    name="dinov3",
    recognise=_recognise,
    branches=("teacher", "model", "ema", "student"),
    ignored=(
        r"((teacher|student)\.)?(dino_head|ibot_head|gram_\w+|head|projectors)\."
        r"|local_cls_norm\.|mask_token$"
    ),
    rename=(
        (r"^storage_tokens$", "reg_token"),
        (r"^rope_embed\.periods$", "rope.periods"),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    convert=_mask_biases,
    fixed={"norm_eps": 1e-5, "activation": "gelu", "rope": "dinov3"},
)
