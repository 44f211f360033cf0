from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from attention_for_tests import STREAMING, chunks, golden_attention, maps
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures.attention import attention_distance, uniform_distance
from vitprobe.measures.chunks import grid_positions
from vitprobe.measures.rollout import MaxRolloutDistance, RolloutDistance, attention_rollout

FUSIONS = {"mean": RolloutDistance, "max": MaxRolloutDistance}


def blocks(count=3, images=4, prefix=1, grid=(3, 4), heads=2):
    return [maps(images, heads, prefix, grid, seed) for seed in range(count)]


def passes(attentions, prefix, grid, batches, rows=()):
    """The chunks of one forward pass after the other, block by block."""
    for first, last in batches:
        for layer, attention in enumerate(attentions):
            part = attention[first:last]
            for chunk in chunks(part, prefix, grid, images=(1,), rows=rows, layer=layer):
                yield dataclasses.replace(chunk, first_image=first + chunk.first_image)


def distances(attentions, fusion, prefix, grid):
    rollout = attention_rollout(attentions, fusion=fusion)
    return [attention_distance(r[:, None], grid=grid, prefix_tokens=prefix) for r in rollout]


def test_attention_to_oneself_stays_and_a_cycle_advances_by_halves():
    still = attention_rollout([np.eye(4)[None, None]] * 3)
    assert np.array_equal(still, np.broadcast_to(np.eye(4), (3, 1, 4, 4)))
    step = np.roll(np.eye(4), 1, axis=1)[None, None]
    two = attention_rollout([step, step])[1, 0, 0]
    assert two.tolist() == [0.25, 0.5, 0.25, 0]


def test_blocks_are_multiplied_from_the_left():
    first, second = blocks(2)
    one, both = attention_rollout([first]), attention_rollout([first, second])
    weights = attention_rollout([second])[0]
    torch.testing.assert_close(both[1], weights @ one[0])
    assert not torch.allclose(both[1], one[0] @ weights)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
def test_rows_sum_to_one(fusion, discard):
    rollout = attention_rollout(blocks(4), fusion=fusion, discard=discard)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(4, 4, 13).double())


def test_fusions_agree_on_one_head():
    single = blocks(3, heads=1)
    mean, maximum = (attention_rollout(single, fusion=fusion) for fusion in FUSIONS)
    torch.testing.assert_close(mean, maximum)


def test_the_smallest_weights_are_discarded_but_not_the_first_tokens_own():
    attention = torch.tensor([[0.1, 0.9], [0.4, 0.6]]).double()[None, None]
    rollout = attention_rollout([attention], discard=0.5)[0, 0]
    kept = torch.tensor([[1.1, 0.9], [0, 1.6]]).double()
    torch.testing.assert_close(rollout, kept / kept.sum(-1, keepdim=True))


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    prefix=st.integers(0, 2),
    image_cut=st.integers(1, 4),
    row_cuts=st.sets(st.integers(1, 6), max_size=2),
    fusion=st.sampled_from(list(FUSIONS)),
)
def test_streaming_equals_the_pure_function_however_chunked(
    depth, rows, columns, prefix, image_cut, row_cuts, fusion
):
    grid = (rows, columns)
    attentions = blocks(depth, 5, prefix, grid)
    measure = FUSIONS[fusion]()
    batches = [(0, image_cut), (image_cut, 5)]
    for chunk in passes(attentions, prefix, grid, batches, sorted(row_cuts)):
        measure.update(chunk)
    found = measure.compute()
    assert list(found) == list(range(depth))
    expected = distances(attentions, fusion, prefix, grid)
    for (mean, undefined), distance in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(mean, distance, rtol=1e-5, atol=1e-6)
        assert mean.shape == (5, 1)
        assert not undefined.any()


def test_uniform_attention_comes_to_the_uniform_distance_by_halves():
    attentions = [torch.full((1, 2, 12, 12), 1 / 12).double()] * 5
    level = uniform_distance(grid_positions((3, 4), 16))
    found = [float(d) for d in distances(attentions, "mean", 0, (3, 4))]
    assert found == pytest.approx([level * (1 - 0.5**block) for block in range(1, 6)])


def test_parts_of_a_run_merge_exactly():
    attentions = blocks(3, 5)
    whole, first, second = (RolloutDistance() for _ in range(3))
    for chunk in passes(attentions, 1, (3, 4), [(0, 2), (2, 5)]):
        whole.update(chunk)
        (first if chunk.first_image < 2 else second).update(chunk)
    second.merge(first)
    for layer, (mean, _) in whole.compute().items():
        assert np.array_equal(second.compute()[layer].mean, mean)


def test_only_the_images_of_one_forward_pass_are_held():
    measure = RolloutDistance()
    held = []
    attentions = blocks(3, 40)
    for chunk in passes(attentions, 1, (3, 4), [(i, i + 4) for i in range(0, 40, 4)], rows=(5,)):
        measure.update(chunk)
        held.append(len(measure._products))
    assert max(held) == 4


def test_a_block_that_is_missing_or_out_of_order_is_refused():
    attentions = blocks(3)
    parts = list(passes(attentions, 1, (3, 4), [(0, 4)]))
    measure = RolloutDistance()
    with pytest.raises(MeasureError, match="block 1 of image 0 does not follow block 0"):
        measure.update(parts[2])
    for chunk in parts[:2]:
        measure.update(chunk)
    with pytest.raises(MeasureError, match="rollout_distance: block 2 of image 0 does not follow"):
        measure.update(parts[4])
    shorter = next(chunks(maps(1, grid=(2, 3)), 1, (2, 3), layer=1))
    with pytest.raises(MeasureError, match="block 0 of as many tokens"):
        measure.update(shorter)


def test_images_that_never_reach_the_last_block_are_refused():
    parts = list(passes(blocks(3), 1, (3, 4), [(0, 4)]))
    measure = RolloutDistance()
    for chunk in parts[:-1]:
        measure.update(chunk)
    with pytest.raises(MeasureError, match="block 2 has not seen the images that block 0 has"):
        measure.compute()


def test_pooled_keys_are_refused():
    chunk = next(chunks(maps(prefix=0), 0, (3, 4)))
    pooled = dataclasses.replace(chunk, logits=chunk.log_p[..., :4], key_xy=chunk.key_xy[:4])
    for name in ("rollout_distance", "rollout_distance_max"):
        with pytest.raises(MeasureError, match=f"{name}: layer 0 has 12 queries and 4 keys"):
            STREAMING[name]().update(pooled)


@pytest.mark.parametrize(
    ("attentions", "options", "message"),
    [
        ([], {}, "no attention given"),
        (blocks(), {"fusion": "min"}, "unknown fusion 'min': use 'mean' or 'max'"),
        (blocks(), {"discard": 1.0}, "a share of 1.0 cannot be discarded"),
        (blocks(), {"discard": -0.1}, "a share of -0.1 cannot be discarded"),
        ([maps()[..., :5]], {}, "block 0 has 3 images, 13 queries and 5 keys"),
        ([maps(), maps(prefix=2)], {}, "block 1 has 3 images, 14 queries and 14 keys"),
        ([maps(), maps(2)], {}, "block 1 has 2 images"),
        ([maps() * 2], {}, "sum to more than 1"),
    ],
)
def test_refusals(attentions, options, message):
    with pytest.raises(MeasureError, match=message):
        attention_rollout(attentions, **options)


def test_golden_values():
    golden = golden_attention()
    attentions, expected = golden["arrays"]["rollout_layers"], golden["rollout_first_image"]
    # Those of discarded weights come from fused maps rounded to single precision.
    rounded = {
        "mean": attentions.mean(2, keepdims=True).astype(np.float32).astype(float),
        "max": attentions.astype(np.float32).astype(float),
    }
    for fusion in FUSIONS:
        rollout = attention_rollout(list(attentions), fusion=fusion)
        np.testing.assert_allclose(rollout[-1, 0], expected[fusion], rtol=1e-9)
        for discard in (0.5, 0.9):
            rollout = attention_rollout(list(rounded[fusion]), fusion=fusion, discard=discard)
            picture = rollout[-1, 0, 0, 1:].reshape(4, 4)
            found = picture / picture.max()
            np.testing.assert_allclose(found, expected[f"{fusion}_discard{discard}"], rtol=1e-9)
