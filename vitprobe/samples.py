"""Attention maps and thumbnails of the first images, kept for pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from vitprobe.measures.attention import AttentionChunk
from vitprobe.models import Anatomy
from vitprobe.models.model import Subject

if TYPE_CHECKING:
    from vitprobe.model_block import ModelBlock

SAMPLES: Final = 8
SAMPLE_BYTES: Final = 4 << 20
"""Most bytes of maps kept of one model; beyond it, fewer query rows are kept."""
THUMBNAIL: Final = 96


class SampleMaps:
    """Attention maps of the first images, as many query rows as fit in `SAMPLE_BYTES`.

    Of the attention layers in which all tokens of the model's first layer attend to all of them;
    nothing of windows, pooled keys and later stages.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        first = anatomy.residual[0]
        self.prefix = first.prefix_tokens
        self.keys = self.prefix + first.patches
        self.heads = {
            layer: site.heads
            for layer, site in enumerate(anatomy.sites)
            if first.grid is not None and site.whole and site.keys == self.keys
        }
        row_bytes = 2 * SAMPLES * sum(self.heads.values()) * self.keys
        self.queries = np.zeros(0, int)
        if self.heads and first.grid is not None:
            self.queries = _sample_queries(first.grid, self.prefix, row_bytes)
        self.maps: dict[tuple[int, int], np.ndarray] = {}
        """(heads, queries, keys) float16 of each layer and image."""

    def update(self, chunk: AttentionChunk) -> None:
        """Keep what of a chunk is of the first images."""
        images = min(chunk.shape[0], SAMPLES - chunk.first_image)
        if images <= 0 or chunk.layer not in self.heads:
            return
        for part in chunk.part(slice(0, images), slice(0, chunk.shape[2])).parts():
            self._keep(part)

    def _keep(self, part: AttentionChunk) -> None:
        rows = self.queries - part.first_query
        inside = (rows >= 0) & (rows < part.shape[2])
        chosen = torch.from_numpy(rows[inside]).to(part.device)
        attention = part.log_p.index_select(2, chosen).exp().half().cpu().numpy()
        for image, kept in enumerate(attention, part.first_image):
            map_ = self.maps.setdefault(
                (part.layer, image),
                np.zeros((self.heads[part.layer], len(self.queries), self.keys), np.float16),
            )
            map_[:, inside] = kept

    def merge(self, other: Self) -> None:
        """Add the maps of other images of the same model."""
        self.maps |= other.maps

    def dataset(self) -> xr.Dataset | None:
        """The maps of a model in the `samples` group; None where none were kept."""
        if not self.maps:
            return None
        layers = sorted({layer for layer, _ in self.maps})
        count = 1 + max(image for _, image in self.maps)
        heads = {layer: len(self.maps[layer, 0]) for layer in layers}
        attention = np.stack(
            [
                np.concatenate([self.maps[layer, image] for layer in layers])
                for image in range(count)
            ]
        )
        return xr.Dataset(
            {"attention": (("sample", "unit", "query", "key"), attention, {"units": "share"})},
            coords={
                "layer": ("unit", [layer for layer in layers for _ in range(heads[layer])]),
                "head": ("unit", [head for layer in layers for head in range(heads[layer])]),
                "query": ("query", self.queries),
            },
            attrs={"prefix_tokens": self.prefix},
        )


def _sample_queries(grid: tuple[int, int], prefix: int, row_bytes: int) -> np.ndarray:
    """Token indices of the query rows to keep: all, or prefix tokens and an even sub-grid."""
    rows, columns = grid
    allowed = max(1, SAMPLE_BYTES // row_bytes)
    if prefix + rows * columns <= allowed:
        return np.arange(prefix + rows * columns)
    side = max(1, math.isqrt(max(1, allowed - prefix)))

    def spread(size: int) -> np.ndarray:
        kept = min(side, size)
        return (np.arange(kept) * 2 + 1) * size // (2 * kept)

    patches = (spread(rows)[:, None] * columns + spread(columns)[None]).ravel()
    return np.concatenate([np.arange(prefix), prefix + patches])


def thumbnails(pixels: Tensor) -> np.ndarray:
    """(images, THUMBNAIL, THUMBNAIL, 3) uint8 of images as a model is given them, in [0, 1]."""
    pixels = F.interpolate(pixels, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


class Samples:
    """Maps and thumbnails of the first images, of all models."""

    def __init__(self, models: Sequence[Subject]) -> None:
        self.maps = {model.name: SampleMaps(model.anatomy) for model in models}
        self._richest = max(
            models, key=lambda m: (m.input_size[0], m.input_size[1] * m.input_size[2])
        ).name
        self._thumbnails: dict[int, np.ndarray] = {}

    def add(self, first: int, parts: Mapping[str, ModelBlock]) -> None:
        """Add what the models gave for the block that begins with image `first`."""
        for name, part in parts.items():
            if part.maps is not None:
                self.maps[name].merge(part.maps)
        if first < SAMPLES:
            self._thumbnails[first] = parts[self._richest].thumbnails

    def merge(self, other: Self) -> None:
        """Add the samples of another part of the run."""
        for name, maps in other.maps.items():
            self.maps[name].merge(maps)
        self._thumbnails |= other._thumbnails

    def groups(self, names: Sequence[str]) -> dict[str, xr.Dataset]:
        """The `samples` group and those below it; names: of all images."""
        shown = [self._thumbnails[first] for first in sorted(self._thumbnails)]
        found = {
            "samples": xr.Dataset(
                {"thumbnail": (("sample", "row", "column", "channel"), np.concatenate(shown))},
                coords={"name": ("sample", list(names[:SAMPLES]))},
            )
        }
        for index, maps in enumerate(self.maps.values()):
            if (dataset := maps.dataset()) is not None:
                found[f"samples/{index}"] = dataset
        return found
