"""Centred Grams: what they are, and what single precision leaves of them."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.measures.gram import centered_gram


def direct(x):
    """Of columns centred in double precision."""
    flat = x.double().flatten(1)
    flat = flat - flat.mean(0)
    return flat @ flat.T


def error(x):
    expected = direct(x)
    return float((centered_gram(x).double() - expected).abs().max() / expected.abs().max())


@settings(deadline=None)
@given(
    n=st.integers(2, 40),
    rest=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_is_the_gram_of_centred_columns(n, rest, seed):
    x = torch.randn(n, *rest, generator=torch.Generator().manual_seed(seed)).double() + 3
    found = centered_gram(x)
    torch.testing.assert_close(found, direct(x), rtol=1e-9, atol=1e-9)
    assert found.sum(0).abs().max() < 1e-9
    assert torch.equal(found, found.T)


def test_does_not_depend_on_the_tiles(monkeypatch):
    x = torch.randn(37, 11, 5, dtype=torch.float64)
    whole = centered_gram(x)
    for tile in (1, 37 * 5, 37 * 5 * 3):
        monkeypatch.setattr(sys.modules["vitprobe.measures.gram"], "_TILE", tile)
        torch.testing.assert_close(centered_gram(x), whole, rtol=1e-12, atol=1e-12)


def test_a_large_mean_costs_no_digits():
    x = 100 + torch.randn(128, 50, 20)
    assert error(x) < 3e-6
    flat = x.flatten(1)
    naive = flat @ flat.T
    naive = naive - naive.mean(0)
    naive = naive - naive.mean(1, keepdim=True)
    assert (naive.double() - direct(x)).abs().max() > 30 * error(x) * direct(x).abs().max()


def test_an_image_far_from_all_others_hardly_blurs_them_wherever_it_is():
    x = torch.randn(128, 30, 20)
    x[0] += 300 * torch.randn(30, 20)
    expected = direct(x)[1:, 1:]
    # With this image alone taken off in place of a mean, the error would be some 60 times as large.
    blur = (centered_gram(x)[1:, 1:] - expected).abs().max() / expected.abs().max()
    assert blur < 3e-4


def test_what_is_alike_in_all_images_has_no_gram():
    one = 100 * torch.randn(1, 7, 5)
    assert not centered_gram(one.expand(20, 7, 5)).any()
    # Rounding, as of images that went through a model in different batches, is no spread.
    assert not centered_gram(one * (1 + 1e-7 * torch.randn(20, 1, 1))).any()
    # The least spread that is one.
    assert centered_gram(one * (1 + 4e-6 * torch.randn(20, 1, 1))).any()
    assert not centered_gram(torch.zeros(20, 3)).any()
    assert not centered_gram(torch.randn(1, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_narrow_features_are_multiplied_in_single_precision(dtype):
    x = torch.randn(32, 12, 8)
    x = x > 0 if dtype == torch.bool else (100 + 10 * x).to(dtype)
    assert centered_gram(x).dtype == torch.float32
    assert error(x) < 3e-6


def test_what_is_not_finite_shows():
    x = torch.randn(10, 4)
    for value in (torch.nan, torch.inf):
        x[3, 2] = value
        assert not centered_gram(x).isfinite().all()
