"""Labelled images in memory, split into training and test, for the training recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitprobe.errors import DataError, suggest

_SOURCES = ("digits",)
_DIGITS_TRAINING_IMAGES = 1437


@dataclass(frozen=True)
class LabelledArrays:
    """Images with one class each; `train` and `test` index disjoint parts of them.

    images: (n, channels, height, width) float32 in [0, 1].
    labels: (n,) int64, indices into `classes`.
    classes: the name of each class.
    train, test: (n_train,) and (n_test,) int64.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def load_labelled(source: str | Path) -> LabelledArrays:
    """The labelled images `source` names; "digits" is scikit-learn's.

    Raises DataError for any other source.
    """
    if str(source) == "digits":
        return _digits()
    raise DataError(
        f"Labelled images from {str(source)!r} are not supported; "
        f"use one of: {', '.join(_SOURCES)}.{suggest(str(source), _SOURCES)}"
    )


def _digits() -> LabelledArrays:
    """1,797 handwritten digits, 8 x 8 grey, 0..16 in the source (Alpaydin & Kaynak, UCI, 1998).

    The split is the same in every run whatever its seed, so that test accuracies compare.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images)).astype(np.int64)
    return LabelledArrays(
        images=(bunch.images[:, None] / 16).astype(np.float32),
        labels=bunch.target.astype(np.int64),
        classes=tuple(str(name) for name in bunch.target_names),
        train=order[:_DIGITS_TRAINING_IMAGES],
        test=order[_DIGITS_TRAINING_IMAGES:],
    )
