"""Mean intersection over union of maps of classes, with intervals over images.

Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, section 4.2: the pixels
of all images together, averaged over the classes that are there or were predicted.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitprobe.data.semantic import IGNORED
from vitprobe.evaluation.intervals import Interval

_RESAMPLES: Final = 1000


class Overlap(NamedTuple):
    """miou, accuracy: shares of 1. by_class: the IoU of each, nan for one that is nowhere."""

    miou: Interval
    accuracy: Interval
    by_class: NDArray[np.float64]


def pixel_counts(
    truth: NDArray[np.uint8], predicted: NDArray[np.uint8], classes: int
) -> NDArray[np.int64]:
    """(3, classes) of one image: pixels of each class that were found, that are there, and that
    were predicted; those whose class is `IGNORED` in `truth` count for nothing."""
    kept = truth != IGNORED
    there, said = truth[kept], predicted[kept]
    return np.stack(
        [np.bincount(values, minlength=classes) for values in (there[there == said], there, said)]
    )


def overlap(counts: NDArray[np.int64], *, resamples: int = _RESAMPLES, seed: int = 0) -> Overlap:
    """The scores of images with these `pixel_counts`, (images, 3, classes).

    Intervals are percentiles of the bootstrap over images (Efron 1979); resamples: 0 for none.
    """
    total = counts.sum(axis=0)
    by_class = _iou(total)
    miou, accuracy = Interval(_mean(by_class)), Interval(_accuracy(total))
    if resamples:
        rng = np.random.default_rng(seed)
        images = len(counts)
        flat = counts.reshape(images, -1)
        drawn = np.empty((resamples, 2))
        for i in range(resamples):
            weights = rng.multinomial(images, np.full(images, 1 / images))
            again = (weights @ flat).reshape(total.shape)
            drawn[i] = _mean(_iou(again)), _accuracy(again)
        low, high = _ends(drawn)
        miou = Interval(miou.value, float(low[0]), float(high[0]))
        accuracy = Interval(accuracy.value, float(low[1]), float(high[1]))
    return Overlap(miou, accuracy, by_class)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _ends(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, n): the ends of the intervals, of resamples in which anything counts."""
    known = drawn[~np.isnan(drawn).any(axis=1)]
    if not len(known):
        return np.full((2, drawn.shape[1]), np.nan)
    ends: NDArray[np.float64] = np.quantile(known, [0.025, 0.975], axis=0)
    return ends


def _iou(total: NDArray[np.int64]) -> NDArray[np.float64]:
    found, there, said = total
    union = there + said - found
    return np.where(union > 0, found / np.maximum(union, 1), np.nan)


def _accuracy(total: NDArray[np.int64]) -> float:
    pixels = total[1].sum()
    return float(total[0].sum() / pixels) if pixels else float("nan")
