"""DINOv2 (Oquab et al. 2023, registers: Darcet et al. 2023),
https://github.com/facebookresearch/dinov2.

The released backbones are a bare state dict; training leaves `teacher` (and `student`) with keys
under `backbone.` beside `dino_head.` and `ibot_head.`, or all of them in `model`. Its larger models
chunk their blocks (`blocks.<chunk>.<i>`, where i counts through) and gate their MLPs (`w12`, `w3`).
Registers have no position: that of the class token is added to it before they are put in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprobe.models.formats.base import (
    Branch,
    Dialect,
    Settings,
    Tensors,
    architecture_name,
    fold_class_position,
)


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    return architecture_name(settings).startswith("dinov2") or any(
        "register_tokens" in keys
        or any(key.startswith("blocks.0.0.") for key in keys)
        or {"mask_token", "blocks.0.ls1.gamma"} <= keys
        for keys in (set(branch.keys) for branch in branches)
    )


def _seen(tensors: Tensors) -> Mapping[str, Any]:
    """The releases with registers resize positions with antialiasing, those without do not."""
    registers = "reg_token" in tensors
    return {"no_embed_class": registers, "antialias": registers}


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
    convert=fold_class_position,
    seen=_seen,
    usual_heads={384: 6, 768: 12, 1024: 16, 1536: 24},
    fixed={"norm_eps": 1e-6, "activation": "gelu"},
)
