"""Numbers of every image, kept by layer and by the image's index in the run."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from vitprobe.errors import MeasureError

OVER_IMAGES: Final = (
    "t interval of the mean over images (images - 1 degrees of freedom), pointwise; models are "
    "compared by the differences paired on the same images"
)
"""`Info.interval` of what is kept by image."""


_LEAST: Final = 128
"""Images there is room for from the start."""


class ByImage:
    """Rows of numbers by layer and image: what merges as a union, and so exactly.

    A few large arrays that grow seldom: a small one kept for every chunk, allocated between the
    chunk's own large tensors, would keep the allocator from giving those back. They begin with the
    first image that comes, so that a part late in a run is no larger than one early in it.

    Args:
        name: of the measure, for messages.
        dtype: of the numbers; new ones are 0.
    """

    def __init__(self, name: str, dtype: Any) -> None:
        self._name = name
        self._dtype = np.dtype(dtype)
        self._layers: dict[int, _Rows] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(rows.values.nbytes + rows.seen.nbytes for rows in self._layers.values())

    def room(self, layer: int, first: int, count: int, width: int) -> np.ndarray:
        """The numbers of images `first` … of a layer, (count, width), to be written to.

        Raises:
            MeasureError: the layer had another width before.
        """
        rows = self._grown(layer, first, count, width)
        rows.seen[rows.at(first, count)] = True
        return rows.values[rows.at(first, count)]

    def _grown(self, layer: int, first: int, count: int, width: int) -> _Rows:
        """A layer's numbers, with room for images `first` …"""
        known = self._layers.get(layer)
        if known is None:
            known = _Rows(first, np.zeros((0, width), self._dtype), np.zeros(0, bool))
        if known.values.shape[1] != width:
            raise MeasureError(
                f"{self._name}: layer {layer} gives {width} numbers an image after "
                f"{known.values.shape[1]}; measure each model on its own"
            )
        begin, end = min(first, known.first), max(first + count, known.end)
        if begin < known.first or end > known.end:
            room = max(_LEAST, 2 * (end - begin))
            grown = _Rows(begin, np.zeros((room, width), self._dtype), np.zeros(room, bool))
            before = grown.at(known.first, len(known.seen))
            # Of a process that has every Nth block, what lies between takes no memory untouched.
            grown.values[before][known.seen] = known.values[known.seen]
            grown.seen[before] = known.seen
            self._layers[layer] = known = grown
        return known

    def __getstate__(self) -> dict[str, Any]:
        """The images seen alone: a process that has every Nth block hands on no gaps."""
        layers = {layer: (self.images(layer), rows) for layer, rows in self.layers().items()}
        return {"name": self._name, "dtype": self._dtype, "layers": layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._name, self._dtype, self._layers = state["name"], state["dtype"], {}
        for layer, (images, rows) in state["layers"].items():
            first = int(images[0]) if len(images) else 0
            count = int(images[-1]) - first + 1 if len(images) else 0
            kept = self._grown(layer, first, count, rows.shape[1])
            kept.values[images - first], kept.seen[images - first] = rows, True

    def put(self, layer: int, first: int, rows: np.ndarray) -> None:
        """Keep (count, width) rows of images that have none yet.

        Raises:
            MeasureError: an image that has come before.
        """
        kept = self._grown(layer, first, *rows.shape)
        seen = kept.seen[kept.at(first, len(rows))]
        if seen.any():
            raise MeasureError(
                f"{self._name}: image {first + seen.argmax()} comes twice in layer {layer}; give "
                "every image of a run an index of its own"
            )
        self.room(layer, first, *rows.shape)[...] = rows

    def merge(self, other: ByImage) -> None:
        """Add the images of another instance.

        Raises:
            MeasureError: an image that both have seen.
        """
        for layer, theirs in other._layers.items():
            ours = self._grown(layer, theirs.first, *theirs.used.shape)
            place = ours.at(theirs.first, theirs.length)
            shared = ours.seen[place] & theirs.seen[: theirs.length]
            if shared.any():
                raise MeasureError(
                    f"{self._name}: image {theirs.first + shared.argmax()} is in both parts to be "
                    "merged"
                )
        for layer, theirs in other._layers.items():
            ours, seen = self._layers[layer], theirs.seen[: theirs.length]
            place = ours.at(theirs.first, theirs.length)
            ours.values[place][seen] = theirs.used[seen]
            ours.seen[place] |= seen

    def images(self, layer: int) -> np.ndarray:
        """Indices of the images seen in a layer, ascending."""
        rows = self._layers[layer]
        return rows.first + np.flatnonzero(rows.seen)

    def layers(self) -> dict[int, np.ndarray]:
        """layer -> (images, width), copies in order of the images."""
        return {layer: rows.values[rows.seen] for layer, rows in sorted(self._layers.items())}


class _Rows(NamedTuple):
    """Numbers of images `first` …, with room to spare at the end."""

    first: int
    values: np.ndarray
    seen: np.ndarray

    @property
    def end(self) -> int:
        """Behind the last image there is room for."""
        return self.first + len(self.seen)

    @property
    def length(self) -> int:
        """How many rows there are up to the last image seen."""
        return int(np.flatnonzero(self.seen)[-1]) + 1 if self.seen.any() else 0

    @property
    def used(self) -> np.ndarray:
        """The rows up to the last image seen."""
        return self.values[: self.length]

    def at(self, first: int, count: int) -> slice:
        """Where some images lie."""
        return slice(first - self.first, first - self.first + count)
