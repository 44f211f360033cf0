"""Intervals of an accuracy over the test images: the bootstrap, without its resampling noise.

Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979; the percentile
interval. The mean of n answers, right or wrong, resampled with replacement is binomial: its
percentiles are those of Binomial(n, k / n) / n, what infinitely many resamples would give.
"""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import binom

from vitprobe.errors import ResultError


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
