from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vitprobe.errors import ResultError
from vitprobe.statistics import holm, paired, quantile, t_interval, welch

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(20, 3)), 2 * RNG.normal(size=(7, 3)) + 1


def test_t_interval_is_students():
    found = t_interval(A, 0.9)
    expected = stats.ttest_1samp(A, 0)
    low, high = expected.confidence_interval(0.9)
    np.testing.assert_allclose(found.value, A.mean(0))
    np.testing.assert_allclose([found.low, found.high], [low, high])
    np.testing.assert_allclose(found.p, expected.pvalue)
    assert (found.degrees == 19).all()
    assert (found.number == 20).all()


def test_the_axis_and_undefined_values():
    holed = A.copy()
    holed[::4, 1] = np.nan
    found = t_interval(holed.T, axis=1)
    np.testing.assert_allclose(found.value[1], np.nanmean(holed[:, 1]))
    np.testing.assert_allclose(found.low[1], t_interval(holed[~np.isnan(holed[:, 1]), 1]).low)
    np.testing.assert_array_equal(found.number, [20, 15, 20])


def test_welch_is_scipys():
    found = welch(A, B, 0.95)
    expected = stats.ttest_ind(A, B, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.value, A.mean(0) - B.mean(0))
    np.testing.assert_allclose([found.low, found.high], [low, high])
    np.testing.assert_allclose(found.p, expected.pvalue)
    np.testing.assert_allclose(found.degrees, expected.df)


def test_a_paired_difference_leaves_out_pairs_with_a_hole():
    a, b = A[:, 0].copy(), A[:, 1].copy()
    a[3], b[5] = np.nan, np.nan
    kept = np.delete(np.arange(20), [3, 5])
    expected = stats.ttest_rel(a[kept], b[kept])
    found = paired(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.low == pytest.approx(expected.confidence_interval().low)
    assert found.number == 18


@pytest.mark.parametrize("values", [[3.0], [3.0, np.nan]])
def test_one_value_has_a_mean_and_no_interval(values):
    found = t_interval(values)
    assert found.value == 3
    assert np.isnan([found.low, found.high, found.p]).all()
    both = welch(values, [1.0, 2.0])
    assert both.value == 1.5
    assert np.isnan([both.low, both.high, both.p]).all()


def test_no_values_are_nan_and_warn_of_nothing():
    found = t_interval(np.full((4, 2), np.nan))
    assert np.isnan(found[:4]).all()
    assert np.isnan(t_interval([])[0])


def test_values_without_spread():
    same = t_interval([0.1] * 5)  # whose mean is not 0.1 in floating point
    assert same.low == same.high == pytest.approx(0.1)
    assert same.p == 0
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    nothing = welch([2.0, 2.0], [2.0, 2.0, 2.0])
    assert (nothing.low, nothing.high, nothing.p) == (0, 0, 1)


def test_intervals_cover_as_often_as_they_say():
    draws = np.random.default_rng(1).standard_normal((12, 4000))
    for found in (t_interval(draws), welch(draws[:4], 3 * draws[4:])):
        covered = (found.low <= 0) & (found.high >= 0)
        assert 0.94 < covered.mean() < 0.97  # Welch's is a little wide


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    np.testing.assert_array_equal(holm([0.02, np.nan]), [0.02, np.nan])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_raises_no_p_keeps_their_order_and_not_that_of_the_list(p, random):
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    order = random.sample(range(len(p)), len(p))
    np.testing.assert_array_equal(holm(np.array(p)[order]), adjusted[order])


def test_quantiles():
    assert quantile(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert quantile(0.95, 9) == pytest.approx(2.262157, abs=1e-6)
    assert np.isnan(quantile(0.95, [0, np.nan])).all()
    for level in (0, 1, 95):
        with pytest.raises(ResultError, match="is no probability"):
            quantile(level)
