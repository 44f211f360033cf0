"""Any live model's anatomy: the quick way for plain Vision Transformers, else by a survey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitprobe.errors import CaptureError
from vitprobe.models.anatomy import Anatomy
from vitprobe.models.plain import plain_anatomy
from vitprobe.models.survey import survey


def find_anatomy(
    module: nn.Module, input_size: tuple[int, int, int], blocks: Sequence[str] = ()
) -> Anatomy:
    """The anatomy of a module in eval mode, for inputs of (channels, height, width).

    blocks: paths of its blocks, where it is not to be found out which they are.

    Raises CaptureError, saying what was not found, where the module does not run on one such image,
    has no list of blocks that could be its layers, or is a TorchScript module.
    """
    script = next((m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if script is not None:
        raise CaptureError(
            f"This {type(module).__name__} is, or holds, a TorchScript module, into which nothing "
            "can be hooked; give the nn.Module that it was made from."
        )
    plain = None if blocks else plain_anatomy(module, input_size)
    return plain or survey(module, input_size, blocks)


def find_input_size(module: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a module itself names: in timm's `pretrained_cfg`, in the
    `config` of transformers, or on its patch embedding.

    Raises CaptureError where it names none.
    """
    stated = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
    if stated is not None:
        channels, height, width = stated
        return channels, height, width
    first = next((weight for weight in module.parameters() if weight.ndim == 4), None)
    size = _stated_size(module)
    if first is None or size is None:
        raise CaptureError(
            f"This {type(module).__name__} does not name its input size; give it as in "
            "wrap(module, name=…, input_size=(channels, height, width))."
        )
    return first.shape[1], *size


def _stated_size(module: nn.Module) -> tuple[int, int] | None:
    config: Any = getattr(module, "config", None)
    embed = next((m for n, m in module.named_modules() if n.endswith("patch_embed")), None)
    for owner, name in ((embed, "img_size"), (config, "image_size"), (module, "image_size")):
        size = getattr(owner, name, None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None
