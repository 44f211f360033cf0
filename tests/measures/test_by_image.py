from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures.by_image import ByImage

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def kept(*slices):
    store = ByImage("test", np.float32)
    for first, last in slices:
        store.put(0, first, ROWS[first:last])
    return store


@given(st.permutations([(0, 3), (3, 4), (4, 11), (11, 20)]), st.integers(0, 4))
def test_any_order_and_split_give_the_whole(parts, cut):
    merged = kept(*parts[:cut])
    merged.merge(kept(*parts[cut:]))
    np.testing.assert_array_equal(merged.layers()[0], ROWS)
    np.testing.assert_array_equal(merged.images(0), np.arange(20))


def test_gaps_stay_gaps():
    store = kept((0, 2), (7, 9))
    np.testing.assert_array_equal(store.images(0), [0, 1, 7, 8])
    np.testing.assert_array_equal(store.layers()[0], ROWS[[0, 1, 7, 8]])
    store.merge(kept((2, 7)))
    np.testing.assert_array_equal(store.layers()[0], ROWS[:9])


def test_a_late_part_takes_no_more_room_than_an_early_one():
    early, late = ByImage("test", np.float32), ByImage("test", np.float32)
    early.put(0, 0, ROWS)
    late.put(0, 10_000_000, ROWS)
    assert late.nbytes == early.nbytes < 4000
    assert late.images(0).tolist() == list(range(10_000_000, 10_000_020))


def test_gaps_are_not_pickled():
    store = kept((0, 2), (7, 9))
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.images(0), store.images(0))
    np.testing.assert_array_equal(again.layers()[0], store.layers()[0])
    again.merge(kept((2, 7)))
    np.testing.assert_array_equal(again.layers()[0], ROWS[:9])
    spread = ByImage("test", np.float32)
    for first in (0, 1_000_000):
        spread.put(0, first, ROWS)
    assert len(pickle.dumps(spread)) < 2000


def test_room_grows_seldom():
    store, grown, before = ByImage("test", np.float32), 0, 0
    for first in range(0, 4096, 8):
        store.room(0, first, 8, 3)[...] = 1
        grown, before = grown + (store.nbytes != before), store.nbytes
    assert grown <= 7
    assert store.nbytes <= 2 * 4104 * (3 * 4 + 1)
    assert len(store.layers()[0]) == 4096


def test_an_image_counts_once():
    with pytest.raises(MeasureError, match="test: image 3 comes twice in layer 0"):
        kept((0, 4), (3, 5))
    store = kept((0, 4))
    with pytest.raises(MeasureError, match="test: image 2 is in both parts"):
        store.merge(kept((2, 6)))
    np.testing.assert_array_equal(store.layers()[0], ROWS[:4])
    with pytest.raises(MeasureError, match="gives 2 numbers an image after 3"):
        store.put(0, 4, ROWS[:1, :2])
