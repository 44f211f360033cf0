"""Intervals of an accuracy over the test images: the bootstrap, without its resampling noise.

Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979; the percentile
interval. The mean of n answers, right or wrong, resampled with replacement is binomial: its
percentiles are those of Binomial(n, k / n) / n, what infinitely many resamples would give.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from vitprobe.errors import ResultError

_RESAMPLES: Final = 2000


class Interval(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


def accuracy_interval(hits: int, images: int, level: float = 0.95) -> Interval:
    """An accuracy, a share of 1, with its percentile bootstrap interval over images.

    Where all answers are right, or all wrong, every resample is the same and would leave no doubt:
    the other end is then Clopper and Pearson's (Biometrika 1934), the accuracy at which this would
    still happen with probability (1 - level) / 2.

    Args:
        hits: how many of the answers are right.
        images: how many there are.
        level: of the interval.

    Raises:
        ResultError: no images, or a level that is no probability.
    """
    if not 0 < level < 1:
        raise ResultError(f"a level of {level} is no probability; give one such as 0.95")
    if not 0 <= hits <= images or images == 0:
        raise ResultError(f"{hits} of {images} images is no accuracy")
    tail = (1 - level) / 2
    surprise = 1 - tail ** (1 / images)
    if hits == 0:
        return Interval(0.0, 0.0, surprise)
    if hits == images:
        return Interval(1.0, 1 - surprise, 1.0)
    low, high = binom.ppf([tail, 1 - tail], images, hits / images) / images
    return Interval(hits / images, float(low), float(high))


def class_mean_interval(
    hits: NDArray[np.bool_], labels: NDArray[np.int64], level: float = 0.95
) -> Interval:
    """The mean over classes of their accuracies, with its percentile bootstrap interval.

    Images are resampled within their class, 2,000 times, under a fixed seed: so each class keeps
    its number of images, of which the mean over classes makes nothing.

    Args:
        hits: (images,) whether the answer is right.
        labels: (images,) classes; those without images do not count.
        level: of the interval.

    Raises:
        ResultError: no images, or a level that is no probability.
    """
    if not 0 < level < 1:
        raise ResultError(f"a level of {level} is no probability; give one such as 0.95")
    if len(hits) == 0:
        raise ResultError("there are no images to take an accuracy of")
    sizes = np.bincount(labels)
    right = np.bincount(labels, weights=hits)[sizes > 0]
    sizes = sizes[sizes > 0]
    value = float((right / sizes).mean())
    drawn = np.random.default_rng(0).binomial(sizes, right / sizes, (_RESAMPLES, len(sizes)))
    tail = (1 - level) / 2
    low, high = np.quantile((drawn / sizes).mean(axis=1), [tail, 1 - tail])
    return Interval(value, float(low), float(high))
