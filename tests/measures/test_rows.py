from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.measures import rows
from vitprobe.measures.chunks import grid_positions, pairwise_distance
from vitprobe.measures.rows import Products, distances, row_statistics


def products(seed=0, images=3, heads=2, depth=4, prefix=1, grid=(3, 4), sharpness=2.0, mask=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + grid[0] * grid[1]
    query, key = sharpness * torch.randn(
        2, images, heads, tokens, depth, generator=generator, dtype=torch.float64
    )
    return Products(query, key, 0.7, mask)


def expected(logits, prefix, xy):
    """From the whole map, by the definitions."""
    p = torch.softmax(logits, -1).nan_to_num()
    patches = p[..., prefix:]
    patches = patches / patches.sum(-1, keepdim=True)
    entropy = torch.special.entr(patches).sum(-1)
    distance = (patches[:, :, prefix:] * pairwise_distance(xy, xy)).sum(-1)
    return entropy, distance, p[..., :prefix].sum(-1)


def check(logits, whole, prefix, grid):
    xy = grid_positions(grid, 16)
    found = row_statistics(logits, query_prefix=prefix, key_prefix=prefix, query_xy=xy, key_xy=xy)
    entropy, distance, sink = expected(whole, prefix, xy)
    torch.testing.assert_close(found.entropy, entropy, equal_nan=True)
    torch.testing.assert_close(found.distance[:, :, prefix:], distance, equal_nan=True)
    torch.testing.assert_close(found.sink, sink)


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0, 1, 5]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([1, 7, 40, 10**6]),
    st.sampled_from([None, "read", "added"]),
    st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_whole_map_whatever_the_tiles(
    images, heads, prefix, grid, tile, masked, threads
):
    tokens = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(images)
    mask = None
    if masked == "read":
        mask = torch.rand(tokens, tokens, generator=generator) > 0.4
    elif masked == "added":
        mask = torch.randn(1, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    one = products(0, images, heads, prefix=prefix, grid=grid, mask=mask)
    with pytest.MonkeyPatch.context() as patch, in_threads(threads):
        patch.setattr(rows, "TILE", tile)
        check(one, one.logits(), prefix, grid)
        check(one.logits(), one.logits(), prefix, grid)


@contextmanager
def in_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_change_no_bit_and_leave_torch_as_it_was(monkeypatch, inference):
    monkeypatch.setattr(rows, "TILE", 200)
    xy = grid_positions((3, 4), 16)
    found = []
    for threads in (1, 3):
        with in_threads(threads), torch.inference_mode(inference):
            given = products(images=7)
            found.append(
                row_statistics(given, query_prefix=1, key_prefix=1, query_xy=xy, key_xy=xy)
            )
            assert torch.get_num_threads() == threads
    for alone, shared in zip(*found, strict=True):
        assert torch.equal(alone.nan_to_num(-1), shared.nan_to_num(-1))


def test_an_error_in_a_thread_is_passed_on_and_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.setattr(rows, "TILE", 1)
    one = products()
    wrong = Products(one.query, one.key[..., :-1], one.scale)
    with in_threads(3):
        with pytest.raises(RuntimeError):
            row_statistics(wrong, query_prefix=1, key_prefix=1, query_xy=None, key_xy=None)
        assert torch.get_num_threads() == 3


def test_a_sink_that_takes_nearly_all_leaves_the_rest_as_it_is():
    one = products(prefix=1)
    logits = one.logits()
    logits[..., 0] += 200.0
    xy = grid_positions((3, 4), 16)
    for dtype in (torch.float32, torch.float64):
        found = row_statistics(
            logits.to(dtype), query_prefix=1, key_prefix=1, query_xy=xy, key_xy=xy
        )
        plain = row_statistics(
            one.logits().to(dtype), query_prefix=1, key_prefix=1, query_xy=xy, key_xy=xy
        )
        torch.testing.assert_close(found.entropy, plain.entropy)
        torch.testing.assert_close(found.distance, plain.distance, equal_nan=True)
        torch.testing.assert_close(found.sink, torch.ones_like(found.sink))


def test_one_key_has_no_entropy_and_all_alike_the_most():
    xy = grid_positions((1, 4), 16)
    logits = torch.zeros(1, 1, 4, 4)
    logits[0, 0, 1, 3] = 500.0
    found = row_statistics(logits, query_prefix=0, key_prefix=0, query_xy=xy, key_xy=xy)
    assert found.entropy[0, 0, 1] == 0
    assert found.distance[0, 0, 1] == 32
    assert found.entropy[0, 0, 0] == pytest.approx(math.log(4))
    assert found.distance[0, 0, 0] == pytest.approx(24)


def test_rows_without_a_key_are_undefined_and_damaged_ones_say_so():
    logits = torch.zeros(1, 1, 4, 5)
    logits[0, 0, 0] = -torch.inf  # no key at all
    logits[0, 0, 1, 1:] = -torch.inf  # a prefix key alone
    logits[0, 0, 2, 2] = torch.nan
    logits[0, 0, 3, 0] = torch.inf
    found = row_statistics(logits, query_prefix=0, key_prefix=1, query_xy=None, key_xy=None)
    assert found.distance is None
    assert found.entropy[0, 0].isnan().tolist() == [True, True, True, False]
    assert found.sink[0, 0, :2].tolist() == [0, 1]
    assert found.sink[0, 0, 2:].isnan().all()


def test_half_precision_products_are_summed_in_single():
    one = products(sharpness=1.0)
    half = Products(one.query.bfloat16(), one.key.bfloat16(), one.scale)
    assert half.dtype == torch.float32
    single = Products(half.query.double(), half.key.double(), one.scale)
    xy = grid_positions((3, 4), 16)
    found, exact = (
        row_statistics(each, query_prefix=1, key_prefix=1, query_xy=xy, key_xy=xy)
        for each in (half, single)
    )
    torch.testing.assert_close(found.entropy.double(), exact.entropy, atol=1e-6, rtol=1e-6)


def test_distances_of_the_same_places_are_computed_once():
    xy = grid_positions((3, 3), 16)
    first, again = (distances(xy.clone(), xy, torch.float32, xy.device) for _ in range(2))
    assert first is again
    torch.testing.assert_close(first.double(), pairwise_distance(xy, xy))
    moved = distances(xy + 1, xy, torch.float32, xy.device)
    assert not torch.equal(moved, first)
