"""Statistics of attention rows in one pass over queries and keys, on CUDA.

Entropy, distance and sink mass come from the same tiles of the map, which itself is never written.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Statistics of attention rows, each (images, heads, queries) float32."""

    entropy: Tensor
    """In nats, over patch keys, renormalised; nan where a row may read no patch key."""
    distance: Tensor | None
    """Expected distance to the patch keys, renormalised, in the unit of the coordinates; nan as
    above; None without coordinates."""
    sink: Tensor
    """Share of a row's attention that goes to prefix keys; 0 where it may read no key at all."""


@cache
def available(device: torch.device) -> bool:
    """Whether `rows` runs there: a CUDA device of compute capability 8 or later, and Triton."""
    return (
        device.type == "cuda"
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    key_prefix: int,
    query_xy: Tensor | None,
    key_xy: Tensor | None,
    mask: Tensor | None = None,
) -> Rows:
    """Entropy, expected distance and sink mass of softmax(scale * query @ key.T, masked).

    Logits are single precision, as are all sums; nan among the logits of a row makes its sink nan.
    There are no gradients.

    Args:
        query: (images, heads, queries, depth), of any floating type and strides.
        key: (images, heads, keys, depth), prefix keys first.
        scale: what the products of queries and keys are multiplied by.
        key_prefix: how many leading keys are prefix tokens, whose attention is the sink mass.
        query_xy: (queries, 2) centres of all queries, those of prefix queries of any value.
        key_xy: (keys - key_prefix, 2) centres of the patch keys. Without both, no distance.
        mask: True where a key may be read, or what is added to the logits; it broadcasts to
            (images, heads, queries, keys).
    """
    from vitprobe.measures.fused_kernel import kernel

    images, heads, queries, depth = query.shape
    keys = key.shape[2]
    # Products of two halves are exact in single precision, in which they are summed.
    if query.dtype != key.dtype or query.dtype not in (torch.float16, torch.bfloat16):
        query, key = query.float(), key.float()
    sink = query.new_empty((images, heads, queries), dtype=torch.float32)
    entropy = torch.empty_like(sink)
    places = query_xy is not None and key_xy is not None
    distance = torch.empty_like(sink) if places else None
    masked = "none"
    if mask is not None:
        masked = "read" if mask.dtype == torch.bool else "added"
        mask = mask.expand(images, heads, queries, keys)
    # The largest for which no register is spilled; a short map fills tiles of 64 keys badly.
    half = query.dtype != torch.float32
    tile_queries, tile_keys = 64, 64 if half and keys - key_prefix >= 256 else 32
    span = max(16, min(1 << (depth - 1).bit_length(), 128 if half else 32))
    query_places, key_places = _places(query_xy, query), _places(key_xy, query)
    tiles = -(-queries // tile_queries)
    with torch.cuda.device_of(query):
        kernel[(images * heads * tiles,)](
            query,
            key,
            query if mask is None else mask,
            query_places,
            key_places,
            entropy,
            entropy if distance is None else distance,
            sink,
            float(scale),
            *query.stride(),
            *key.stride(),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            heads,
            queries,
            keys,
            key_prefix,
            query_places.stride(0),
            key_places.stride(0),
            depth=depth,
            masked=masked,
            places=places,
            tile_queries=tile_queries,
            tile_keys=tile_keys,
            tile_prefix=16,
            span=span,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return Rows(entropy, distance, sink)


def _places(xy: Tensor | None, like: Tensor) -> Tensor:
    """(2, padded to what loads like) coordinates for the kernel; without them it reads none."""
    if xy is None:
        return like
    return F.pad(xy.to(like.device, torch.float32).mT, (0, -len(xy) % 16)).contiguous()
