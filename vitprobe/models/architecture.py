"""Infer a Vision Transformer's architecture from its tensors, and rebuild it with timm.

Shapes give width, depth, patch, channels, grid, prefix tokens, MLP width, biases, layer scale,
which final norm there is, and the head. They do not give the number of attention heads, the
LayerNorm epsilon or the activation: those come from what lies beside the weights, from the user, or
from convention, and then the fact says "assumed".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models.formats.base import Dialect, architecture_name
from vitprobe.models.model import ASSUMED, Fact

# timm's convention is 64 channels a head; its largest models are the exceptions.
_USUAL_HEADS = {1280: 16, 1408: 16, 1664: 16}
_HEAD_COUNTS = ("num_heads", "n_heads", "heads", "encoder_num_heads")
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
# Arguments of timm's VisionTransformer that a config beside the weights may state.
_CONFIG = {
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "class_token",
    "global_pool",
    "reg_tokens",
    "no_embed_class",
    "qkv_bias",
    "init_values",
    "norm_eps",
}


@dataclass(frozen=True)
class Evidence:
    """All that may say what shapes cannot.

    options: the user's (`vitprobe.models.sources.OPTIONS`).
    config: arguments of timm's VisionTransformer, complete, from the file's own metadata.
    settings: of the training run, saved beside the weights.
    """

    options: Mapping[str, Any]
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    dialect: Dialect


@dataclass(frozen=True)
class Architecture:
    """A plain Vision Transformer.

    arguments: of timm's VisionTransformer.
    distilled: whether it has DeiT's distillation token.
    stored_grid, grid: (rows, columns) of patches in the file and in the model to build.
    """

    arguments: dict[str, Any]
    distilled: bool
    stored_grid: tuple[int, int]
    grid: tuple[int, int]
    facts: dict[str, Fact]

    def build(self, seed: int | None = None) -> VisionTransformer:
        """timm's module with its initialisation under `seed`, or with arbitrary weights, to be
        filled. The global random state stays as it is."""
        build = VisionTransformerDistilled if self.distilled else VisionTransformer
        # timm's distilled class had no "skip" at first.
        skip: dict[str, Any] = {} if self.distilled or seed is not None else {"weight_init": "skip"}
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return build(**self.arguments, **skip)

    def fit_positions(self, pos_embed: Tensor) -> Tensor:
        """Position embeddings (1, tokens, width) for `grid`, resized bicubic and antialiased."""
        prefix = self.facts["prefix_tokens"].value
        return resample_abs_pos_embed(
            pos_embed.float(),
            new_size=list(self.grid),
            old_size=list(self.stored_grid),
            num_prefix_tokens=0 if self.arguments["no_embed_class"] else prefix,
        )


def infer_architecture(
    path: Path, tensors: Mapping[str, Tensor], evidence: Evidence
) -> Architecture:
    """The architecture of the encoder with these tensors, under timm's names.

    Raises CheckpointError where a tensor that it is read from is missing or has an impossible
    shape, where the file contradicts its own config, and where nothing gives the number of heads;
    SourceError where an option of the user does not fit.
    """
    width, channels, *patch = _shape(path, tensors, "patch_embed.proj.weight", 4)
    depth = _depth(path, tensors)
    hidden, _ = _shape(path, tensors, "blocks.0.mlp.fc1.weight", 2)
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) != hidden:
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    registers = _shape(path, tensors, "reg_token", 3)[1] if "reg_token" in tensors else 0
    prefix = class_token + distilled + registers
    pooled = _any(tensors, r"fc_norm\.") and not _any(tensors, r"norm\.")
    stated = {
        "embed_dim": width,
        "depth": depth,
        "in_chans": channels,
        "patch_size": tuple(patch),
        "class_token": class_token,
        "reg_tokens": registers,
    }
    _check_config(path, evidence.config, stated)

    stored_grid, no_embed_class, grid_fact = _grid(path, tensors, prefix, patch, evidence)
    grid, position_fact = _resized(stored_grid, patch, evidence.options.get("size"))
    heads = _heads(path, tensors, width, depth, evidence)
    eps = _norm_eps(evidence)
    arguments = {
        **stated,
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "num_heads": heads.value,
        "mlp_ratio": mlp_ratio,
        "no_embed_class": no_embed_class,
        "qkv_bias": _any(tensors, r"blocks\.\d+\.attn\.qkv\.bias"),
        "proj_bias": _any(tensors, r"blocks\.\d+\.attn\.proj\.bias"),
        "qk_norm": _any(tensors, r"blocks\.\d+\.attn\.q_norm\."),
        "init_values": 1.0 if _any(tensors, r"blocks\.\d+\.ls1\.") else None,
        "pre_norm": _any(tensors, r"norm_pre\."),
        "num_classes": _classes(tensors, width, distilled),
        "global_pool": "avg" if pooled or not class_token else "token",
        "fc_norm": pooled,
        "norm_layer": partial(nn.LayerNorm, eps=eps.value),
    }
    activation = Fact("GELU", "config") if evidence.config else Fact("GELU", ASSUMED)
    shapes = {
        "width": width,
        "depth": depth,
        "patch_size": tuple(patch),
        "prefix_tokens": prefix,
        "mlp_ratio": round(mlp_ratio, 6),
        "final_norm": "fc_norm" if pooled else "norm",
    }
    facts = {
        **{name: Fact(value, "tensor shape") for name, value in shapes.items()},
        "grid": grid_fact if grid == stored_grid else Fact(grid, "user", "from size"),
        "heads": heads,
        "norm_eps": eps,
        "activation": activation,
        "position_embedding": position_fact,
    }
    return Architecture(arguments, distilled, stored_grid, grid, facts)


def _any(tensors: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in tensors)


def _shape(path: Path, tensors: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(
            f"'{path}' lacks {key}, without which it fills no Vision Transformer."
        )
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"{key} in '{path}' has the shape {shape}, which no plain Vision Transformer has."
        )
    return shape


def _depth(path: Path, tensors: Iterable[str]) -> int:
    present = {int(match[1]) for key in tensors if (match := _BLOCK.match(key))}
    expected = range(max(present, default=0) + 1)
    if absent := sorted(set(expected) - present):
        raise CheckpointError(f"'{path}' lacks every tensor of blocks.{absent[0]}.")
    return len(expected)


def _classes(tensors: Mapping[str, Tensor], width: int, distilled: bool) -> int:
    """Number of classes of the linear head; 0 where there is none that timm's model could hold."""
    heads = ["head", "head_dist"] if distilled else ["head"]
    shapes = {
        tuple(tensors[key].shape) if key in tensors else None
        for head in heads
        for key in (f"{head}.weight", f"{head}.bias")
    }
    count = max((shape[0] for shape in shapes if shape), default=0)
    return count if shapes == {(count, width), (count,)} else 0


def _check_config(path: Path, config: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    if unknown := sorted(set(config) - _CONFIG):
        raise CheckpointError(
            f"'{path}' describes its architecture with '{unknown[0]}', which this version of "
            "vitprobe does not know; a newer one may."
        )
    for name, value in stated.items():
        said = config.get(name, value)
        if name == "patch_size":
            said = _pair(said)
        if said != value:
            raise CheckpointError(
                f"'{path}' contradicts itself: its metadata gives {name} {said}, its tensors "
                f"{value}."
            )


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value if isinstance(value, list | tuple) else (value, value)
    return rows, columns


def _grid(
    path: Path,
    tensors: Mapping[str, Tensor],
    prefix: int,
    patch: list[int],
    evidence: Evidence,
) -> tuple[tuple[int, int], bool, Fact]:
    """(rows, columns) of the stored position embeddings, and whether they leave out the prefix.

    A square count of positions is a square grid, with the prefix tokens' own positions or without.
    """
    positions = _shape(path, tensors, "pos_embed", 3)[1]
    counts = {positions - prefix: False, positions: prefix > 0}

    def from_size(size: Any, source: str) -> tuple[tuple[int, int], bool, Fact] | None:
        rows, columns = (side // p for side, p in zip(_pair(size), patch, strict=True))
        if rows * columns not in counts:
            return None
        return (rows, columns), counts[rows * columns], Fact((rows, columns), source)

    if "img_size" in evidence.config:
        found = from_size(evidence.config["img_size"], "config")
        if found is None:
            raise CheckpointError(
                f"'{path}' contradicts itself: its metadata gives img_size "
                f"{evidence.config['img_size']}, which its {positions} positions do not fit."
            )
        return found
    for count, no_embed_class in counts.items():
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return (side, side), no_embed_class, Fact((side, side), "tensor shape")
    if "size" in evidence.options and (found := from_size(evidence.options["size"], "user")):
        return found
    raise CheckpointError(
        f"'{path}' has {positions} positions in pos_embed, no square grid beside {prefix} prefix "
        "tokens: give the size it was trained at as size=HxW, unless its cls_token, dist_token "
        "or reg_token is missing."
    )


def _resized(
    stored: tuple[int, int], patch: list[int], size: tuple[int, int] | None
) -> tuple[tuple[int, int], Fact]:
    if size is None:
        return stored, Fact("as loaded", "tensor shape")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise SourceError(
            f"size={size[0]}x{size[1]} is not a multiple of the model's patch, "
            f"{patch[0]}x{patch[1]} pixels."
        )
    grid = (size[0] // patch[0], size[1] // patch[1])
    if grid == stored:
        return stored, Fact("as loaded", "tensor shape")
    return grid, Fact(resized_text(stored, grid), "user", "from size")


def resized_text(stored: tuple[int, int], grid: tuple[int, int]) -> str:
    """How position embeddings were resized, in words."""
    return f"resized bicubic antialiased from {stored[0]}x{stored[1]} to {grid[0]}x{grid[1]}"


def _norm_eps(evidence: Evidence) -> Fact:
    if "eps" in evidence.options:
        return Fact(evidence.options["eps"], "user")
    if evidence.config:
        return Fact(evidence.config.get("norm_eps", 1e-6), "config")
    return Fact(1e-6, ASSUMED, "timm's default")


def _heads(
    path: Path, tensors: Mapping[str, Tensor], width: int, depth: int, evidence: Evidence
) -> Fact:
    """The number of attention heads, from the strongest evidence there is."""
    if "heads" in evidence.options:
        fact = Fact(evidence.options["heads"], "user")
        if width % fact.value:
            raise SourceError(f"heads={fact.value} does not divide the width {width} of '{path}'.")
        return fact
    fact = (
        _heads_from_file(tensors, width, depth, evidence)
        or _heads_by_convention(width, evidence.dialect)
        or Fact(0, ASSUMED)
    )
    if not fact.value or width % fact.value:
        raise CheckpointError(
            f"Nothing in '{path}' says how many attention heads share its width of {width}; "
            "give the number as heads=N."
        )
    return fact


def _heads_from_file(
    tensors: Mapping[str, Tensor], width: int, depth: int, evidence: Evidence
) -> Fact | None:
    config, settings, dialect = evidence.config, evidence.settings, evidence.dialect
    if isinstance(config.get("num_heads"), int):
        return Fact(config["num_heads"], "config")
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    if norm is not None and norm.ndim == 1 and 0 < norm.numel() < width:
        return Fact(width // norm.numel(), "tensor shape", "width of q_norm")
    for name in _HEAD_COUNTS:
        if isinstance(settings.get(name), int) and settings[name] > 0:
            return Fact(settings[name], "args", name)
    name = architecture_name(settings)
    if dialect.heads and name in dialect.heads:
        return Fact(dialect.heads[name], "args", name)
    model = name.partition(".")[0]
    if model in timm.list_models():
        with torch.random.fork_rng(devices=[]):
            named = timm.create_model(model, pretrained=False)
        blocks: Any = getattr(named, "blocks", ())
        if isinstance(named, VisionTransformer) and (named.embed_dim, len(blocks)) == (
            width,
            depth,
        ):
            return Fact(blocks[0].attn.num_heads, "args", name)
    return None


def _heads_by_convention(width: int, dialect: Dialect) -> Fact | None:
    if dialect.usual_heads and width in dialect.usual_heads:
        return Fact(dialect.usual_heads[width], ASSUMED, f"the convention of {dialect.name}")
    if width in _USUAL_HEADS:
        return Fact(_USUAL_HEADS[width], ASSUMED, "timm's at this width")
    return Fact(width // 64, ASSUMED, "64 channels a head") if width % 64 == 0 else None
