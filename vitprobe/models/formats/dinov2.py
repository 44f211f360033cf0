"""DINOv2 (Oquab et al. 2023, registers: Darcet et al. 2023),
https://github.com/facebookresearch/dinov2.

The released backbones are a bare state dict; training leaves `teacher` (and `student`) with keys
under `backbone.` beside `dino_head.` and `ibot_head.`, or all of them in `model`. Its larger models
chunk their blocks (`blocks.<chunk>.<i>`, where i counts through) and gate their MLPs (`w12`, `w3`).
Registers have no position: that of the class token is added to it before they are put in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from vitprobe.models.formats.base import Branch, Dialect, Settings, Tensors, architecture_name


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    return architecture_name(settings).startswith("dinov2") or any(
        "register_tokens" in keys
        or any(key.startswith("blocks.0.0.") for key in keys)
        or {"mask_token", "blocks.0.ls1.gamma"} <= keys
        for keys in (set(branch.keys) for branch in branches)
    )


def _fold_class_position(tensors: Tensors) -> Tensors:
    if not {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        return tensors
    token, positions = tensors["cls_token"], tensors["pos_embed"]
    fits = positions.ndim == 3 and token.shape == positions[:, :1].shape
    if not (fits and token.is_floating_point() and positions.is_floating_point()):
        return tensors  # which is refused for its shape or kind
    # In single precision: half of it would round the sum.
    token = token.float() + positions[:, :1].float()
    return tensors | {"cls_token": token, "pos_embed": positions[:, 1:]}


DINOV2 = Dialect(
    name="dinov2",
    recognise=_recognise,
    branches=("teacher", "model", "ema", "student"),
    ignored=r"((teacher|student)\.)?(dino_head|ibot_head|dino_loss|ibot_\w*loss|head)\.|mask_token$",
    rename=(
        (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
    ),
    convert=_fold_class_position,
    seen=lambda tensors: {"no_embed_class": "reg_token" in tensors},
    usual_heads={384: 6, 768: 12, 1024: 16, 1536: 24},
    fixed={"norm_eps": 1e-6, "activation": "gelu", "antialias": False},
)
