"""Attention as it arrives in chunks, and what the streaming measures of it share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Final, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array, to_tensor
from vitprobe.measures.base import Info, Invariance, Measure
from vitprobe.measures.by_image import ByImage
from vitprobe.measures.fused import Rows
from vitprobe.measures.rows import Logits, Products, distances, part_of, row_statistics

NOT_MOVED: Final[tuple[Invariance, ...]] = ("order of images",)
"""Invariances of what depends on where patches lie."""
NO_PLACE: Final[tuple[Invariance, ...]] = ("order of images", "order of tokens", "order of keys")
"""Invariances of what does not."""
ONLY_PATCHES: Final = (
    "Says nothing of what goes to the class token and registers: read sink mass beside."
)


CHUNK_ELEMENTS: Final = 1 << 21
"""Most attention weights in a part of a chunk (8 MB in single precision)."""


@dataclass(frozen=True, eq=False)
class AttentionChunk:
    """Some query rows of one layer's attention, for some images, as capture hands them on.

    Queries and keys are in token order, prefix tokens first. Nothing of it is computed before it is
    asked for, and what is computed stays as long as the chunk does: what wants whole maps should
    take them of one part (`parts`) after another.
    """

    logits: Logits
    """(images, heads, queries, keys), what the softmax is given, or log-attention itself."""
    query_prefix: int
    """How many leading queries of this chunk are prefix tokens."""
    key_prefix: int
    """How many leading keys are prefix tokens."""
    query_xy: Tensor | None
    """(queries - query_prefix, 2), centres in pixels of the model's input; None: not known."""
    key_xy: Tensor | None
    """(keys - key_prefix, 2), centres in pixels of the model's input; None: not known."""
    layer: int
    """Attention layer, from 0: in a plain Vision Transformer the block."""
    first_image: int = 0
    """Index, in the whole run, of the first image of this chunk."""
    first_query: int = 0
    """Index of the first query of this chunk among the layer's, those of one window after those of
    another."""
    queries: int | None = None
    """How many queries the layer has in all its windows; None: this chunk has all of them."""
    class_token: bool = True
    """Whether the first prefix token, where there is one, is a class token."""
    whole: bool = True
    """Whether the layer is one map of all patches that attend to all patches."""

    @property
    def shape(self) -> torch.Size:
        """(images, heads, queries, keys)."""
        return self.logits.shape

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.logits.device

    @cached_property
    def log_p(self) -> Tensor:
        """(images, heads, queries, keys), natural logarithm of post-softmax attention."""
        logits = self.logits.logits() if isinstance(self.logits, Products) else self.logits
        log_p = torch.log_softmax(logits, dim=-1)
        if isinstance(self.logits, Products) and self.logits.mask is None:
            return log_p
        # Where every key is masked there is no attention, and softmax would make nan of it.
        return log_p.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, -torch.inf)

    @cached_property
    def has_nan(self) -> bool:
        """Whether the attention itself holds nan, which no undefined row is."""
        return bool(self.log_p.sum().isnan())

    @cached_property
    def rows(self) -> Rows:
        """Entropy, distance and sink mass of every row, prefix queries' too, without a map."""
        return row_statistics(
            self.logits,
            query_prefix=self.query_prefix,
            key_prefix=self.key_prefix,
            query_xy=self.query_xy,
            key_xy=self.key_xy,
        )

    def part(self, images: slice, queries: slice) -> AttentionChunk:
        """Some queries of some images; slices with a start and a stop."""
        prefix = self.query_prefix
        patches = slice(max(0, queries.start - prefix), max(0, queries.stop - prefix))
        return replace(
            self,
            logits=part_of(self.logits, images, queries),
            query_prefix=min(max(0, prefix - queries.start), queries.stop - queries.start),
            query_xy=None if self.query_xy is None else self.query_xy[patches],
            first_image=self.first_image + images.start,
            first_query=self.first_query + queries.start,
            queries=self.shape[2] if self.queries is None else self.queries,
        )

    def parts(self) -> Iterator[AttentionChunk]:
        """The chunk in parts of at most `CHUNK_ELEMENTS` weights (or one row), in order."""
        images, heads, queries, keys = self.shape
        row = heads * keys
        step = max(1, min(images, CHUNK_ELEMENTS // (row * queries)))
        height = queries if step > 1 else max(1, min(queries, CHUNK_ELEMENTS // row))
        for image in range(0, images, step):
            for top in range(0, queries, height):
                yield self.part(
                    slice(image, min(image + step, images)), slice(top, min(top + height, queries))
                )

    @cached_property
    def patch_log_p(self) -> Tensor:
        """Log-attention of patch queries to patch keys."""
        return self.log_p[..., self.query_prefix :, self.key_prefix :]

    @cached_property
    def renormalized(self) -> Tensor:
        """Attention of patch queries, renormalised over patch keys; nan rows where that is 0/0."""
        return torch.softmax(self.patch_log_p, dim=-1)

    @cached_property
    def entropy(self) -> Tensor:
        """(images, heads, patch queries) entropies of `renormalized`."""
        return row_entropy(self.renormalized)

    @cached_property
    def distance(self) -> Tensor:
        """(patch queries, patch keys) distances between centres, in pixels.

        Raises MeasureError where it is not known where they lie.
        """
        if self.query_xy is None or self.key_xy is None:
            raise self.unplaced
        return distances(self.query_xy, self.key_xy, torch.float64, torch.device("cpu"))

    @property
    def unplaced(self) -> MeasureError:
        """What to raise where it is not known where queries and keys lie."""
        return MeasureError(
            f"where the queries and keys of attention layer {self.layer} lie is not known, so they "
            "have no distance"
        )

    @property
    def of_class_token(self) -> bool:
        """Whether the layer's only query is a class token, which is among the keys alone."""
        queries = self.shape[2] if self.queries is None else self.queries
        return queries == 1 and self.query_prefix == 0 < self.key_prefix and self.query_xy is None

    @cached_property
    def within(self) -> tuple[Tensor, Tensor]:
        """`mass_within` of `renormalized`."""
        return mass_within(self.renormalized, self.distance)


def pairwise_distance(query_xy: Tensor, key_xy: Tensor) -> Tensor:
    """Euclidean distances (queries, keys) between points (queries, 2) and (keys, 2)."""
    return torch.linalg.vector_norm(query_xy[:, None] - key_xy[None], dim=-1)


def grid_positions(grid: tuple[int, int], patch_size: float | tuple[float, float]) -> Tensor:
    """Centres (x, y) in pixels of a row-major grid of patches: (rows * columns, 2) float64.

    Raises:
        MeasureError: a patch size that is not above 0.
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, (int, float)) else patch_size
    if not (height > 0 and width > 0):
        raise MeasureError(f"a patch of {height} x {width} pixels is none; give sides above 0")
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


def expected_distance(rows: Tensor, distance: Tensor) -> Tensor:
    """(..., queries) means of distance (queries, keys) under rows (..., queries, keys)."""
    return torch.einsum("...qk,qk->...q", rows, distance.to(rows))


def mass_within(rows: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to each query's keys, ascending, and the mass of its row within each of them.

    (queries, keys) and (..., queries, keys), for rows (..., queries, keys).
    """
    ascending, order = distance.sort(dim=-1)
    order = order.to(rows.device).expand(rows.shape)
    return ascending.to(rows), rows.gather(-1, order).cumsum(-1)


def distance_quantile(within: tuple[Tensor, Tensor], share: float) -> Tensor:
    """(..., queries) smallest distances within which a row holds the share; nan where it is nan."""
    ascending, mass = within
    # A sum of shares such as 1/10 falls short of its true value by rounding, and would jump.
    needed = share - mass.shape[-1] * torch.finfo(mass.dtype).eps
    first = torch.searchsorted(mass, torch.full_like(mass[..., :1], needed))
    first = first.clamp_max(mass.shape[-1] - 1)
    found = ascending.expand(mass.shape).gather(-1, first).squeeze(-1)
    return found.masked_fill(mass[..., -1].isnan(), torch.nan)


def row_entropy(rows: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, 0 ln 0 = 0."""
    return -(rows * rows.clamp_min(torch.finfo(rows.dtype).tiny).log()).sum(-1)


def normalized(rows: Tensor) -> Tensor:
    """Rows divided by their sums; nan where that is 0/0."""
    mass = rows.sum(-1, keepdim=True)
    return rows / torch.where(mass > 0, mass, torch.nan)


def mean_of_defined(values: Tensor) -> Tensor:
    """Mean over the last dimension of what is not nan; nan where everything is."""
    defined = ~values.isnan()
    count = torch.where(defined.any(-1), defined.sum(-1), torch.nan)
    return torch.where(defined, values, 0).sum(-1) / count


def checked(attention: Array, prefix_tokens: int) -> Tensor:
    """The attention as a tensor.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
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


class PerImage(NamedTuple):
    """One layer's per-image numbers."""

    mean: np.ndarray
    """(images, heads) float32, mean over defined query rows; nan where there is none."""
    undefined_rows: np.ndarray
    """(images, heads) int32, query rows left out of the mean."""


Needs = Literal["rows", "heads", "map"]
Asks = Literal["rows", "patches", "places", "class"]
SUMS: Final = np.dtype([("total", np.float32), ("defined", np.int32), ("undefined", np.int32)])
"""What is kept of an image and head."""


class AttentionMeasure(Measure):
    """A number kept for every image, layer and head.

    Per-image numbers are what paired comparisons between models need. The state is 12 bytes an
    image and head; images are keyed by their index in the run, so merging is a union and exact.
    """

    info: ClassVar[Info]
    needs: ClassVar[Needs]
    """What a chunk must hold together: `rows`, any part of the queries and heads; `heads`, all
    heads of a row; `map`, all heads and all queries of an image, which may come in parts, of a
    layer that is one map of all patches."""
    asks: ClassVar[Asks] = "rows"
    """What the queries and keys of a layer must be: `rows`, anything; `patches`, tokens of the
    image; `places`, tokens whose centres are known; `class`, a class token among the queries."""
    relative: ClassVar[bool] = False
    """Whether the value under uniform attention is a unit."""
    per_block: ClassVar[bool] = False
    """One number a block, its heads fused: arrays are (images, 1)."""
    mapless: ClassVar[bool] = False
    """Whether it takes no more of a chunk than `rows`, so that no map is ever made for it."""

    def __init__(self) -> None:
        self._sums = ByImage(self.info.name, SUMS)

    @classmethod
    def uniform(cls, chunk: AttentionChunk) -> float | None:
        """The value under uniform attention, which relative units divide by; None: no such unit.

        Args:
            chunk: uniform attention of a whole layer, or of one of its windows.
        """
        return None

    def update(self, chunk: AttentionChunk) -> None:
        """Add one chunk.

        Raises:
            MeasureError: the attention itself holds nan, which is no undefined row; or it comes
                otherwise than `needs` says.
        """
        if not self.mapless and chunk.has_nan:
            raise MeasureError(f"attention is NaN in layer {chunk.layer}")
        self._add(chunk)

    @abstractmethod
    def _add(self, chunk: AttentionChunk) -> None:
        """Add one chunk, whose attention holds no nan."""

    def merge(self, other: Self) -> None:
        """Add the images of another instance.

        Raises:
            MeasureError: an image that both have seen, or one of which only a part has come.
        """
        self.settle()
        other.settle()
        self._sums.merge(other._sums)

    def settle(self) -> None:
        """Complete the sums of what has come, so that an error in it is told here.

        Raises:
            MeasureError: attention that holds nan, or an image of which only a part has come.
        """

    def kept(self) -> dict[int, np.ndarray]:
        """layer -> (images, heads) sums, fields total, defined and undefined, for `put`."""
        self.settle()
        return self._sums.layers()

    def put(self, layer: int, first_image: int, sums: np.ndarray) -> None:
        """Add images `first_image` … as another instance kept them.

        Raises:
            MeasureError: an image that has come before.
        """
        self._sums.put(layer, first_image, sums)

    def compute(self) -> dict[int, PerImage]:
        """Per-image numbers of every layer, images in order of the run.

        Raises:
            MeasureError: an image of which only a part has come.
        """
        self.settle()
        return {
            layer: PerImage(
                np.divide(
                    sums["total"],
                    sums["defined"],
                    out=np.full_like(sums["total"], np.nan),
                    where=sums["defined"] > 0,
                ),
                sums["undefined"].copy(),
            )
            for layer, sums in self._sums.layers().items()
        }


def add(measures: Iterable[AttentionMeasure], chunk: AttentionChunk) -> None:
    """Add a chunk to measures: as it is to those that need no map, in small parts to the others.

    Raises:
        MeasureError: as `AttentionMeasure.update`.
    """
    measures = list(measures)
    for measure in measures:
        if measure.mapless:
            measure.update(chunk)
    others = [measure for measure in measures if not measure.mapless]
    if others:
        for part in chunk.parts():
            for measure in others:
                measure.update(part)


class _Waiting(NamedTuple):
    """Sums of some images of a layer on their device."""

    layer: int
    first_image: int
    sums: Tensor
    """(total, undefined rows, damaged; images, heads)."""
    rows: int


class RowMeasure(AttentionMeasure):
    """A mean over query rows.

    What a device other than the CPU computes is fetched from it only when it is asked for: waiting
    for it after every layer would leave the device without work.
    """

    needs: ClassVar[Needs] = "rows"

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[_Waiting] = []

    @abstractmethod
    def rows(self, chunk: AttentionChunk) -> Tensor:
        """(images, heads, rows) values, nan where a row is undefined."""

    @classmethod
    def uniform(cls, chunk: AttentionChunk) -> float | None:
        if not cls.relative:
            return None
        level = float(mean_of_defined(cls().rows(chunk).flatten()))
        return level if level > 0 else None

    def _add(self, chunk: AttentionChunk) -> None:
        rows = self.rows(chunk)
        undefined = rows.isnan()
        sums = [rows.masked_fill(undefined, 0).sum(-1), undefined.sum(-1)]
        if self.mapless:
            sums.append(chunk.rows.sink.isnan().sum(-1))
        # Counts of rows are exact in single precision.
        waiting = torch.stack([part.float() for part in sums])
        self._waiting.append(_Waiting(chunk.layer, chunk.first_image, waiting, rows.shape[-1]))
        if rows.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        flat = torch.cat([part.sums.flatten() for part in waiting]).cpu()
        numbers = flat.split([part.sums.numel() for part in waiting])
        for part, found in zip(waiting, numbers, strict=True):
            total, undefined, *damaged = found.view(part.sums.shape).numpy()
            if any(count.any() for count in damaged):
                raise MeasureError(f"attention is NaN in layer {part.layer}")
            sums = self._sums.room(part.layer, part.first_image, *total.shape)
            sums["total"] += total
            sums["defined"] += (part.rows - undefined).astype(np.int32)
            sums["undefined"] += undefined.astype(np.int32)


class _Part(NamedTuple):
    images: int
    queries: int
    content: tuple[Tensor, ...]


class MapMeasure(AttentionMeasure):
    """A number of a whole map: all queries of an image.

    Parts of a map come in order of their queries, each for the same images.
    """

    needs = "map"

    def __init__(self) -> None:
        super().__init__()
        self._unfinished: dict[tuple[int, int], _Part] = {}

    @abstractmethod
    def part(self, chunk: AttentionChunk) -> tuple[Tensor, ...]:
        """What is kept of some queries of a map."""

    @abstractmethod
    def join(self, before: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is kept of the queries of both."""

    @abstractmethod
    def finish(self, chunk: AttentionChunk, content: tuple[Tensor, ...]) -> PerImage:
        """The numbers of the images of a map that is whole; `chunk` is its last part."""

    def _add(self, chunk: AttentionChunk) -> None:
        if not chunk.whole:
            raise MeasureError(
                f"{self.info.name}: attention layer {chunk.layer} is not one map of all patches"
            )
        images, _, rows, _ = chunk.shape
        key = chunk.layer, chunk.first_image
        before = self._unfinished.pop(key, None)
        expected = (images, 0) if before is None else before[:2]
        if (images, chunk.first_query) != expected:
            raise MeasureError(
                f"{self.info.name}: layer {chunk.layer}, {images} images from "
                f"{chunk.first_image}: queries from {chunk.first_query} come where queries from "
                f"{expected[1]} of {expected[0]} images do; give the parts of a map in order"
            )
        part = self.part(chunk)
        content = part if before is None else self.join(before.content, part)
        rows += chunk.first_query
        if chunk.queries is not None and rows < chunk.queries:
            self._unfinished[key] = _Part(images, rows, content)
            return
        value, undefined = self.finish(chunk, content)
        sums = np.zeros(value.shape, SUMS)
        sums["total"] = np.nan_to_num(value)
        sums["defined"] = ~np.isnan(value)
        sums["undefined"] = undefined
        self._sums.put(chunk.layer, chunk.first_image, sums)

    def settle(self) -> None:
        for (layer, first), part in self._unfinished.items():
            raise MeasureError(
                f"{self.info.name}: of the map of image {first} in layer {layer} only the first "
                f"{part.queries} queries have come; give all of them"
            )
