from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures import (
    MEASURES,
    AttentionChunk,
    attention_distance,
    attention_entropy,
    sink_mass,
)
from vitprobe.measures.attention import ATTENTION_MEASURES, grid_positions, uniform_distance

STREAMING = {cls.info.name: cls for cls in ATTENTION_MEASURES}


def maps(images=3, heads=2, prefix=1, grid=(3, 4), seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + grid[0] * grid[1]
    shape = (images, heads, tokens, tokens)
    logits = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


def chunks(attention, prefix, grid, patch=16, *, images=(None,), rows=(None,)):
    """The attention cut at the given images and rows, as capture would hand it on."""
    centres = grid_positions(grid, patch)
    edges = [0, *[i for i in images if i], attention.shape[0]]
    cuts = [0, *[r for r in rows if r], attention.shape[2]]
    for first, last in pairwise(edges):
        for top, bottom in pairwise(cuts):
            yield AttentionChunk(
                log_p=attention[first:last, :, top:bottom].log(),
                query_prefix=min(max(0, prefix - top), bottom - top),
                key_prefix=prefix,
                query_xy=centres[max(0, top - prefix) : max(0, bottom - prefix)],
                key_xy=centres,
                layer=0,
                first_image=first,
                first_query=top,
            )


def stream(name, parts):
    measure = STREAMING[name]()
    for part in parts:
        measure.update(part)
    return measure.compute()[0]


def test_uniform_attention_has_the_mean_pairwise_distance_and_log_entropy():
    attention = np.full((1, 1, 49, 49), 1 / 49)
    assert attention_distance(attention, grid=(7, 7))[0, 0] == pytest.approx(57.75144706840818)
    assert attention_entropy(attention)[0, 0] == pytest.approx(math.log(49))
    assert uniform_distance(grid_positions((14, 14), 16)) == pytest.approx(116.49222709176634)


def test_attention_to_oneself_is_local_and_certain():
    attention = np.eye(12)[None, None]
    assert attention_distance(attention, grid=(3, 4)) == 0
    assert attention_entropy(attention) == 0


def test_attention_to_the_right_neighbour_is_one_patch_away():
    attention = np.zeros((4, 4))
    attention[np.arange(4), [1, 2, 3, 2]] = 1
    assert attention_distance(attention[None, None], grid=(1, 4), patch_size=14) == 14
    assert attention_distance(attention[None, None], grid=(4, 1), patch_size=(10, 99)) == 10


def test_prefix_tokens_are_dropped_and_rows_renormalised():
    patches = maps(prefix=0)
    share = 0.9
    with_class = torch.zeros(3, 2, 13, 13, dtype=torch.float64)
    with_class[..., 1:, 1:] = (1 - share) * patches
    with_class[..., 1:, 0] = share
    with_class[..., 0, 0] = 1
    expected = attention_distance(patches, grid=(3, 4))
    found = attention_distance(with_class, grid=(3, 4), prefix_tokens=1)
    torch.testing.assert_close(found, expected)
    raw = attention_distance(with_class, grid=(3, 4), prefix_tokens=1, renormalize=False)
    torch.testing.assert_close(raw, (1 - share) * expected)
    entropy = attention_entropy(with_class, prefix_tokens=1)
    torch.testing.assert_close(entropy, attention_entropy(patches))
    assert torch.allclose(sink_mass(with_class, prefix_tokens=1), torch.tensor(share).double())


def test_rows_without_mass_on_patches_are_left_out():
    attention = maps(images=2)
    attention[0, 0, 3] = 0
    attention[0, 0, 3, 0] = 1
    attention[1, 1] = 0
    attention[1, 1, :, 0] = 1
    distance = attention_distance(attention, grid=(3, 4), prefix_tokens=1)
    kept = [i for i in range(13) if i != 3]
    others = attention[:1, :1][:, :, kept][..., kept]
    centres = grid_positions((3, 4), 16)
    wanted = attention[0, 0, [i for i in range(1, 13) if i != 3], 1:]
    wanted = wanted / wanted.sum(-1, keepdim=True)
    rows = torch.cdist(centres, centres)[[i for i in range(12) if i != 2]]
    assert others.shape[-1] == 12
    assert distance[0, 0] == pytest.approx(float((wanted * rows).sum(-1).mean()))
    assert distance[1, 1].isnan()
    assert not distance[1, 0].isnan()
    streamed = stream("attention_distance", chunks(attention, 1, (3, 4)))
    assert streamed.undefined_rows.tolist() == [[1, 0], [0, 12]]
    assert np.isnan(streamed.mean[1, 1])
    assert streamed.mean[0, 0] == pytest.approx(float(distance[0, 0]), rel=1e-6)


@pytest.mark.parametrize("name", STREAMING)
def test_nan_is_not_an_undefined_row(name):
    attention = maps()
    attention[0, 0, 2] = torch.nan
    with pytest.raises(MeasureError, match="attention is NaN in layer 0"):
        stream(name, chunks(attention, 1, (3, 4)))


def test_positions_generalise_the_grid():
    attention = maps()
    centres = grid_positions((3, 4), 16)
    by_grid = attention_distance(attention, grid=(3, 4), prefix_tokens=1)
    by_position = attention_distance(attention, positions=(centres, centres), prefix_tokens=1)
    torch.testing.assert_close(by_grid, by_position)


def test_the_kind_of_array_given_comes_back():
    attention = maps()
    assert isinstance(attention_entropy(attention), torch.Tensor)
    assert isinstance(attention_entropy(attention.numpy()), np.ndarray)
    assert isinstance(sink_mass(attention.numpy(), prefix_tokens=1), np.ndarray)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    prefix=st.integers(0, 2),
    heads=st.integers(1, 3),
    image_cut=st.integers(0, 2),
    row_cut=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_streaming_equals_the_pure_functions_however_chunked(
    rows, columns, prefix, heads, image_cut, row_cut, seed
):
    grid = (rows, columns)
    attention = maps(3, heads, prefix, grid, seed)
    cut = min(row_cut, attention.shape[2] - 1)
    parts = list(chunks(attention, prefix, grid, images=(image_cut,), rows=(cut,)))
    pure = {
        "attention_distance": attention_distance(attention, grid=grid, prefix_tokens=prefix),
        "attention_distance_raw": attention_distance(
            attention, grid=grid, prefix_tokens=prefix, renormalize=False
        ),
        "attention_entropy": attention_entropy(attention, prefix_tokens=prefix),
        "attention_entropy_all": attention_entropy(attention),
        "sink_mass": sink_mass(attention, prefix_tokens=prefix),
    }
    assert pure.keys() == STREAMING.keys()
    for name, expected in pure.items():
        np.testing.assert_allclose(stream(name, parts).mean, expected, rtol=1e-5, atol=1e-6)
    assert (pure["attention_entropy"] <= math.log(rows * columns) + 1e-9).all()
    farthest = math.hypot((rows - 1) * 16, (columns - 1) * 16)
    assert (pure["attention_distance"] <= farthest + 1e-9).all()


@pytest.mark.parametrize("name", STREAMING)
def test_merging_is_a_union_of_images(name):
    attention = maps(5)
    parts = list(chunks(attention, 1, (3, 4), images=(2,)))
    whole = stream(name, parts)
    first, second = STREAMING[name](), STREAMING[name]()
    first.update(parts[0])
    second.update(parts[1])
    second.merge(first)
    assert np.array_equal(second.compute()[0].mean, whole.mean)
    with pytest.raises(MeasureError, match="image 0 is in both parts"):
        second.merge(first)
    overlapping = STREAMING[name]()
    overlapping.update(next(chunks(attention[1:2], 1, (3, 4))))
    with pytest.raises(MeasureError, match="image 0 is in both parts"):
        overlapping.merge(second)


@pytest.mark.parametrize("name", STREAMING)
def test_relative_units_are_one_under_uniform_attention(name):
    attention = torch.full((1, 1, 14, 14), 1 / 14, dtype=torch.float64)
    centres = grid_positions((3, 4), 16)
    level = STREAMING[name].uniform(centres, centres, 2)
    if name == "sink_mass":
        assert level is None
    else:
        assert stream(name, chunks(attention, 2, (3, 4))).mean == pytest.approx(level, rel=1e-6)


def test_state_is_small_and_grows_with_images_only():
    measure = STREAMING["attention_entropy"]()
    attention = maps(4, heads=8)
    for first in range(0, 4000, 4):
        for part in chunks(attention, 1, (3, 4)):
            measure.update(dataclasses.replace(part, first_image=first))
    held = sum(array.nbytes for array in measure._sums.values())
    assert held <= 2 * 12 * 4000 * 8
    assert measure.compute()[0].mean.shape == (4000, 8)


def test_every_measure_says_what_it_is():
    for name, info in MEASURES.items():
        assert info.name == name
        assert all((info.title, info.range, info.direction, info.what, info.formula, info.source))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (np.ones((2, 3, 3)), {"grid": (1, 3)}, "give \\(batch, heads, queries, keys\\)"),
        (maps(), {"grid": (3, 3), "prefix_tokens": 1}, "12 patch queries .* for 9 and 9"),
        (maps(), {}, "give either grid"),
        (-maps(), {"grid": (3, 4), "prefix_tokens": 1}, "post-softmax"),
        (maps() * 3, {"grid": (3, 4), "prefix_tokens": 1}, "sum to more than 1"),
        (maps() * np.nan, {"grid": (3, 4), "prefix_tokens": 1}, "non-finite"),
        (maps(), {"grid": (3, 4), "prefix_tokens": 13}, "leave no patches"),
    ],
)
def test_refusals(attention, options, message):
    with pytest.raises(MeasureError, match=message):
        attention_distance(attention, **options)


def test_golden_values(golden):
    attention = golden["arrays"]["attention"].astype(np.float64)
    expected = {key: np.array(value) for key, value in golden["attention"].items()}
    options = {"grid": (7, 7), "prefix_tokens": 1}
    found = {
        "distance_px_renorm": attention_distance(attention, **options),
        "distance_px_no_renorm": attention_distance(attention, **options, renormalize=False),
        "entropy_patches_renorm_nats": attention_entropy(attention, prefix_tokens=1),
        "entropy_all_tokens_nats": attention_entropy(attention),
        "mass_patch_queries_to_prefix": sink_mass(attention, prefix_tokens=1),
    }
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-9)


@pytest.mark.parametrize("case", ["cls_7x7", "nocls_6x8", "local_7x7", "analytic_7x7"])
def test_reference_maps(shared, case):
    folder = shared / "reference"
    expected = json.loads((folder / "attention_expected.json").read_text())[case]
    with np.load(folder / "attention_cases.npz") as arrays:
        attention = arrays[case].astype(np.float64)
    grid, prefix = tuple(expected["layout"]["grid"]), expected["layout"]["prefix_tokens"]
    options = {"grid": grid, "prefix_tokens": prefix}
    found = {
        "distance_px_renorm": attention_distance(attention, **options),
        "distance_px_no_renorm": attention_distance(attention, **options, renormalize=False),
        "entropy_patches_renorm_nats": attention_entropy(attention, prefix_tokens=prefix),
        "entropy_all_tokens_nats": attention_entropy(attention),
    }
    if prefix:
        found["mass_patch_queries_to_prefix"] = sink_mass(attention, prefix_tokens=prefix)
    for key, value in found.items():
        np.testing.assert_allclose(value, np.array(expected[key]), rtol=1e-9, atol=1e-12)


def test_reference_positions(shared):
    folder = shared / "reference"
    expected = json.loads((folder / "attention_expected.json").read_text())
    with np.load(folder / "attention_cases.npz") as arrays:
        attention = arrays["pvt_sr2_8x8_to_4x4"].astype(np.float64)
    case = expected["pvt_sr2_8x8_to_4x4"]
    query = grid_positions((8, 8), case["layout"]["px_per_query_token"])
    key = grid_positions((4, 4), 2 * case["layout"]["px_per_query_token"])
    distance = attention_distance(attention, positions=(query, key))
    np.testing.assert_allclose(distance, np.array(case["distance_px_cell_centres"]), rtol=1e-9)
