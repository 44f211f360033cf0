"""Whole attention maps, joined from the chunks in which they arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitprobe.measures.attention import AttentionChunk
from vitprobe.models.anatomy import Site


class Maps:
    """Joins the chunks of each computation of attention to its whole map.

    Args:
        sites: the layers to keep.
        done: called with (layer, map) of each.
    """

    def __init__(self, sites: Mapping[int, Site], done: Callable[[int, Tensor], None]) -> None:
        self._sites = sites
        self._done = done
        self._layer: int | None = None
        self._parts: dict[tuple[int, int], Tensor] = {}

    def add(self, chunk: AttentionChunk) -> None:
        """Take a chunk; those of one computation come one after the other."""
        for part in chunk.parts():
            self._add(part)

    def _add(self, chunk: AttentionChunk) -> None:
        place = (chunk.first_image, chunk.first_query)
        if chunk.layer != self._layer or place in self._parts:
            self.flush()
        if chunk.layer in self._sites:
            self._layer = chunk.layer
            self._parts[place] = chunk.log_p.exp()

    def flush(self) -> None:
        """Hand on the map that has come, if any: no more of it will."""
        if self._layer is None:
            return
        layer, parts = self._layer, self._parts
        self._layer, self._parts = None, {}
        by_image: dict[int, list[Tensor]] = {}
        for image, query in sorted(parts):
            by_image.setdefault(image, []).append(parts[image, query])
        whole = torch.cat([torch.cat(rows, dim=2) for rows in by_image.values()])
        site = self._sites[layer]
        if site.windows > 1:
            whole = whole.unflatten(2, (site.windows, site.queries)).movedim(2, 1)
        self._done(layer, whole)
