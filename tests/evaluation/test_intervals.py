"""The bootstrap interval of an accuracy, against resampling and against known answers."""

from __future__ import annotations

import numpy as np
import pytest

from vitprobe.errors import ResultError
from vitprobe.evaluation.intervals import accuracy_interval


@pytest.mark.parametrize(("hits", "images"), [(324, 360), (45, 100), (907, 1000)])
def test_is_what_resampling_the_images_gives(hits, images):
    answers = np.arange(images) < hits
    draws = np.random.default_rng(0).integers(images, size=(2000, images))
    low, high = np.percentile(answers[draws].mean(axis=1), [2.5, 97.5])
    found = accuracy_interval(hits, images)
    assert found.value == hits / images
    assert found.low == pytest.approx(low, abs=0.15 / images**0.5)
    assert found.high == pytest.approx(high, abs=0.15 / images**0.5)


def test_no_error_among_few_images_is_no_certainty():
    assert accuracy_interval(3, 3) == pytest.approx((1, 0.025 ** (1 / 3), 1))
    assert accuracy_interval(0, 3) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 3)))


@pytest.mark.parametrize(("hits", "images"), [(4, 3), (-1, 3), (0, 0)])
def test_what_is_no_accuracy_is_refused(hits, images):
    with pytest.raises(ResultError, match="no accuracy"):
        accuracy_interval(hits, images)


def test_a_level_is_a_probability():
    assert accuracy_interval(50, 100, 0.5).low > accuracy_interval(50, 100).low
    with pytest.raises(ResultError, match="level of 95"):
        accuracy_interval(1, 3, 95)
