"""Mean intersection over union, by hand and as scikit-learn has it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

from vitprobe.evaluation.dense.overlap import overlap, pixel_counts


def case(seed, images=9, classes=5, side=8):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (images, side, side), dtype=np.uint8)
    said = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, classes, truth.shape))
    truth[rng.random(truth.shape) < 0.1] = 255
    return truth, said.astype(np.uint8)


def counts(truth, said, classes):
    return np.stack([pixel_counts(t, s, classes) for t, s in zip(truth, said, strict=True)])


def test_by_hand():
    truth = np.array([[0, 0, 1, 255]], dtype=np.uint8)
    said = np.array([[0, 1, 1, 2]], dtype=np.uint8)
    found = overlap(counts([truth], [said], 4), resamples=0)
    assert found.by_class.tolist()[:2] == [0.5, 0.5]
    # What is ignored is no false positive, and a class that is nowhere is left out.
    assert np.isnan(found.by_class[2:]).all()
    assert found.miou.value == 0.5
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert math.isnan(found.miou.low)


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed):
    truth, said = case(seed)
    found = overlap(counts(truth, said, 5), resamples=0)
    kept = truth != 255
    expected = jaccard_score(truth[kept], said[kept], average=None)
    np.testing.assert_allclose(found.by_class, expected)
    assert found.miou.value == pytest.approx(expected.mean())
    assert found.accuracy.value == accuracy_score(truth[kept], said[kept])


def test_intervals_hold_the_value_and_shrink_with_images():
    few, many = (overlap(counts(*case(0, images), 5)) for images in (10, 160))
    for found in (few, many):
        assert found.miou.low < found.miou.value < found.miou.high
        assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    ratio = (few.miou.high - few.miou.low) / (many.miou.high - many.miou.low)
    assert 2 < ratio < 8
    assert overlap(counts(*case(0), 5))[0] == overlap(counts(*case(0), 5))[0]


def test_images_in_which_nothing_counts():
    nothing = np.full((2, 4, 4), 255, dtype=np.uint8)
    found = overlap(counts(nothing, np.zeros_like(nothing), 3), resamples=10)
    assert all(math.isnan(value) for value in (*found.miou, *found.accuracy))
