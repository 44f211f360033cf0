"""What a checkpoint dialect has to say, and the helpers all of them share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Wrappers that training code puts around a model (DDP, torch.compile, Lightning, and plain names
# for "the encoder"): they say nothing about which encoder it is.
_WRAPPERS = ("module", "_orig_mod", "model", "backbone", "encoder", "net")
_AT_FRONT = re.compile(rf"^(({'|'.join(_WRAPPERS)})\.)+")
_CONTAINERS = {
    "": "model",
    "model": "model",
    "module": "model",
    "state_dict": "model",
    "model_state_dict": "model",
    "state_dict_ema": "ema",
    "model_ema": "ema",
    "ema": "ema",
}


def strip_wrappers(key: str) -> str:
    """The key without the wrappers at its front: "module._orig_mod.norm.bias" → "norm.bias"."""
    return _AT_FRONT.sub("", key)


@dataclass(frozen=True)
class Branch:
    """One encoder in a checkpoint file.

    container: the path of its state dict within the file ("" for the file itself, "teacher", …).
    prefix: what stands before the encoder's own keys in that state dict ("module.base_encoder.").
    tensors: the whole state dict.
    """

    container: str
    prefix: str
    tensors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """ "model", "ema", "teacher", "base_encoder", …: what a user calls it."""
        inner = ".".join(part for part in self.prefix.split(".") if part and part not in _WRAPPERS)
        outer = _CONTAINERS.get(self.container, self.container)
        return inner if inner and outer == "model" else ".".join(filter(None, (outer, inner)))

    @property
    def keys(self) -> list[str]:
        """The encoder's own keys, without the prefix."""
        return [
            key.removeprefix(self.prefix) for key in self.tensors if key.startswith(self.prefix)
        ]


Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Dialect:
    """How one family of training code writes its checkpoints.

    recognise: whether a file with these encoders, and these settings saved beside them, is one.
    branches: names of its encoders, the default first.
    ignored: a pattern for keys, less their wrappers, known not to belong to the encoder.
    rename: (pattern, replacement) pairs that turn the dialect's keys into timm's.
    heads: the number of attention heads that its named architectures have ("vit_small": 12).
    usual_heads: the number at a given width where its convention is not 64 channels a head.
    """

    name: str
    recognise: Callable[[Sequence[Branch], Settings], bool]
    ignored: str
    branches: tuple[str, ...] = ("model", "ema")
    rename: tuple[tuple[str, str], ...] = ()
    heads: Mapping[str, int] | None = None
    usual_heads: Mapping[int, int] | None = None

    def ignores(self, key: str) -> bool:
        """Whether this key, less the encoder's own prefix, is known not to belong to it."""
        return re.match(self.ignored, strip_wrappers(key)) is not None

    def to_timm(self, key: str) -> str:
        """timm's name for one of the encoder's own keys."""
        for pattern, replacement in self.rename:
            key = re.sub(pattern, replacement, key)
        return key


def architecture_name(settings: Settings) -> str:
    """The name under which the training code knew the model (`--arch`, `--model`), or ""."""
    names = (settings.get(key) for key in ("arch", "model", "model_name"))
    return next((name for name in names if isinstance(name, str)), "")
