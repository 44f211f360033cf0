"""The quick way to the anatomy of timm's VisionTransformer and its kin.

They have one list of like blocks with `attn` and usually `norm1`, a `patch_embed` beside it, and a
final `norm` or `fc_norm`; patches lie row by row behind the prefix tokens. What attributes cannot
tell is seen by running the first block once: whether `norm1` really is what the attention reads,
how many tokens enter the blocks, and whether `attn` is one global attention of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitprobe.measures.chunks import grid_positions
from vitprobe.models.anatomy import Anatomy, Layout, Site
from vitprobe.models.calls import AttentionCall, AttentionCalls
from vitprobe.models.trace import SeenEnoughError, noise, run_once


def plain_anatomy(module: nn.Module, input_size: tuple[int, int, int]) -> Anatomy | None:
    """The anatomy of a plain Vision Transformer; None where the module is not clearly one.

    Raises CaptureError where it has its shape but does not run on such an input.
    """
    path = _block_list(module)
    if path is None:
        return None
    root = path.rpartition(".")[0]
    encoder: Any = module.get_submodule(root)
    geometry = _geometry(getattr(encoder, "patch_embed", None), input_size[1:])
    blocks = list(module.get_submodule(path).named_children())
    if geometry is None or not _alike([block for _, block in blocks]):
        return None
    if getattr(encoder, "attn_pool", None) is not None:
        return None
    grid, patch_size = geometry
    patches = grid[0] * grid[1]
    seen = _FirstBlock(module, f"{path}.{blocks[0][0]}")
    with seen:
        run_once(module, noise(module, 1, input_size))
    if len(seen.read) != 3 or len(seen.found) != 1:
        return None
    _, tokens, width = seen.read
    call = seen.found[0]
    prefix = tokens - patches
    stated = getattr(encoder, "num_prefix_tokens", prefix)
    _, heads, queries, keys = call.shape if len(call.shape) == 4 else (0, 0, 0, 0)
    if stated != prefix or prefix < 0 or not queries == keys == tokens:
        return None
    attention = call.path.removeprefix(f"{path}.{blocks[0][0]}.")
    final = next(
        (
            name
            for name in ("norm", "fc_norm")
            if isinstance(norm := getattr(encoder, name, None), nn.Module)
            and not isinstance(norm, nn.Identity)
        ),
        None,
    )
    names = tuple(f"{path}.{name}" for name, _ in blocks)
    layout = Layout("tokens", width, prefix, patches, grid, patch_size)
    places = grid_positions(grid, patch_size)[None]
    return Anatomy(
        blocks=names,
        norms=tuple(f"{name}.norm1" if seen.pre_norm else None for name in names),
        final_norm=f"{root}.{final}".lstrip(".") if final else None,
        final_norm_pooled=final == "fc_norm",
        class_token=prefix > 0 and getattr(encoder, "cls_token", True) is not None,
        pre_norm=seen.pre_norm,
        residual=(layout,) * (len(names) + 1),
        normed=(layout,) * (len(names) + 1) if seen.pre_norm else (),
        sites=tuple(
            Site(
                path=f"{name}.{attention}",
                call=0,
                heads=heads,
                queries=tokens,
                keys=tokens,
                query_prefix=prefix,
                key_prefix=prefix,
                query_xy=places,
                key_xy=places,
            )
            for name in names
        ),
    )


def _block_list(module: nn.Module) -> str | None:
    """Path of the one list of blocks that have an `attn` module."""
    lists = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        and len(child)
        and all(isinstance(getattr(block, "attn", None), nn.Module) for block in child)
    ]
    return lists[0] if len(lists) == 1 else None


def _alike(blocks: list[nn.Module]) -> bool:
    """Whether all blocks have the same modules and parameters, so that one stands for all."""

    def shape(block: nn.Module) -> list[Any]:
        modules = [(name, type(module)) for name, module in block.named_modules()]
        return [*modules, *((name, p.shape) for name, p in block.named_parameters())]

    first = shape(blocks[0])
    return all(shape(block) == first for block in blocks[1:])


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value if isinstance(value, list | tuple) else (value, value)
    return int(rows), int(columns)


def _geometry(
    embed: Any, size: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Rows and columns of patches, and the pixels of one."""
    # A hybrid's patch is one of feature maps: only its feat_ratio counts in pixels of the input.
    if hasattr(embed, "feat_ratio"):
        patch = _pair(embed.feat_ratio(as_scalar=False))
    elif hasattr(embed, "patch_size"):
        patch = _pair(embed.patch_size)
    else:
        return None
    if getattr(embed, "grid_size", None) and _pair(embed.img_size) == size:
        grid = _pair(embed.grid_size)
    else:
        grid = (size[0] // patch[0], size[1] // patch[1])
    return grid, (float(patch[0]), float(patch[1]))


class _FirstBlock(AttentionCalls):
    """Watches the first block run, and ends the forward pass then."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__(module, [path])
        self.found: list[AttentionCall] = []
        self.read: tuple[int, ...] = ()
        self.pre_norm = False
        self._block = module.get_submodule(path)

    def on_call(self, call: AttentionCall) -> None:
        self.found.append(call)

    def __enter__(self) -> _FirstBlock:
        super().__enter__()
        normed: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.read = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()

        def attend(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            read = args[0] if args else next(iter(named.values()), None)
            self.pre_norm = any(read is tensor for tensor in normed)

        def leave(*_: Any) -> None:
            raise SeenEnoughError

        attention = self._block.get_submodule("attn")
        handles = [
            self._block.register_forward_pre_hook(enter),
            attention.register_forward_pre_hook(attend, with_kwargs=True),
            self._block.register_forward_hook(leave),
        ]
        if isinstance(norm := getattr(self._block, "norm1", None), nn.Module):
            handles.append(norm.register_forward_hook(lambda *call: normed.append(call[2])))
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self
