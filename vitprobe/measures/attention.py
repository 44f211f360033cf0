"""Attention distance, attention entropy and sink mass.

Each is a mean over query rows of a quantity of one row of post-softmax attention. Unless the name
says otherwise, queries and keys are patch tokens only and rows are renormalised over patch keys, so
that what a row sends to prefix tokens (class token, registers) is reported apart, as sink mass.

Sources: Dosovitskiy et al. 2021 ("An Image is Worth 16x16 Words", appendix D.7, mean attention
distance), Raghu et al. 2021 ("Do Vision Transformers See Like Convolutional Neural Networks?",
section 4), Wang et al. 2023 ("A Closer Look at Self-Supervised Lightweight Vision Transformers",
attention distance and entropy).

A row without mass on patch keys has no renormalised distance or entropy: it is left out of the mean
and counted, and a mean over no rows at all is nan.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, Array, like, to_tensor
from vitprobe.measures.base import Info, Measure


@dataclass(frozen=True)
class AttentionChunk:
    """Some query rows of one layer's attention, for some images, as capture hands them on.

    Queries and keys are in token order, prefix tokens first.
    """

    log_p: Tensor
    """(images, heads, queries, keys), natural logarithm of post-softmax attention."""
    query_prefix: int
    """How many leading queries of this chunk are prefix tokens."""
    key_prefix: int
    """How many leading keys are prefix tokens."""
    query_xy: Tensor
    """(queries - query_prefix, 2), centres in pixels of the model's input."""
    key_xy: Tensor
    """(keys - key_prefix, 2), centres in pixels of the model's input."""
    layer: int
    """Block the attention belongs to, from 0."""
    first_image: int = 0
    """Index, in the whole run, of the first image of this chunk."""
    first_query: int = 0
    """Index, among the layer's queries, of the first query of this chunk."""

    @cached_property
    def patch_log_p(self) -> Tensor:
        """Log-attention of patch queries to patch keys."""
        return self.log_p[..., self.query_prefix :, self.key_prefix :]

    @cached_property
    def renormalized(self) -> Tensor:
        """Attention of patch queries, renormalised over patch keys; nan rows where that is 0/0."""
        return torch.softmax(self.patch_log_p, dim=-1)

    @cached_property
    def distance(self) -> Tensor:
        """(patch queries, patch keys) distances between centres, in pixels."""
        return pairwise_distance(self.query_xy, self.key_xy)


def pairwise_distance(query_xy: Tensor, key_xy: Tensor) -> Tensor:
    """Euclidean distances (queries, keys) between points (queries, 2) and (keys, 2)."""
    return torch.linalg.vector_norm(query_xy[:, None] - key_xy[None], dim=-1)


def grid_positions(grid: tuple[int, int], patch_size: float | tuple[float, float]) -> Tensor:
    """Centres (x, y) in pixels of a row-major grid of patches: (rows * columns, 2) float64."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, (int, float)) else patch_size
    rows, columns = grid
    y, x = torch.meshgrid(
        (torch.arange(rows, dtype=torch.float64) + 0.5) * height,
        (torch.arange(columns, dtype=torch.float64) + 0.5) * width,
        indexing="ij",
    )
    return torch.stack([x.flatten(), y.flatten()], dim=-1)


def uniform_distance(query_xy: Tensor, key_xy: Tensor | None = None) -> float:
    """Attention distance of a head that attends to every patch equally, in pixels."""
    return float(pairwise_distance(query_xy, query_xy if key_xy is None else key_xy).mean())


def _expected_distance(rows: Tensor, distance: Tensor) -> Tensor:
    return torch.einsum("...qk,qk->...q", rows, distance.to(rows))


def _row_entropy(rows: Tensor) -> Tensor:
    return torch.special.entr(rows).sum(-1)


def _mean_of_defined(rows: Tensor) -> Tensor:
    defined = ~rows.isnan()
    return rows.nan_to_num(0).sum(-1) / torch.where(defined.any(-1), defined.sum(-1), torch.nan)


def _renormalize(rows: Tensor) -> Tensor:
    mass = rows.sum(-1, keepdim=True)
    return rows / torch.where(mass > 0, mass, torch.nan)


def _checked(attention: Array, prefix_tokens: int) -> Tensor:
    tensor = to_tensor(attention)
    if tensor.ndim != 4:
        raise MeasureError(
            f"attention has shape {tuple(tensor.shape)}: give (batch, heads, queries, keys)"
        )
    if not 0 <= prefix_tokens < min(tensor.shape[-2:]):
        raise MeasureError(
            f"{prefix_tokens} prefix tokens leave no patches in attention of shape "
            f"{tuple(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all() or (tensor < 0).any():
        raise MeasureError(
            "attention holds negative or non-finite values: give post-softmax attention"
        )
    if (tensor.sum(-1) > 1 + 1e-2).any():
        raise MeasureError("attention rows sum to more than 1: give post-softmax attention")
    return tensor


def attention_distance(
    attention: A,
    *,
    grid: tuple[int, int] | None = None,
    positions: tuple[Array, Array] | None = None,
    patch_size: float | tuple[float, float] = 16,
    prefix_tokens: int = 0,
    renormalize: bool = True,
) -> A:
    """Mean attention distance of each image and head, in pixels.

    The mean over patch queries of the expected distance between the query's and the keys' centres
    (Dosovitskiy et al. 2021, appendix D.7).

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        grid: (rows, columns) of patches when queries and keys are the same row-major grid.
        positions: instead of `grid`, ((queries, 2), (keys, 2)) centres in pixels of patch tokens.
        patch_size: pixels per patch of `grid`: one number or (height, width).
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.
        renormalize: divide each row by its mass on patch keys; otherwise what goes to prefix tokens
            counts as distance 0.

    Returns:
        (batch, heads), the kind of array given; nan where no query has mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    tensor = _checked(attention, prefix_tokens)
    if grid is not None and positions is None:
        query_xy = key_xy = grid_positions(grid, patch_size)
    elif positions is not None and grid is None:
        query_xy, key_xy = (to_tensor(points).double() for points in positions)
    else:
        raise MeasureError("give either grid=(rows, columns) or positions=(query_xy, key_xy)")
    rows = tensor[..., prefix_tokens:, prefix_tokens:]
    if tuple(rows.shape[-2:]) != (len(query_xy), len(key_xy)):
        raise MeasureError(
            f"attention has {rows.shape[-2]} patch queries and {rows.shape[-1]} patch keys after "
            f"{prefix_tokens} prefix tokens, but the positions given are for {len(query_xy)} and "
            f"{len(key_xy)}"
        )
    distance = pairwise_distance(query_xy, key_xy).to(tensor.device)
    if renormalize:
        rows = _renormalize(rows)
    return like(_mean_of_defined(_expected_distance(rows, distance)), attention)


def attention_entropy(attention: A, *, prefix_tokens: int = 0, renormalize: bool = True) -> A:
    """Mean entropy of the attention rows of each image and head, in nats.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.
        renormalize: divide each row by its mass on patch keys. Without it the sum of -p ln p runs
            over patch keys only, which is an entropy only where `prefix_tokens` is 0.

    Returns:
        (batch, heads), the kind of array given; between 0 and ln(keys) when renormalised; nan where
        no query has mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    tensor = _checked(attention, prefix_tokens)
    rows = tensor[..., prefix_tokens:, prefix_tokens:]
    if renormalize:
        rows = _renormalize(rows)
    return like(_mean_of_defined(_row_entropy(rows)), attention)


def sink_mass(attention: A, *, prefix_tokens: int) -> A:
    """Mean attention mass that patch queries send to prefix tokens, for each image and head.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        prefix_tokens: leading tokens that are no patches.

    Returns:
        (batch, heads), shares between 0 and 1, the kind of array given.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    tensor = _checked(attention, prefix_tokens)
    rows = tensor[..., prefix_tokens:, :prefix_tokens].sum(-1)
    return like(rows.mean(-1), attention)


class PerImage(NamedTuple):
    """One layer's per-image numbers."""

    mean: np.ndarray
    """(images, heads) float32, mean over defined query rows; nan where there is none."""
    undefined_rows: np.ndarray
    """(images, heads) int32, query rows left out of the mean."""


_ROW_SUMS = np.dtype([("total", np.float32), ("defined", np.int32), ("undefined", np.int32)])


class AttentionMeasure(Measure):
    """A mean over query rows, kept for every image, layer and head.

    Per-image means are what paired comparisons between models need. The state is 12 bytes an image
    and head; images are keyed by their index in the run, so merging is a union and exact.
    """

    info: ClassVar[Info]

    def __init__(self) -> None:
        # A few large arrays that grow seldom: a small tensor kept for every chunk, allocated
        # between the chunk's own large ones, would keep the allocator from giving those back.
        self._sums: dict[int, np.ndarray] = {}

    @abstractmethod
    def rows(self, chunk: AttentionChunk) -> Tensor:
        """(images, heads, rows) values, nan where a row is undefined."""

    @classmethod
    def uniform(cls, query_xy: Tensor, key_xy: Tensor, key_prefix: int) -> float | None:
        """The value under uniform attention, which relative units divide by; None: no such unit."""
        return None

    def update(self, chunk: AttentionChunk) -> None:
        """Add the rows of one chunk.

        Raises:
            MeasureError: the attention itself holds nan, which is no undefined row.
        """
        rows = self.rows(chunk)
        if rows.shape[-1] == 0:
            return
        defined = ~rows.isnan()
        if not defined.all() and chunk.log_p.isnan().any():
            raise MeasureError(f"attention is NaN in layer {chunk.layer}")
        images, heads = rows.shape[:2]
        last = chunk.first_image + images
        sums = self._room(chunk.layer, last, heads)[chunk.first_image : last]
        sums["total"] += rows.nan_to_num(0).sum(-1).cpu().numpy()
        sums["defined"] += defined.sum(-1).cpu().numpy()
        sums["undefined"] += (~defined).sum(-1).cpu().numpy()

    def _room(self, layer: int, images: int, heads: int) -> np.ndarray:
        """The sums of a layer, with room for so many images."""
        sums = self._sums.get(layer)
        if sums is None or len(sums) < images:
            grown = np.zeros((max(1024, 2 * images), heads), _ROW_SUMS)
            if sums is not None:
                grown[: len(sums)] = sums
            self._sums[layer] = sums = grown
        return sums

    def merge(self, other: Self) -> None:
        """Add the images of another instance.

        Raises:
            MeasureError: an image that both have seen.
        """
        for layer, theirs in other._sums.items():
            ours = self._room(layer, *theirs.shape)[: len(theirs)]
            shared = np.flatnonzero(_seen(ours) & _seen(theirs))
            if len(shared):
                raise MeasureError(
                    f"{self.info.name}: image {shared[0]} is in both parts to be merged"
                )
            ours[_seen(theirs)] = theirs[_seen(theirs)]

    def compute(self) -> dict[int, PerImage]:
        """Per-image means of every layer, images in order of the run."""
        layers: dict[int, PerImage] = {}
        for layer in sorted(self._sums):
            sums = self._sums[layer]
            seen = sums[_seen(sums)]
            total, defined = seen["total"], seen["defined"]
            mean = np.divide(total, defined, out=np.full_like(total, np.nan), where=defined > 0)
            layers[layer] = PerImage(mean, seen["undefined"].copy())
        return layers


def _seen(sums: np.ndarray) -> np.ndarray:
    """Which images have rows, defined or not."""
    return np.asarray((sums["defined"] + sums["undefined"]).any(axis=1))


_INVARIANCES = ("order of images",)


class AttentionDistance(AttentionMeasure):
    """Streaming `attention_distance`, renormalised over patch keys."""

    info = Info(
        name="attention_distance",
        title="Attention distance",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a head looks further away from each patch",
        what=(
            "Attention distance is how far, on average, a head looks from the patch that asks: low "
            "means local, high means global."
        ),
        formula="mean over patch queries q of sum_k p(k|q) |x_q - x_k|, p over patch keys only",
        source="Dosovitskiy et al. 2021 (app. D.7); Raghu et al. 2021 (sec. 4); Wang et al. 2023",
        invariances=_INVARIANCES,
        streams="exact",
    )

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return _expected_distance(chunk.renormalized, chunk.distance)

    @classmethod
    def uniform(cls, query_xy: Tensor, key_xy: Tensor, key_prefix: int) -> float | None:
        return uniform_distance(query_xy, key_xy) or None


class RawAttentionDistance(AttentionMeasure):
    """Streaming `attention_distance(renormalize=False)`."""

    info = Info(
        name="attention_distance_raw",
        title="Attention distance (not renormalised)",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a head looks further away from each patch",
        what=(
            "Attention distance where the attention that goes to prefix tokens counts as distance "
            "0, as some papers have it; it falls when the class token draws attention."
        ),
        formula="mean over patch queries q of sum over patch keys of p(k|q) |x_q - x_k|",
        source="Dosovitskiy et al. 2021 (app. D.7)",
        invariances=_INVARIANCES,
        streams="exact",
    )

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return _expected_distance(chunk.patch_log_p.exp(), chunk.distance)

    @classmethod
    def uniform(cls, query_xy: Tensor, key_xy: Tensor, key_prefix: int) -> float | None:
        share = len(key_xy) / (len(key_xy) + key_prefix)
        return share * uniform_distance(query_xy, key_xy) or None


class AttentionEntropy(AttentionMeasure):
    """Streaming `attention_entropy`, patch queries, renormalised over patch keys."""

    info = Info(
        name="attention_entropy",
        title="Attention entropy",
        unit="nats",
        range="0 to ln(patches)",
        direction="higher: a head spreads its attention over more patches",
        what=(
            "Attention entropy is how widely a head spreads its attention: 0 when each patch looks "
            "at a single other one, ln(patches) when it looks at all alike."
        ),
        formula="mean over patch queries q of -sum_k p(k|q) ln p(k|q), p over patch keys only",
        source="Wang et al. 2023; Vig & Belinkov 2019",
        invariances=(*_INVARIANCES, "order of keys"),
        streams="exact",
    )

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return _row_entropy(chunk.renormalized)

    @classmethod
    def uniform(cls, query_xy: Tensor, key_xy: Tensor, key_prefix: int) -> float | None:
        return math.log(len(key_xy)) or None


class AllTokensAttentionEntropy(AttentionMeasure):
    """Streaming entropy over all queries and all keys, prefix tokens included."""

    info = Info(
        name="attention_entropy_all",
        title="Attention entropy (all tokens)",
        unit="nats",
        range="0 to ln(tokens)",
        direction="higher: a head spreads its attention over more tokens",
        what="Attention entropy over all tokens, the class token and registers included.",
        formula="mean over all queries q of -sum over all keys of p(k|q) ln p(k|q)",
        source="Wang et al. 2023; Vig & Belinkov 2019",
        invariances=(*_INVARIANCES, "order of keys"),
        streams="exact",
    )

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return _row_entropy(chunk.log_p.exp())

    @classmethod
    def uniform(cls, query_xy: Tensor, key_xy: Tensor, key_prefix: int) -> float | None:
        return math.log(len(key_xy) + key_prefix) or None


class SinkMass(AttentionMeasure):
    """Streaming `sink_mass`."""

    info = Info(
        name="sink_mass",
        title="Sink mass",
        unit="share",
        range="0 to 1",
        direction="higher: patches send more of their attention to the class token and registers",
        what=(
            "Sink mass is the share of a patch's attention that goes to prefix tokens (class "
            "token, registers); distance and entropy describe only the rest."
        ),
        formula="mean over patch queries q of sum over prefix keys of p(k|q)",
        source="Darcet et al. 2024; Xiao et al. 2024 on attention sinks",
        invariances=_INVARIANCES,
        streams="exact",
    )

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return chunk.log_p[..., chunk.query_prefix :, : chunk.key_prefix].exp().sum(-1)


ATTENTION_MEASURES: Sequence[type[AttentionMeasure]] = (
    AttentionDistance,
    RawAttentionDistance,
    AttentionEntropy,
    AllTokensAttentionEntropy,
    SinkMass,
)
