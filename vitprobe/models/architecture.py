"""Infer a Vision Transformer's architecture from its tensors.

Shapes give width, depth, patch, channels, grid, prefix tokens, MLP width and gate, biases, layer
scale, relative positions, which norms there are, and the head. What they do not give (the number of
attention heads, the LayerNorm epsilon, the activation) comes from `vitprobe.models.evidence`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models.evidence import (
    RELATIVE_TABLE,
    Evidence,
    activation,
    heads,
    norm_eps,
    with_named,
)
from vitprobe.models.model import ASSUMED, Fact
from vitprobe.models.rebuilding import ROPE_BASE, Architecture, Kind, mlp_ratio

_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
_SHARED_TABLE = f"rel_pos_bias.{RELATIVE_TABLE}"
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
    "activation",
}


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
    swiglu = hidden == 2 * _shape(path, tensors, "blocks.0.mlp.fc2.weight", 2)[1]
    rope, relative = evidence.find("rope") is not None, _relative(tensors)
    # All models with rotary positions have one, and no count of positions shows that it is lost.
    class_token, distilled = rope or "cls_token" in tensors, "dist_token" in tensors
    registers = _shape(path, tensors, "reg_token", 3)[1] if "reg_token" in tensors else 0
    prefix = class_token + distilled + registers
    pooled = _any(tensors, r"fc_norm\.") and not _any(tensors, r"norm\.")
    pre_norm = _any(tensors, r"norm_pre\.")
    stated = {
        "embed_dim": width,
        "depth": depth,
        "in_chans": channels,
        "patch_size": tuple(patch),
        "class_token": class_token,
        "reg_tokens": registers,
    }
    _check_config(path, evidence.config, stated)
    _check_settings(path, evidence, stated)
    evidence = with_named(path, evidence, width, depth)

    kind: Kind = "rope" if rope else "beit" if relative else "distilled" if distilled else "vit"
    stored_grid, no_embed_class, grid_fact = _grid(path, tensors, prefix, patch, kind, evidence)
    grid = _new_grid(stored_grid, patch, evidence.options.get("size"))
    antialias = _antialias(evidence)
    head_fact = heads(path, tensors, width, evidence)
    eps = norm_eps(path, evidence)
    act, act_layer = activation(path, evidence)
    if kind in ("beit", "rope"):
        _check_activation(path, act, nn.SiLU if swiglu else nn.GELU)
    if swiglu:
        act = Fact("SwiGLU", "tensor shape")
    patch_bias = _find_patch_bias(tensors, pre_norm, evidence)
    arguments = {
        **stated,
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "num_heads": head_fact.value,
        "mlp_ratio": mlp_ratio(hidden, width),
        "pos_embed": "learn" if "pos_embed" in tensors else "none",
        "no_embed_class": no_embed_class,
        "qkv_bias": _any(tensors, r"blocks\.\d+\.attn\.qkv\.bias"),
        "proj_bias": _any(tensors, r"blocks\.\d+\.attn\.proj\.bias"),
        "qk_norm": _any(tensors, r"blocks\.\d+\.attn\.q_norm\."),
        "init_values": 1.0 if _any(tensors, r"blocks\.\d+\.ls1\.") else None,
        "pre_norm": pre_norm,
        "num_classes": _classes(tensors, width, distilled),
        "global_pool": "avg" if pooled or not class_token else "token",
        "fc_norm": pooled,
        "norm_layer": partial(nn.LayerNorm, eps=eps.value),
        "act_layer": act_layer,
    }
    if rope:
        arguments["rope_base"] = _rope_base(path, evidence)
    shapes = {
        "width": width,
        "depth": depth,
        "patch_size": tuple(patch),
        "prefix_tokens": prefix,
        "registers": registers,
        "mlp_ratio": round(hidden / (2 if swiglu else 1) / width, 6),
        "norm_before_blocks": pre_norm,
        "final_norm": "fc_norm" if pooled else "norm",
    }
    facts = {
        **{name: Fact(value, "tensor shape") for name, value in shapes.items()},
        "grid": grid_fact if grid == stored_grid else Fact(grid, "user", "from size"),
        "heads": head_fact,
        "norm_eps": eps,
        "activation": act,
        "positions": _positions(tensors, relative, rope),
        "position_embedding": Fact("computed for the grid", "dialect")
        if rope and "pos_embed" not in tensors
        else _position_fact(kind, stored_grid, grid, antialias),
    }
    return Architecture(
        kind, arguments, swiglu, patch_bias, relative, stored_grid, grid, antialias, facts
    )


def _relative(tensors: Iterable[str]) -> Literal["table", "shared"] | None:
    if _SHARED_TABLE in tensors:
        return "shared"
    return "table" if _any(tensors, rf"blocks\.\d+\.attn\.{RELATIVE_TABLE}$") else None


def _positions(tensors: Iterable[str], relative: str | None, rope: bool) -> Fact:
    """Where the model learns of places, in words."""
    relatively = {None: "", "table": "relative", "shared": "relative, shared by the blocks"}
    kinds = ["absolute" * ("pos_embed" in tensors), relatively[relative], "rotary" * rope]
    return Fact(" and ".join(filter(None, kinds)), "tensor shape")


def _check_activation(path: Path, stated: Fact, built: type[nn.Module]) -> None:
    if stated.evidence in ("user", "config", "args") and stated.value != built.__name__:
        raise CheckpointError(
            f"'{path}' has the activation {stated.value} ({stated.evidence}), where timm's model "
            f"with such positions has {built.__name__}."
        )


def _antialias(evidence: Evidence) -> bool:
    fact = evidence.find("antialias")
    return True if fact is None else bool(fact.value)


def _find_patch_bias(tensors: Iterable[str], pre_norm: bool, evidence: Evidence) -> bool:
    """A bias that is missing is a defect of the file, unless a norm follows or the dialect says."""
    fact = evidence.find("patch_bias")
    usual = not pre_norm if fact is None else bool(fact.value)
    return "patch_embed.proj.bias" in tensors or usual


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


def _check_settings(path: Path, evidence: Evidence, found: Mapping[str, Any]) -> None:
    for name in ("embed_dim", "depth"):
        said = evidence.stated.get(name)
        if type(said) is int and said != found[name]:
            raise CheckpointError(
                f"'{path}' contradicts itself: its {evidence.saved_as} gives {name} {said}, its "
                f"tensors {found[name]}; copy the model again, or its weights alone."
            )


def _rope_base(path: Path, evidence: Evidence) -> float:
    fact = evidence.find("rope_base")
    if fact is None:
        return ROPE_BASE
    if type(fact.value) not in (int, float) or not 1 < fact.value < math.inf:
        raise CheckpointError(f"'{path}' states the base {fact.value} of its rotary periods.")
    return float(fact.value)


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value if isinstance(value, list | tuple) else (value, value)
    return rows, columns


def _grid(
    path: Path,
    tensors: Mapping[str, Tensor],
    prefix: int,
    patch: list[int],
    kind: Kind,
    evidence: Evidence,
) -> tuple[tuple[int, int], bool, Fact]:
    """(rows, columns) of the stored positions, and whether they leave out the prefix tokens.

    A count of positions, with the prefix tokens' own or without, is that of the grid at the size
    that the user gives, or else a square one.
    """
    if "pos_embed" not in tensors and kind == "rope":
        return _rope_grid(path, patch, evidence)
    if "pos_embed" not in tensors and kind == "beit":
        return _relative_grid(path, tensors, patch, evidence)
    positions = _shape(path, tensors, "pos_embed", 3)[1]
    counts = {positions - prefix: False, positions: prefix > 0}
    if prefix and (left_out := evidence.find("no_embed_class")) is not None:
        counts = {count: left for count, left in counts.items() if left == bool(left_out.value)}

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
    # Other settings may be older than the weights, hence only count where they fit them.
    saved = _saved_size(evidence)
    if saved and (found := from_size(saved, evidence.saved_as)):
        return found
    given = from_size(evidence.options["size"], "user") if "size" in evidence.options else None
    for count, no_embed_class in counts.items():
        if given and given[0][0] * given[0][1] == count:
            return given
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return (side, side), no_embed_class, Fact((side, side), "tensor shape")
    raise CheckpointError(
        f"'{path}' has {positions} positions in pos_embed, no square grid beside {prefix} prefix "
        "tokens: give the size it was trained at as size=HxW, unless its cls_token, dist_token "
        "or reg_token is missing."
    )


def _saved_size(evidence: Evidence) -> tuple[int, int] | None:
    """(height, width) of the images, if the settings beside the weights state a possible one."""
    size = evidence.stated.get("img_size")
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    return None


def _rope_grid(
    path: Path, patch: list[int], evidence: Evidence
) -> tuple[tuple[int, int], bool, Fact]:
    """Rotary positions have no size of their own."""
    fact = Fact(evidence.options.get("size"), "user")
    if fact.value is None:
        fact = Fact(_saved_size(evidence), evidence.saved_as)
    if fact.value is None:
        fact = evidence.assumption("img_size") or Fact((224, 224), ASSUMED)
    sides = _pair(fact.value)
    grid = (sides[0] // patch[0], sides[1] // patch[1])
    if 0 in grid:
        raise CheckpointError(
            f"An image of {sides[0]}x{sides[1]} holds no patch of '{path}'; give its size as size=."
        )
    return grid, False, Fact(grid, fact.evidence, f"images of {sides[0]}x{sides[1]}")


def _relative_grid(
    path: Path, tensors: Mapping[str, Tensor], patch: list[int], evidence: Evidence
) -> tuple[tuple[int, int], bool, Fact]:
    """A table has (2 rows - 1) (2 columns - 1) offsets and three entries for the class token."""
    key = next(key for key in tensors if key.endswith(RELATIVE_TABLE))
    entries = _shape(path, tensors, key, 2)[0]
    size = evidence.options.get("size")
    if size is not None:
        rows, columns = (side // p for side, p in zip(size, patch, strict=True))
        if (2 * rows - 1) * (2 * columns - 1) + 3 == entries:
            return (rows, columns), False, Fact((rows, columns), "user")
    side = (math.isqrt(max(entries - 3, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + 3 == entries:
        return (side, side), False, Fact((side, side), "tensor shape")
    raise CheckpointError(
        f"{key} in '{path}' has {entries} entries, those of no square grid: give the size it was "
        "trained at as size=HxW."
    )


def _new_grid(
    stored: tuple[int, int], patch: list[int], size: tuple[int, int] | None
) -> tuple[int, int]:
    """(rows, columns) at the size that the user asks for."""
    if size is None:
        return stored
    if size[0] % patch[0] or size[1] % patch[1]:
        raise SourceError(
            f"size={size[0]}x{size[1]} is not a multiple of the model's patch, "
            f"{patch[0]}x{patch[1]} pixels."
        )
    return size[0] // patch[0], size[1] // patch[1]


def _position_fact(
    kind: Kind, stored: tuple[int, int], grid: tuple[int, int], antialias: bool
) -> Fact:
    if grid == stored:
        return Fact("as loaded", "tensor shape")
    text = resized_text(stored, grid, antialias=antialias)
    if kind == "beit":
        text += "; relative ones by a geometric series, as BEiT's authors do"
    return Fact(text, "user", "from size")


def resized_text(stored: tuple[int, int], grid: tuple[int, int], *, antialias: bool = True) -> str:
    """How position embeddings were resized, in words."""
    how = "bicubic antialiased" if antialias else "bicubic, not antialiased,"
    return f"resized {how} from {stored[0]}x{stored[1]} to {grid[0]}x{grid[1]}"
