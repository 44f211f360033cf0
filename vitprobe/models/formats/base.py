"""What a checkpoint dialect has to say, and the helpers all of them share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Wrappers that training code puts around a model (DDP, torch.compile, Lightning, and plain names
# for "the encoder"): they say nothing about which encoder it is.
_WRAPPERS = (
    *("module", "_orig_mod", "model", "backbone", "encoder", "net"),
    *("vit", "visual", "trunk", "vision_model"),
)
# Wrappers around single modules of it (torch.compile, activation checkpointing, FSDP).
_WITHIN = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
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
Tensors = dict[str, Tensor]


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


def _nothing(_: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Dialect:
    """How one family of training code writes its checkpoints.

    Its facts go by these names: `num_heads`, `norm_eps`, `activation` (of
    `vitprobe.models.evidence.ACTIVATIONS`), `img_size` (a side, or (height, width), in pixels),
    `mean`, `std`, `antialias` (whether its own forward pass resizes position embeddings with
    antialiasing, as timm does), `embed_dim` and `depth` (which the tensors must not contradict),
    `timm_model` (the name of timm's model that the encoder is),
    `patch_bias` (whether the patch embedding adds a bias), `no_embed_class` (whether
    position embeddings leave out the prefix tokens), `rope` ("dinov3": rotary positions) and
    `rope_base` (of their periods).
    What is None is not said.

    recognise: whether a file with these encoders, each of which has the `landmark`, and these
        settings saved beside them, is one.
    ignored: a pattern for keys, less their wrappers, known not to belong to the encoder.
    branches: names of its encoders, the default first.
    landmark: the encoder's own key, as the file has it, that every such file has; what stands
        before it is the encoder's prefix.
    rename: (pattern, replacement) pairs that turn the dialect's keys into timm's, or into those of
        `vitprobe.models.merging`.
    convert: turns the encoder's renamed tensors into timm's where renaming is not enough. What it
        drops counts as used.
    heads: the number of attention heads that its named architectures have ("vit_small": 12).
    usual_heads: the number at a given width where its convention is not 64 channels a head.
    stated: facts that the settings saved beside the weights state.
    seen: facts that the encoder's own tensors show, under their new names and not yet converted.
    fixed: facts that hold for every file of the dialect.
    usual: facts to be assumed where nothing says otherwise.
    """

    name: str
    recognise: Callable[[Sequence[Branch], Settings], bool]
    ignored: str
    branches: tuple[str, ...] = ("model", "ema")
    landmark: str = "patch_embed.proj.weight"
    rename: tuple[tuple[str, str], ...] = ()
    convert: Callable[[Tensors], Tensors] = _as_they_are
    heads: Mapping[str, int] | None = None
    usual_heads: Mapping[int, int] | None = None
    stated: Callable[[Settings], Mapping[str, Any]] = _nothing
    seen: Callable[[Tensors], Mapping[str, Any]] = _nothing
    fixed: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)

    def ignores(self, key: str) -> bool:
        """Whether this key, less the encoder's own prefix, is known not to belong to it."""
        return re.match(self.ignored, strip_wrappers(key)) is not None

    def to_timm(self, key: str) -> str:
        """timm's name for one of the encoder's own keys."""
        key = _WITHIN.sub("", key)
        for pattern, replacement in self.rename:
            key = re.sub(pattern, replacement, key)
        return key


def architecture_name(settings: Settings) -> str:
    """The name under which the training code knew the model (`--arch`, `--model`), or ""."""
    names = (settings.get(key) for key in ("arch", "architecture", "model", "model_name"))
    return next((name for name in names if isinstance(name, str)), "")


def fold_class_position(tensors: Tensors) -> Tensors:
    """With registers, the position of the class token added to that token.

    They are put between it and the patches and have no position; in timm no prefix token has one
    then.
    """
    if not {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        return tensors
    token, positions = tensors["cls_token"], tensors["pos_embed"]
    fits = positions.ndim == 3 and token.shape == positions[:, :1].shape
    if not (fits and token.is_floating_point() and positions.is_floating_point()):
        return tensors  # which is refused for its shape or kind
    # In single precision: half of it would round the sum.
    token = token.float() + positions[:, :1].float()
    return tensors | {"cls_token": token, "pos_embed": positions[:, 1:]}
