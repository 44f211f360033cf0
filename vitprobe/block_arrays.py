"""A ModelBlock as named tensors, and back, with nothing believed of what is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import ResultError
from vitprobe.gather import kept_numbers
from vitprobe.measures.chunks import SUMS
from vitprobe.measures.registry import PER_BLOCK, TOKENS
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.samples import SAMPLES, THUMBNAIL, SampleMaps

_REAL: Final = (torch.float32, torch.float64)
_UNDEFINED: Final = "tokens."
"""Of arrays in which nan is a number like any other: undefined for an image."""


@dataclass(frozen=True)
class Named:
    """The images of a block: their names, and the SHA-256 of what they are made of."""

    names: tuple[str, ...]
    digests: tuple[bytes, ...]


def to_arrays(block: ModelBlock, images: Named) -> dict[str, Tensor]:
    """All of a block, its Grams as lower triangles, row by row."""
    about = {"names": images.names, "halved": block.halved}
    found = {
        "about": _bytes(json.dumps(about).encode()),
        "digests": _bytes(b"".join(images.digests)).view(-1, 32),
        "thumbnails": torch.from_numpy(block.thumbnails),
    }
    if block.wanted.grams:
        i, j = torch.tril_indices(block.count, block.count, device=block.grams.device)
        found["grams"] = block.grams[:, i, j]
    found |= {f"vectors.{layer}": x for layer, x in enumerate(block.vectors)}
    found |= {f"subset.{layer}": x for layer, x in enumerate(block.subset)}
    for name, measure in block.tokens.items():
        for layer, rows in measure.kept().items():
            found[f"tokens.{name}.{layer}"] = torch.from_numpy(rows)
    if block.rankme is not None:
        for layer, rows in block.rankme.kept().items():
            found[f"rankme.{layer}"] = torch.from_numpy(rows)
    for name, attention in block.attention.items():
        for layer, sums in attention.kept().items():
            for part in SUMS.names or ():
                array = np.ascontiguousarray(sums[part])
                found[f"attention.{name}.{layer}.{part}"] = torch.from_numpy(array)
    if block.maps is not None:
        for layer in block.maps.heads:
            shown = [map_ for (of, _), map_ in sorted(block.maps.maps.items()) if of == layer]
            found[f"maps.{layer}"] = torch.from_numpy(np.stack(shown))
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def images_of(arrays: Mapping[str, Tensor]) -> Named:
    """The images of a block.

    Raises:
        ResultError: it does not say which they are; the message is the end of a sentence.
    """
    try:
        names = json.loads(arrays["about"].numpy().tobytes())["names"]
        digests = [row.numpy().tobytes() for row in arrays["digests"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ResultError("does not say which images it is of") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ResultError("does not say which images it is of")
    if len(names) != len(digests) or not all(len(digest) == 32 for digest in digests):
        raise ResultError(f"has {len(names)} names of images and {len(digests)} digests")
    return Named(tuple(names), tuple(digests))


def from_arrays(
    arrays: Mapping[str, Tensor], held: Wanted, wanted: Wanted, first: int, count: int
) -> ModelBlock:
    """The block of images `first` …, `count` of them, as far as it is wanted.

    Args:
        arrays: from `to_arrays`.
        held: what was gathered of the model when they were made.
        wanted: no more than that.

    Raises:
        ResultError: arrays that are missing, of another shape or kind, or not finite; the message
            is the end of a sentence.
    """
    _check(arrays, held, first, count)
    block = ModelBlock(wanted, first, count)
    halved = json.loads(arrays["about"].numpy().tobytes())["halved"]
    block.halved = (int(halved[0]), int(halved[1])) if halved else None
    block.thumbnails = arrays["thumbnails"].numpy()
    layers = range(len(wanted.layouts))
    if wanted.grams:
        i, j = torch.tril_indices(count, count)
        packed = arrays["grams"]
        block.grams = packed.new_zeros(len(layers), count, count)
        block.grams[:, i, j] = packed
        block.grams[:, j, i] = packed
    if wanted.vectors:
        block.vectors = [arrays[f"vectors.{layer}"] for layer in layers]
    if first < wanted.subset:
        block.subset = [arrays[f"subset.{layer}"] for layer in layers]
    for name, measure in block.tokens.items():
        for layer, layout in enumerate(wanted.layouts):
            rows = arrays[f"tokens.{name}.{layer}"].numpy()
            measure.put(layer, first, rows, layout.grid)
    if block.rankme is not None:
        for layer in layers:
            block.rankme.put(layer, first, arrays[f"rankme.{layer}"].numpy())
    for name, attention in block.attention.items():
        for layer in sorted(wanted.attention[name]):
            if (sums := _sums(arrays, f"attention.{name}.{layer}")) is not None:
                attention.put(layer, first, sums)
    if block.maps is not None:
        block.maps.maps = {
            (layer, first + image): map_
            for layer in block.maps.heads
            for image, map_ in enumerate(arrays[f"maps.{layer}"].numpy())
        }
    return block


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _sums(arrays: Mapping[str, Tensor], name: str) -> np.ndarray | None:
    parts = {part: arrays.get(f"{name}.{part}") for part in SUMS.names or ()}
    if all(tensor is None for tensor in parts.values()):
        return None
    sums = None
    for part, tensor in parts.items():
        if tensor is None:
            raise ResultError(f"lacks '{name}.{part}'")
        sums = np.zeros(tensor.shape, SUMS) if sums is None else sums
        sums[part] = tensor.numpy()
    return sums


def _check(arrays: Mapping[str, Tensor], held: Wanted, first: int, count: int) -> None:
    expected = {name: (shape, kinds) for name, shape, kinds in _expected(held, first, count)}
    # A measure of a layer that it does not say anything of keeps nothing.
    missing = [n for n in expected if n not in arrays and not n.startswith("attention.")]
    if missing:
        raise ResultError(f"lacks '{missing[0]}'")
    for name, tensor in arrays.items():
        if name == "about":
            continue
        if name not in expected:
            raise ResultError(f"holds '{name}', which is nothing that was to be gathered")
        shape, kinds = expected[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in kinds:
            raise ResultError(
                f"holds '{name}' as {tensor.dtype} {tuple(tensor.shape)} where {tuple(shape)} was "
                "to be"
            )
        bad = tensor.isinf() if name.startswith(_UNDEFINED) else ~torch.isfinite(tensor)
        if bad.any():
            raise ResultError(f"holds NaN or infinite numbers in '{name}'")
        if name.endswith("defined") and (tensor < 0).any():
            raise ResultError(f"holds negative counts in '{name}'")


def _expected(
    held: Wanted, first: int, count: int
) -> Iterator[tuple[str, Sequence[int], Sequence[torch.dtype]]]:
    """Name, shape and possible kinds of every array of a block."""
    shown = max(0, min(count, SAMPLES - first))
    yield "digests", (count, 32), (torch.uint8,)
    yield "thumbnails", (shown, THUMBNAIL, THUMBNAIL, 3), (torch.uint8,)
    if held.grams:
        yield "grams", (len(held.layouts), count * (count + 1) // 2), _REAL
    for layer, layout in enumerate(held.layouts):
        if held.vectors:
            yield f"vectors.{layer}", (count, layout.width), _REAL
        if first < held.subset:
            kept = min(count, held.subset - first)
            yield f"subset.{layer}", (kept, kept_numbers(layout, held.policy)), _REAL
        for name in held.tokens:
            columns = TOKENS[name]().columns(layout.grid)
            yield f"tokens.{name}.{layer}", (count, columns), (torch.float32,)
        if held.rankme:
            yield f"rankme.{layer}", (count, layout.width), (torch.float32,)
    for name, layers in held.attention.items():
        for layer in layers:
            shape = (count, 1 if name in PER_BLOCK else held.anatomy.sites[layer].heads)
            yield f"attention.{name}.{layer}.total", shape, (torch.float32,)
            for part in ("defined", "undefined"):
                yield f"attention.{name}.{layer}.{part}", shape, (torch.int32,)
    if held.attention and shown:
        maps = SampleMaps(held.anatomy)
        for layer, heads in maps.heads.items():
            yield (
                f"maps.{layer}",
                (shown, heads, len(maps.queries), maps.keys),
                (torch.float16,),
            )
