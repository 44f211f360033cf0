"""Which of the training images have labels, and which of those are held out: by class, by seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitprobe.errors import DataError

Indices = NDArray[np.int64]


def labelled_subset(labels: NDArray[np.int64], share: float, seed: int) -> Indices:
    """A share of the images, the same share of every class, at least one of each: sorted indices.

    Of a class with n images round(n x share) are drawn (halves to even), without replacement. With
    the same seed a smaller share is part of a larger one.

    Args:
        labels: (n,) classes.
        share: within (0, 1]; 1 is all of them, whatever the seed.
        seed: of the draw.

    Raises:
        DataError: a share that is none.
    """
    if not 0 < share <= 1:
        raise DataError(f"a share of labels of {share:g} is none; give one in (0, 1]")
    kept = [own[: max(1, round(len(own) * share))] for own in _by_class(labels, seed)]
    return np.sort(np.concatenate(kept))


def held_out(labels: NDArray[np.int64], share: float, seed: int) -> tuple[Indices, Indices]:
    """Two parts of the images, sorted indices: to fit on, and to choose by.

    Of a class with n images round(n x share) are held out, at least one where it has two, and never
    the last: a class with a single image stays with those to fit on.
    """
    fitted, kept = [], []
    for own in _by_class(labels, seed):
        count = min(max(1, round(len(own) * share)), len(own) - 1)
        kept.append(own[:count])
        fitted.append(own[count:])
    return np.sort(np.concatenate(fitted)), np.sort(np.concatenate(kept))


def _by_class(labels: NDArray[np.int64], seed: int) -> list[Indices]:
    """Indices of each class, in the order of one permutation."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return [order[labels[order] == label] for label in np.unique(labels)]
