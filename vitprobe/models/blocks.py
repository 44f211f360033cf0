"""Which modules of a model are its blocks, and which norms stand before and after them.

One rule for transformers and convolutional networks: blocks are the members of the innermost lists
(ModuleList, Sequential, ModuleDict) of modules that each hold several weights, such as
`encoder.layer.3`, `stages.0.blocks.1` or `layer1.0`. What a list holds of single layers, such as
the convolutions of a stem or the linear layers of an MLP, is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError
from vitprobe.models.trace import Run, Trace, key

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# What a model calls its stem, its embedding, its downsampling or its head holds none of its blocks.
_APART = re.compile(r"(.*_)?(stem|embed\w*|downsampl\w*|heads?|classifier|decoder\w*)\d*")


@dataclass(frozen=True)
class Blocks:
    """The run of each block, in order.

    end: when the last of them is over.
    branches: whether what each returns is added to what it read by whoever calls it.
    """

    runs: tuple[Run, ...]
    end: int
    branches: bool


def find_blocks(trace: Trace, named: Sequence[str] = ()) -> Blocks:
    """The blocks of a model.

    named: paths of the blocks, where the user says which they are.

    Raises CaptureError where there are none, or a named one did not run exactly once.
    """
    runs: dict[str, list[Run]] = {}
    for run in trace.runs:
        runs.setdefault(run.path, []).append(run)
    if named:
        return _together([_only(trace.module, path, runs.get(path, [])) for path in named])
    found = _listed(trace.module, "", runs, strict=True) or _listed(
        trace.module, "", runs, strict=False
    )
    once = [runs[path][0] for path in found if len(runs[path]) == 1]
    writing = [run for run in once if stream(run.returned) is not None]
    blocks = [run for run in writing if not _writes_class_token(run)]
    blocks = _main_path(sorted(blocks, key=lambda run: run.start))
    if not blocks:
        raise CaptureError(
            f"This {type(trace.module).__name__} has no list of blocks that could be its layers: "
            "name the modules that are, as in wrap(module, blocks=['features.0', 'features.1'])."
        )
    return _together(blocks)


def stream(tensors: Sequence[Tensor], like: Tensor | None = None) -> Tensor | None:
    """Of several tensors, for one image, that of the tokens: the first that is not folded."""
    tokens = [tensor for tensor in tensors if tensor.ndim >= 3]
    if like is not None and (alike := [t for t in tokens if t.shape == like.shape]):
        return alike[0]
    return next((t for t in tokens if t.shape[0] == 1), tokens[0] if tokens else None)


def entering(block: Run) -> Tensor | None:
    """The tokens that a block reads."""
    return stream(block.read, stream(block.returned))


def pre_norm(trace: Trace, block: Run, attention: str | None) -> Run | None:
    """The norm that reads what the block reads, before anything with weights does.

    attention: the module in which the block's first attention is computed; None where it has none.
        What follows the norm must then lie there, or else another layer stands between.
    """
    tokens = entering(block)
    if tokens is None:
        return None
    modules = dict(trace.module.named_modules())
    inside = trace.within(block)
    leaves = [run for run in inside if _own_parameters(modules[run.path])]
    if not leaves or not _is_norm(modules[leaves[0].path]) or key(tokens) not in leaves[0].keys:
        return None
    norm, rest = leaves[0], leaves[1:]
    if attention is None or attention == block.path:
        return norm
    way = attention.removeprefix(f"{block.path}.").partition(".")[0]
    attending = f"{block.path}.{way}"
    reading = next((run.read for run in inside if run.path == attending), [])
    if any(_rearranged(one, other) for one in norm.returned for other in reading):
        return norm
    weighty = next((run.path for run in rest if _own_weights(modules[run.path])), attending)
    return norm if f"{weighty}.".startswith(f"{attending}.") else None


def final_norm(trace: Trace, blocks: Blocks) -> Run | None:
    """The first norm after the last block, before anything with weights but class attention."""
    modules = dict(trace.module.named_modules())
    after = blocks.end
    for run in trace.runs:
        module = modules[run.path]
        if run.start < after:
            continue
        if _own_parameters(module) and _is_norm(module):
            return run
        if _writes_class_token(run):
            after = run.end
        elif _own_weights(module):
            return None
    return None


def _only(module: nn.Module, path: str, runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    if path not in dict(module.named_modules()):
        raise CaptureError(f"This {type(module).__name__} has no module '{path}' to be a block.")
    raise CaptureError(
        f"'{path}' of this {type(module).__name__} runs {len(runs)} times in one forward pass and "
        "not once, so it can be no block."
    )


def _rearranged(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor holds the numbers of another, in any order, with or without zeros."""
    if other.numel() < one.numel():
        return False
    first, second = one.double(), other.double()
    return all(
        torch.isclose(power(first).sum(), power(second).sum(), rtol=1e-9)
        for power in (torch.abs, torch.square)
    )


def _listed(module: nn.Module, path: str, ran: dict[str, list[Run]], *, strict: bool) -> list[str]:
    """Paths of the blocks that lie in the innermost lists of a module."""
    found: list[str] = []
    own = singles = 0
    rows: list[str] = []
    for name, child in module.named_children():
        if _APART.fullmatch(name):
            continue
        inner = f"{path}.{name}".lstrip(".")
        if deeper := _listed(child, inner, ran, strict=strict):
            found += deeper
        elif isinstance(module, _LISTS) and inner in ran:
            if _weights(child) > 1 and isinstance(child, _LISTS):
                rows.append(inner)
            elif _weights(child) > 1:
                found.append(inner)
                own += 1
            elif any(True for _ in child.parameters()):
                singles += 1
    # Layers in a row are a block where they stand beside one, as an MLP beside an attention.
    found += rows if own else []
    # A norm and an attention in a row are parts of one block, and no list of blocks.
    return [] if strict and own == len(found) == 1 and singles else found


def _weights(module: nn.Module) -> int:
    """How many weights a composite module has; vectors (biases, norms, scales) are none."""
    composite = any(True for _ in module.children())
    return sum(map(_is_weight, module.parameters())) if composite else 0


def _is_weight(parameter: Tensor) -> bool:
    return sum(side > 1 for side in parameter.shape) > 1


def _own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _own_weights(module: nn.Module) -> bool:
    return any(map(_is_weight, module.parameters(recurse=False)))


def _is_norm(module: nn.Module) -> bool:
    # A batch norm is a part of the convolution beside it.
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return "norm" in type(module).__name__.lower() and not batch and not _own_weights(module)


def _writes_class_token(run: Run) -> bool:
    """Whether a class token is all that it returns, as of class attention."""
    result = stream(run.returned)
    return result is not None and result.shape[:-1] == (1, 1)


def _main_path(blocks: list[Run]) -> list[Run]:
    """Without what runs beside: of blocks that read the same, the last, and none between them."""
    kept: list[Run] = []
    for block in blocks:
        beside = [i for i, run in enumerate(kept) if _beside(run, block)]
        kept = [*kept[: beside[0]], block] if beside else [*kept, block]
    return kept


def _beside(run: Run, block: Run) -> bool:
    tokens = entering(block)
    follows = {key(tensor) for tensor in run.returned} & {*block.keys}
    return tokens is not None and key(tokens) in run.keys and not follows


def _together(runs: list[Run]) -> Blocks:
    end = runs[-1].end
    branches = _returns_branches(runs)
    parents = [run.path.rpartition(".")[0] for run in runs]
    if branches and len(set(parents)) > 1:
        # Of attention and MLP that lie in one list a layer, the first: there the layer begins.
        runs = [run for i, run in enumerate(runs) if parents.index(parents[i]) == i]
    return Blocks(tuple(runs), end, branches)


def _returns_branches(runs: Sequence[Run]) -> bool:
    added = []
    for run, following in pairwise(runs):
        before, after, result = entering(run), entering(following), stream(run.returned)
        if before is None or after is None or result is None or key(after) == key(result):
            return False
        if before.shape == after.shape == result.shape:
            added.append(torch.dist(after, before + result) < 1e-4 * torch.dist(after, result))
    return bool(added) and all(added)
