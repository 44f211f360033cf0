"""Attention maps and thumbnails of the first images, kept for pictures."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr

from vitprobe.data.images import Block
from vitprobe.measures.attention import AttentionChunk
from vitprobe.models import Model

SAMPLES: Final = 8
SAMPLE_BYTES: Final = 4 << 20
"""Most bytes of maps kept of one model; beyond it, fewer query rows are kept."""
THUMBNAIL: Final = 96


class SampleMaps:
    """Attention maps of the first images, as many query rows as fit in `SAMPLE_BYTES`.

    Of the attention layers in which all tokens of the model's first layer attend to all of them;
    nothing of windows, pooled keys and later stages.
    """

    def __init__(self, model: Model) -> None:
        first = model.anatomy.residual[0]
        self.prefix = first.prefix_tokens
        self.keys = self.prefix + first.patches
        self.heads = {
            layer: site.heads
            for layer, site in enumerate(model.anatomy.sites)
            if first.grid is not None and site.whole and site.keys == self.keys
        }
        row_bytes = 2 * SAMPLES * sum(self.heads.values()) * self.keys
        self.queries = np.zeros(0, int)
        if self.heads and first.grid is not None:
            self.queries = _sample_queries(first.grid, self.prefix, row_bytes)
        self.maps: dict[tuple[int, int], np.ndarray] = {}

    def update(self, chunk: AttentionChunk) -> None:
        """Keep what of a chunk is of the first images."""
        images = min(chunk.log_p.shape[0], SAMPLES - chunk.first_image)
        if images <= 0 or chunk.layer not in self.heads:
            return
        rows = self.queries - chunk.first_query
        inside = (rows >= 0) & (rows < chunk.log_p.shape[2])
        chosen = torch.from_numpy(rows[inside]).to(chunk.log_p.device)
        attention = chunk.log_p[:images].index_select(2, chosen).exp().half().cpu().numpy()
        for image in range(images):
            map_ = self.maps.setdefault(
                (chunk.layer, chunk.first_image + image),
                np.zeros((chunk.log_p.shape[1], len(self.queries), self.keys), np.float16),
            )
            map_[:, inside] = attention[image]

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


def thumbnails(block: Block) -> np.ndarray:
    """(samples, THUMBNAIL, THUMBNAIL, 3) uint8 of the first images, from the richest view."""
    view = max(block.views, key=lambda v: (v.channels, v.height * v.width))
    pixels = block.views[view][:SAMPLES]
    pixels = F.interpolate(pixels, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
