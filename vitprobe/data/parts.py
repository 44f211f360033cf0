"""What labelled data are: images with a class each, as arrays or as files still encoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitprobe.data.decoding import decode_image
from vitprobe.errors import DataError

Labels: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arrays:
    """Decoded images in memory.

    images: (n, channels, height, width), uint8, or float32 in [0, 1].
    labels: (n,) int64, indices into the classes; None where there are none.
    """

    images: NDArray[Any]
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, i: int) -> Tensor:
        """Image i: (channels, height, width) uint8."""
        image = self.images[i]
        if image.dtype != np.uint8:
            image = np.rint(image * 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(image))


@dataclass(frozen=True, eq=False)
class Files:
    """Encoded images, decoded when asked for; picklable, so that worker processes can.

    source: what they were found in.
    names: one for each image, for messages.
    labels: (n,) int64, indices into the classes; None where there are none.
    read: the bytes of the i-th.
    channels: 3 to decode to RGB, 1 to ITU-R BT.601 luminance.
    """

    source: str
    names: Sequence[str]
    labels: Labels | None
    read: Callable[[int], bytes]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, i: int) -> Tensor:
        """Image i: (channels, height, width) uint8, as stored: EXIF orientation is not applied.

        Raises:
            DataError: the file is missing or damaged, whatever the decoder makes of that.
        """
        try:
            return decode_image(self.read(i), self.channels)
        except MemoryError:
            raise
        except Exception as error:
            # Decoders raise whatever damaged bytes lead them to.
            name = os.fsencode(self.names[i]).decode("utf-8", "backslashreplace")
            why = (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]
            raise DataError(
                f"cannot decode '{name}' of '{self.source}': {why}; replace or remove it"
            ) from error


Part: TypeAlias = Arrays | Files


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images to train on and, where there are any, held-out ones of the same classes.

    classes: the name of each label; () where there are no labels.
    """

    source: str
    train: Part
    test: Part | None
    classes: tuple[str, ...]


class Split(NamedTuple):
    """What one source holds: either part may be missing."""

    train: Part | None
    test: Part | None
    classes: tuple[str, ...]


class Names(Sequence[str]):
    """File names in one piece of memory.

    A list of a million strings would be copied page by page into every worker process, as reading
    a string writes to its reference count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]])


def same_classes(source: str, train: Sequence[str], test: Sequence[str], part: Part) -> Part:
    """Held-out images with the labels that the training images give to classes of these names.

    Raises:
        DataError: a class that only one of the two has, naming it.
    """
    odd = sorted(set(train) ^ set(test))
    if not odd:
        if part.labels is None or list(train) == list(test):
            return part
        places = np.array([train.index(name) for name in test])
        return replace(part, labels=places[part.labels])
    one, other = ("training", "held-out") if odd[0] in train else ("held-out", "training")
    raise DataError(
        f"'{source}' has class '{odd[0]}' among its {one} images and not among its {other} ones; "
        "both must have the same classes"
    )


def numbered_classes(*parts: Labels | None) -> tuple[str, ...]:
    """Names for classes that have numbers only: as many as the largest label asks for."""
    known = [labels for labels in parts if labels is not None and len(labels)]
    return (
        tuple(str(k) for k in range(1 + max(int(labels.max()) for labels in known)))
        if known
        else ()
    )


@dataclass(frozen=True)
class _Chosen:
    """Reads some of the images that `read` does."""

    read: Callable[[int], bytes]
    indices: NDArray[np.int64]

    def __call__(self, i: int) -> bytes:
        return self.read(int(self.indices[i]))


def subset(part: Part, indices: NDArray[np.int64]) -> Part:
    """Some of the images, in the order of `indices` (m,)."""
    labels = None if part.labels is None else part.labels[indices]
    if isinstance(part, Arrays):
        return Arrays(part.images[indices], labels)
    names = Names(part.names[int(i)] for i in indices)
    return replace(part, names=names, labels=labels, read=_Chosen(part.read, indices))
