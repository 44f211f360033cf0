"""Intervals and tests: Student's t, Welch's t and Holm's correction. nan stands for no number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from vitprobe.errors import ResultError


class Estimate(NamedTuple):
    """A mean, or a difference of means, with its interval. Arrays, of the axes that are left."""

    value: np.ndarray
    """nan where nothing is defined."""
    low: np.ndarray
    high: np.ndarray
    """Ends of the interval; nan where there are too few values for one."""
    p: np.ndarray
    """Two-sided, of the null that the value is 0."""
    degrees: np.ndarray
    """Of freedom."""
    number: np.ndarray
    """Of values that went in (of the smaller side, where there are two)."""


def quantile(level: float, degrees: Any = math.inf) -> np.ndarray:
    """How many standard errors an interval of this level reaches to either side.

    Args:
        level: such as 0.95.
        degrees: of freedom of Student's t, any shape; infinite: normal; nan or below 1: nan.

    Raises:
        ResultError: a level that is no probability.
    """
    if not 0 < level < 1:
        raise ResultError(f"a level of {level} is no probability; give one such as 0.95")
    degrees = np.asarray(degrees, dtype=float)
    return np.asarray(stats.t.ppf((1 + level) / 2, np.where(degrees >= 1, degrees, np.nan)))


def t_interval(values: Any, level: float = 0.95, axis: int = 0) -> Estimate:
    """Student's t interval of the mean over an axis, nan left out.

    One value has a mean and no interval.

    Raises:
        ResultError: a level that is no probability.
    """
    values = np.asarray(values, dtype=float)
    mean, variance, count = _moments(values, axis)
    return _estimate(mean, np.sqrt(variance / np.maximum(count, 1)), count - 1.0, count, level)


def paired(a: Any, b: Any, level: float = 0.95, axis: int = 0) -> Estimate:
    """Student's t interval of the mean of a - b over pairs in which both are defined.

    Raises:
        ResultError: a level that is no probability.
    """
    return t_interval(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level, axis)


def welch(a: Any, b: Any, level: float = 0.95, axis: int = 0) -> Estimate:
    """Welch's interval of mean(a) - mean(b) for independent a and b of unequal variance.

    Degrees of freedom by Welch and Satterthwaite; no interval where a side has one value.

    Raises:
        ResultError: a level that is no probability.
    """
    (mean_a, variance_a, count_a), (mean_b, variance_b, count_b) = (
        _moments(np.asarray(side, dtype=float), axis) for side in (a, b)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        square_a, square_b = variance_a / count_a, variance_b / count_b
        square = square_a + square_b
        degrees = square**2 / (square_a**2 / (count_a - 1) + square_b**2 / (count_b - 1))
    # Two sides without spread leave 0/0: any number of degrees gives the same, empty interval.
    degrees = np.where(square == 0, count_a + count_b - 2.0, degrees)
    count = np.minimum(count_a, count_b)
    return _estimate(mean_a - mean_b, np.sqrt(square), degrees, count, level)


def holm(p: Any) -> np.ndarray:
    """Holm's (1979) adjusted p-values of a list; nan stays nan and is no member of the family."""
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def _moments(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance (n - 1) and number of the defined values."""
    defined = ~np.isnan(values)
    count = defined.sum(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(defined, values, 0).sum(axis) / count
        deviation = np.where(defined, values - np.expand_dims(mean, axis), 0)
        variance = (deviation**2).sum(axis) / (count - 1)
    # Equal values have no spread, though the rounding of their mean may say so.
    widest = np.abs(deviation).max(axis, initial=0)
    variance = np.where(widest <= 1e-15 * np.abs(mean), variance * 0, variance)
    return mean, np.where(count > 1, variance, np.nan), count


def _estimate(
    value: np.ndarray, error: np.ndarray, degrees: np.ndarray, count: np.ndarray, level: float
) -> Estimate:
    margin = quantile(level, degrees) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without spread, 0 differs from 0 by nothing and any other value by infinitely much.
        t = np.where(value == 0, 0 * error, np.abs(value) / error)
    p = 2 * stats.t.sf(t, np.where(degrees >= 1, degrees, np.nan))
    return Estimate(value, value - margin, value + margin, np.asarray(p), degrees, count)
