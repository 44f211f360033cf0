from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.measures.points import Points
from vitprobe.measures.similarity import procrustes


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 12), p=st.integers(1, 60), offset=st.sampled_from([0, 1, 1000]))
def test_points_keep_all_inner_products(n, p, offset):
    x = np.random.default_rng(p).normal(size=(n, p)) + offset
    points = Points.of(torch.from_numpy(x))
    assert points.centered.shape[1] == min(p, n + 2)
    everything = np.concatenate([x - x.mean(0), x.mean(0)[None], np.ones((1, p))])
    reduced = torch.cat([points.centered, points.mean[None], points.ones[None]]).numpy()
    expected = everything @ everything.T
    np.testing.assert_allclose(reduced @ reduced.T, expected, rtol=1e-9, atol=1e-9 * (1 + offset))
    kept = torch.arange(0, n, 2)
    some = points.take(kept)
    np.testing.assert_allclose(
        some.rows @ some.rows.T, x[::2] @ x[::2].T, rtol=1e-9, atol=1e-9 * (1 + offset)
    )
    np.testing.assert_allclose(some.centered.sum(0), 0, atol=1e-9 * (1 + offset))


def test_more_features_than_a_column_block():
    x, y = (np.random.default_rng(s).normal(size=(20, 9000)) for s in (0, 1))
    a, b = (z - z.mean(0) for z in (x, y))
    (u, s, _), (v, t, _) = (np.linalg.svd(z, full_matrices=False) for z in (a, b))
    np.testing.assert_allclose(Points.of(torch.from_numpy(x)).directions[1], s[:19], rtol=1e-9)
    nuclear = np.linalg.norm((u * s).T @ (v * t), "nuc")
    assert procrustes(x, y) == pytest.approx(
        nuclear / np.linalg.norm(s) / np.linalg.norm(t), abs=1e-12
    )


def test_a_small_direction_survives_and_rounding_does_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    x[:, 5] *= 1e-10
    assert Points.of(torch.from_numpy(x)).directions[0].shape[1] == 6
    normed = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    for offset in (0, 100):
        low = torch.from_numpy((normed + offset).astype(np.float32))
        assert Points.of(low).directions[0].shape[1] == 5, "a layer norm's missing direction"
        assert Points.of(low.double()).directions[0].shape[1] == 6
