"""Numbers of every image, kept by layer and by the image's index in the run."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from vitprobe.errors import MeasureError

OVER_IMAGES: Final = (
    "t interval of the mean over images (images - 1 degrees of freedom), pointwise; models are "
    "compared by the differences paired on the same images"
)
"""`Info.interval` of what is kept by image."""


class ByImage:
    """Rows of numbers by layer and image: what merges as a union, and so exactly.

    A few large arrays that grow seldom: a small one kept for every chunk, allocated between the
    chunk's own large tensors, would keep the allocator from giving those back.

    Args:
        name: of the measure, for messages.
        dtype: of the numbers; new ones are 0.
    """

    def __init__(self, name: str, dtype: Any) -> None:
        self._name = name
        self._dtype = np.dtype(dtype)
        self._values: dict[int, np.ndarray] = {}
        self._seen: dict[int, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*self._values.values(), *self._seen.values()))

    def room(self, layer: int, first: int, count: int, width: int) -> np.ndarray:
        """The numbers of images `first` … of a layer, (count, width), to be written to.

        Raises:
            MeasureError: the layer had another width before.
        """
        images = slice(first, first + count)
        values, seen = self._grown(layer, first + count, width)
        seen[images] = True
        return values[images]

    def _grown(self, layer: int, images: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's numbers and which images they are of, with room for so many images."""
        values = self._values.get(layer, np.zeros((0, width), self._dtype))
        if values.shape[1] != width:
            raise MeasureError(
                f"{self._name}: layer {layer} gives {width} numbers an image after "
                f"{values.shape[1]}; measure each model on its own"
            )
        if len(values) < images:
            grown = np.zeros((max(1024, 2 * images), width), self._dtype)
            seen = np.zeros(len(grown), bool)
            if len(values):
                grown[: len(values)] = values
                seen[: len(values)] = self._seen[layer]
            self._values[layer], self._seen[layer] = grown, seen
        return self._values[layer], self._seen[layer]

    def put(self, layer: int, first: int, rows: np.ndarray) -> None:
        """Keep (count, width) rows of images that have none yet.

        Raises:
            MeasureError: an image that has come before.
        """
        seen = self._seen.get(layer, np.zeros(0, bool))[first : first + len(rows)]
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
        for layer, theirs in other._seen.items():
            _, ours = self._grown(layer, *other._values[layer].shape)
            shared = ours[: len(theirs)] & theirs
            if shared.any():
                raise MeasureError(
                    f"{self._name}: image {shared.argmax()} is in both parts to be merged"
                )
        for layer, theirs in other._seen.items():
            self._values[layer][: len(theirs)][theirs] = other._values[layer][theirs]
            self._seen[layer][: len(theirs)] |= theirs

    def images(self, layer: int) -> np.ndarray:
        """Indices of the images seen in a layer, ascending."""
        return np.flatnonzero(self._seen[layer])

    def layers(self) -> dict[int, np.ndarray]:
        """layer -> (images, width), copies in order of the images."""
        return {layer: self._values[layer][self._seen[layer]] for layer in sorted(self._values)}
