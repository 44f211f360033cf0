"""Labelled arrays: shapes, range, a split that is fixed and disjoint."""

from __future__ import annotations

import numpy as np
import pytest

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def test_digits_have_the_documented_shapes_and_range() -> None:
    digits = load_labelled("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == np.float32
    assert digits.labels.dtype == np.int64
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert digits.classes == tuple("0123456789")
    assert set(digits.labels.tolist()) == set(range(10))


def test_the_split_covers_every_image_once_and_is_the_same_each_time() -> None:
    first, second = load_labelled("digits"), load_labelled("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert sorted([*first.train, *first.test]) == list(range(1797))
    np.testing.assert_array_equal(first.train, second.train)


def test_an_unknown_source_is_named_and_the_nearest_suggested() -> None:
    with pytest.raises(DataError, match=r"'digit'.*Did you mean 'digits'\?"):
        load_labelled("digit")
