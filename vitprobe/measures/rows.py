"""Entropy, distance and sink mass of attention rows, without ever holding a whole map.

They are taken from tiles of logits that stay in a processor's cache. Where the logits are products
of queries and keys, these too are made a tile at a time; on CUDA one kernel does it all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vitprobe.measures import fused
from vitprobe.measures.fused import Rows

TILE: Final = 1 << 20
"""Most logits of a tile on a CPU: its threads share the rows of each operation."""
DEVICE_TILE: Final = 1 << 26
"""The same elsewhere, where small tiles would keep the device waiting."""
_MASKED: Final = -1e30
"""Stands for minus infinity in a product with 0."""


@dataclass(frozen=True, eq=False)
class Products:
    """Logits that are products of queries and keys, not yet taken.

    query: (images, heads, queries, depth), of any floating type.
    key: (images, heads, keys, depth).
    scale: what the products are multiplied by.
    mask: True where a key may be read, or what is added to the logits; it broadcasts to
        (images, heads, queries, keys). None where every key may be read.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(images, heads, queries, keys)."""
        return torch.Size((*self.query.shape[:3], self.key.shape[2]))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: at least single precision."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def part(self, images: slice, queries: slice) -> Products:
        """Some queries of some images."""
        mask = None if self.mask is None else self.mask.expand(self.shape)[images, :, queries]
        return Products(self.query[images, :, queries], self.key[images], self.scale, mask)

    def unpacked(self) -> Products:
        """The same in the type of the logits; without a copy where it is theirs already."""
        query, key = self.query.to(self.dtype), self.key.to(self.dtype)
        return Products(query, key, self.scale, self.mask)

    def detach(self) -> Products:
        """The same without gradients."""
        mask = None if self.mask is None else self.mask.detach()
        return Products(self.query.detach(), self.key.detach(), self.scale, mask)

    def logits(self) -> Tensor:
        """(images, heads, queries, keys), with the gradient of what they come from."""
        query, key = self.query.to(self.dtype), self.key.to(self.dtype)
        return masked_((query * self.scale) @ key.mT, self.mask)

    def write(self, queries: slice, keys: slice, out: Tensor) -> None:
        """Write some of the logits, (images, heads, queries, keys) of one piece, without a
        gradient. Queries and keys must be of the logits' type.
        """
        # Image by image: heads mostly lie inside tokens, and all images at once would be copied.
        for image, one in enumerate(out):
            query, key = self.query[image, :, queries], self.key[image, :, keys]
            torch.baddbmm(one, query, key.mT, beta=0, alpha=self.scale, out=one)
        if self.mask is not None:
            masked_(out, self.mask.expand(self.shape)[:, :, queries, keys])


def masked_(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with a mask written into them: True where a key may be read, or what is added."""
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, -torch.inf)
    return logits.add_(mask)


Logits: TypeAlias = Tensor | Products
"""(images, heads, queries, keys), what a softmax over keys is given."""


def row_statistics(
    logits: Logits,
    *,
    query_prefix: int,
    key_prefix: int,
    query_xy: Tensor | None,
    key_xy: Tensor | None,
) -> Rows:
    """Statistics of the rows of softmax(logits), see `Rows`; in the precision of the logits.

    A row with nan or infinity among its logits has nan for its sink. There are no gradients.

    Args:
        logits: (images, heads, queries, keys).
        query_prefix: how many leading queries are prefix tokens, whose distance has no meaning.
        key_prefix: how many leading keys are prefix tokens.
        query_xy: (queries - query_prefix, 2), centres of the patch queries; None: not known.
        key_xy: (keys - key_prefix, 2), centres of the patch keys; None: not known.
    """
    with torch.no_grad():
        if isinstance(logits, Products) and fused.available(logits.device):
            places: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
            if query_xy is not None and key_xy is not None:
                places = (
                    _places(_content(query_xy), query_prefix, logits.device),
                    _places(_content(key_xy), 0, logits.device),
                )
            return fused.rows(
                logits.query,
                logits.key,
                scale=logits.scale,
                key_prefix=key_prefix,
                query_xy=places[0],
                key_xy=places[1],
                mask=logits.mask,
            )
        distance = None
        if query_xy is not None and key_xy is not None:
            distance = distances(query_xy, key_xy, logits.dtype, logits.device)
        return _in_tiles(logits, query_prefix, key_prefix, distance)


def _in_tiles(logits: Logits, query_prefix: int, key_prefix: int, distance: Tensor | None) -> Rows:
    images, heads, queries, keys = logits.shape
    patches = keys - key_prefix
    most = TILE if logits.device.type == "cpu" else DEVICE_TILE
    step = max(1, min(images, most // max(1, heads * queries * patches)))
    height = queries if step > 1 else max(1, min(queries, most // max(1, heads * patches)))
    like = torch.empty(0, dtype=logits.dtype, device=logits.device)
    room = _room(step * heads * height * patches, like)
    found = like.new_full((3, images, heads, queries), torch.nan)
    # Of the first patch key too: its logit is needed behind its softmax.
    aside = like.new_empty((images, heads, queries, min(key_prefix + 1, keys)))
    finite = isinstance(logits, Products) and logits.mask is None
    for some in _steps(images, step):
        group = part_of(logits, some, slice(None))
        group = group if isinstance(group, Tensor) else group.unpacked()
        _write(group, slice(None), slice(0, key_prefix + 1), aside[some])
        for rows in _steps(queries, height):
            shape = (some.stop - some.start, heads, rows.stop - rows.start, patches)
            tile, weights = (half[: math.prod(shape)].view(shape) for half in room)
            entropy, distance_, log_mass = found[:, some, :, rows]
            _write(group, rows, slice(key_prefix, keys), tile)
            if patches:
                first = aside[some, :, rows, key_prefix] if finite else None
                _entropy(tile, weights, first, entropy, log_mass)
            if distance is not None:
                patch = max(0, query_prefix - rows.start)
                ends = (max(0, end - query_prefix) for end in (rows.start, rows.stop))
                weights = weights[:, :, patch:].mul_(distance[slice(*ends)])
                torch.sum(weights, -1, out=distance_[:, :, patch:])
    entropy, distance_, log_mass = found
    entropy.neg_().clamp_min_(0)
    if patches == 0:
        found[:2], log_mass[:] = torch.nan, -torch.inf
    sink = _sink(aside[..., :key_prefix], log_mass)
    return Rows(entropy, None if distance is None else distance_, sink)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


_kept = threading.local()


def _room(elements: int, like: Tensor) -> Tensor:
    """Memory for two tiles, (2, elements).

    On a CPU the last is kept, since memory that is new to a process costs as much as a tile.
    """
    if like.device.type != "cpu":
        return like.new_empty((2, elements))
    room = getattr(_kept, "room", None)
    if room is None or room.dtype != like.dtype or room.shape[1] < elements:
        with torch.inference_mode(False):
            room = _kept.room = torch.empty((2, elements), dtype=like.dtype)
    return room


def part_of(logits: Logits, images: slice, queries: slice) -> Logits:
    """Some queries of some images."""
    if isinstance(logits, Tensor):
        return logits[images, :, queries]
    return logits.part(images, queries)


def _write(logits: Logits, queries: slice, keys: slice, out: Tensor) -> None:
    if isinstance(logits, Tensor):
        out.copy_(logits[:, :, queries, keys])
    else:
        logits.write(queries, keys, out)


def _entropy(
    tile: Tensor, weights: Tensor, first: Tensor | None, entropy: Tensor, log_mass: Tensor
) -> None:
    """Write the negative entropy of each row's softmax, and the logarithm of what it divides by.

    Args:
        tile: (..., rows, keys) logits, which are lost.
        weights: of the same shape, for their softmax.
        first: (..., rows), the logit of the first key; None where it may be minus infinity.
        entropy: (..., rows); nan where the row has no key to read.
        log_mass: (..., rows), logarithm of the sum of exponentials.
    """
    # A logit less its log-softmax is that logarithm: any will do that is finite, and the first is
    # cheaper than to look for the largest.
    most = tile.amax(-1) if first is None else first
    torch.log_softmax(tile, -1, out=tile)
    torch.sub(most, tile.amax(-1) if first is None else tile[..., 0], out=log_mass)
    torch.exp(tile, out=weights)
    if first is None:
        log_mass.masked_fill_(most == -torch.inf, -torch.inf)
        tile.clamp_min_(_MASKED)
    torch.sum(tile.mul_(weights), -1, out=entropy)


def _sink(aside: Tensor, log_mass: Tensor) -> Tensor:
    """(..., rows) shares of prefix keys, of logits (..., rows, prefix keys).

    log_mass: (..., rows), logarithm of the sum of exponentials of the other logits.
    """
    ours = aside[..., 0] if aside.shape[-1] == 1 else aside.logsumexp(-1)
    largest = torch.maximum(ours, log_mass)
    sink = torch.sigmoid(ours - log_mass)
    sink.masked_fill_(largest == -torch.inf, 0)
    return sink.masked_fill_(~(largest < torch.inf), torch.nan)


def distances(query_xy: Tensor, key_xy: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Euclidean distances (queries, keys) between points (queries, 2) and (keys, 2).

    The last few are kept, since all images and mostly all layers share them.
    """
    return _distances(_content(query_xy), _content(key_xy), dtype, device)


def _content(xy: Tensor) -> bytes:
    return xy.double().cpu().contiguous().numpy().tobytes()


def _points(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content).reshape(-1, 2).copy())


@lru_cache(maxsize=4)
def _distances(query: bytes, key: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        difference = _points(query)[:, None] - _points(key)[None]
        return torch.linalg.vector_norm(difference, dim=-1).to(device, dtype)


@lru_cache(maxsize=8)
def _places(xy: bytes, before: int, device: torch.device) -> Tensor:
    """Points on a device, behind so many of no meaning."""
    with torch.inference_mode(False):
        return torch.cat([torch.zeros(before, 2), _points(xy).float()]).to(device)
