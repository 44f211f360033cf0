"""What the probe must know of a live model: blocks, norms, grid, prefix tokens, pixels a patch.

The attributes are those of timm's VisionTransformer and its kin (DeiT, DINOv2, registers, BEiT,
EVA): one list of blocks with `attn` and usually `norm1`, a `patch_embed` beside it, and a final
`norm` or `fc_norm`. What attributes cannot tell (whether `norm1` really is what the attention
reads, how many tokens enter the blocks) is seen by running the first block once on a blank image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError


@dataclass(frozen=True)
class Anatomy:
    """What capture needs of a live model; module paths are those of `named_modules()`.

    blocks: the transformer blocks in order, "blocks.0", …
    norms: the pre-norm whose output block i's attention reads; None where there is none.
    attentions: the attention module of each block.
    heads: attention heads of each block; None where the module does not say.
    final_norm: "norm" or "fc_norm"; None where the model has none.
    final_norm_pooled: whether the model applies it after pooling (`fc_norm`).
    prefix_tokens: class, distillation and register tokens, which come first.
    class_token: whether the first of them is a class token: so where the module does not say that
        it has none, as timm's models of registers alone do.
    grid: (rows, columns) of patches.
    patch_size: (height, width) of a patch in pixels of the model's input.
    pre_norm: whether the blocks normalise before their attention.
    """

    blocks: tuple[str, ...]
    norms: tuple[str | None, ...]
    attentions: tuple[str, ...]
    heads: tuple[int | None, ...]
    final_norm: str | None
    final_norm_pooled: bool
    prefix_tokens: int
    class_token: bool
    grid: tuple[int, int]
    patch_size: tuple[float, float]
    width: int
    pre_norm: bool


def find_input_size(module: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that the model's own patch embedding names.

    Raises CaptureError where it names none.
    """
    embed = _patch_embed(module, _block_list(module))
    weight = next((parameter for parameter in embed.parameters() if parameter.ndim == 4), None)
    size = getattr(embed, "img_size", None)
    if weight is None or size is None:
        raise CaptureError(
            f"The patch_embed of this {_kind(module)} does not name its input size; give it as "
            "input_size=(channels, height, width)."
        )
    return weight.shape[1], *_pair(size)


def find_anatomy(module: nn.Module, input_size: tuple[int, int, int]) -> Anatomy:
    """The anatomy of a module in eval mode, for inputs of (channels, height, width).

    Raises CaptureError, naming what was not found, where the module is no Vision Transformer of
    timm's shape, or does not run on such an input.
    """
    path = _block_list(module)
    root = f"{path.rpartition('.')[0]}."
    root = root if root != "." else ""
    embed = _patch_embed(module, path)
    grid, patch_size = _geometry(module, embed, input_size[1:])
    blocks = [
        (f"{path}.{name}", block) for name, block in module.get_submodule(path).named_children()
    ]
    tokens, width, pre_norm = _run_first_block(module, blocks[0][1], input_size)
    prefix = tokens - grid[0] * grid[1]
    encoder = module.get_submodule(root.rstrip("."))
    stated = getattr(encoder, "num_prefix_tokens", prefix)
    if prefix < 0 or stated != prefix:
        raise CaptureError(
            f"The blocks of this {_kind(module)} read {tokens} tokens, which are not a grid of "
            f"{grid[0]}x{grid[1]} patches and {max(stated, 0)} prefix tokens."
        )
    final_norm = next(
        (
            name
            for name in ("norm", "fc_norm")
            if isinstance(norm := _submodule(module, root + name), nn.Module)
            and not isinstance(norm, nn.Identity)
        ),
        None,
    )
    return Anatomy(
        blocks=tuple(name for name, _ in blocks),
        norms=tuple(f"{name}.norm1" if pre_norm else None for name, _ in blocks),
        attentions=tuple(f"{name}.attn" for name, _ in blocks),
        heads=tuple(getattr(block.attn, "num_heads", None) for _, block in blocks),
        final_norm=root + final_norm if final_norm else None,
        final_norm_pooled=final_norm == "fc_norm",
        prefix_tokens=prefix,
        class_token=prefix > 0 and getattr(encoder, "cls_token", True) is not None,
        grid=grid,
        patch_size=patch_size,
        width=width,
        pre_norm=pre_norm,
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _block_list(module: nn.Module) -> str:
    """Path of the one list of blocks that have an `attn` module."""
    lists = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        and len(child)
        and all(isinstance(getattr(block, "attn", None), nn.Module) for block in child)
    ]
    if not lists:
        raise CaptureError(
            f"This {_kind(module)} is no Vision Transformer of timm's shape: it has no list of "
            "blocks that each have an 'attn' module."
        )
    if len(lists) > 1:
        raise CaptureError(
            f"This {_kind(module)} has several lists of blocks ({', '.join(lists[:3])}); only "
            "models with a single one, as timm's VisionTransformer, can be probed."
        )
    return lists[0]


def _patch_embed(module: nn.Module, blocks: str) -> nn.Module:
    path = f"{blocks.rpartition('.')[0]}.patch_embed".lstrip(".")
    embed = _submodule(module, path)
    if embed is None:
        raise CaptureError(
            f"This {_kind(module)} has no '{path}' beside its blocks, so where its patches lie is "
            "unknown."
        )
    return embed


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value if isinstance(value, list | tuple) else (value, value)
    return int(rows), int(columns)


def _geometry(
    module: nn.Module, embed: Any, size: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Rows and columns of patches, and the pixels of one."""
    # A hybrid's patch is one of feature maps: only its feat_ratio counts in pixels of the input.
    if hasattr(embed, "feat_ratio"):
        patch = _pair(embed.feat_ratio(as_scalar=False))
    elif hasattr(embed, "patch_size"):
        patch = _pair(embed.patch_size)
    else:
        raise CaptureError(f"The patch_embed of this {_kind(module)} has no 'patch_size'.")
    if getattr(embed, "grid_size", None) and _pair(embed.img_size) == size:
        grid = _pair(embed.grid_size)
    else:
        grid = (size[0] // patch[0], size[1] // patch[1])
    return grid, (float(patch[0]), float(patch[1]))


class _SeenEnoughError(Exception):
    """Ends the forward pass once the first block has run."""


def _run_first_block(
    module: nn.Module, block: nn.Module, input_size: tuple[int, int, int]
) -> tuple[int, int, bool]:
    """Tokens and width entering the blocks, and whether attention reads the output of `norm1`."""
    shapes: list[tuple[int, ...]] = []
    normed: list[Any] = []
    read: list[Any] = []

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes.append(tuple(inputs[0].shape))

    def leave(*_: Any) -> None:
        raise _SeenEnoughError

    def attend(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        read.append(inputs[0] if inputs else next(iter(named.values()), None))

    hooks = [
        block.register_forward_pre_hook(enter),
        block.register_forward_hook(leave),
        block.get_submodule("attn").register_forward_pre_hook(attend, with_kwargs=True),
    ]
    if isinstance(norm := getattr(block, "norm1", None), nn.Module):
        hooks.append(norm.register_forward_hook(lambda *call: normed.append(call[2])))
    try:
        with torch.no_grad():
            module(_blank_image(module, input_size))
    except _SeenEnoughError:
        pass
    except Exception as error:  # whatever a foreign module raises, the user learns on which input
        size = "x".join(map(str, input_size))
        raise CaptureError(
            f"This {_kind(module)} does not run on an input of {size} (channels x height x width): "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not shapes or len(shapes[0]) != 3:
        raise CaptureError(
            f"The first block of this {_kind(module)} does not read tokens of the shape (images, "
            "tokens, width)."
        )
    return shapes[0][1], shapes[0][2], bool(normed and read) and read[0] is normed[0]


def _blank_image(module: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    like = next((parameter for parameter in module.parameters()), torch.empty(0))
    return torch.zeros(1, *input_size, dtype=like.dtype, device=like.device)
