from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from attention_for_tests import STREAMING, chunks, golden_attention, maps, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import squares, tiny

from vitprobe.capture import Recorder
from vitprobe.errors import MeasureError
from vitprobe.measures import chunks as chunks_module
from vitprobe.measures import rows
from vitprobe.measures.attention import (
    AttentionMeasure,
    attention_distance,
    attention_distance_quantile,
    attention_entropy,
    class_attention_entropy,
    grid_positions,
    sink_mass,
    uniform_distance,
)
from vitprobe.measures.chunks import add
from vitprobe.measures.heads import attention_nmi, head_divergence
from vitprobe.measures.rollout import attention_rollout


def pure(x, grid, prefix):
    """What every streaming measure means, from whole maps."""
    place = {"grid": grid, "prefix_tokens": prefix}
    others = ~torch.eye(x.shape[1], dtype=torch.bool)

    def over_others(kind):
        if x.shape[1] == 1:
            return torch.full(x.shape[:2], torch.nan)
        pairs = head_divergence(x, kind=kind, prefix_tokens=prefix)
        return pairs[:, others].unflatten(1, (x.shape[1], -1)).mean(-1)

    def rollout(fusion):
        return attention_distance(attention_rollout([x], fusion=fusion)[0][:, None], **place)

    return {
        "attention_distance": attention_distance(x, **place),
        "attention_distance_raw": attention_distance(x, **place, renormalize=False),
        "attention_distance_q10": attention_distance_quantile(x, 0.1, **place),
        "attention_distance_q50": attention_distance_quantile(x, 0.5, **place),
        "attention_distance_q90": attention_distance_quantile(x, 0.9, **place),
        "attention_entropy": attention_entropy(x, prefix_tokens=prefix),
        "attention_entropy_raw": attention_entropy(x, prefix_tokens=prefix, renormalize=False),
        "attention_entropy_all": attention_entropy(x),
        "class_attention_entropy": class_attention_entropy(x, prefix_tokens=prefix)
        if prefix
        else torch.full(x.shape[:2], torch.nan),
        "sink_mass": sink_mass(x, prefix_tokens=prefix),
        "attention_nmi": attention_nmi(x, prefix_tokens=prefix),
        "head_divergence": over_others("js"),
        "head_divergence_kl": over_others("kl"),
        "rollout_distance": rollout("mean"),
        "rollout_distance_max": rollout("max"),
    }


def test_uniform_attention_has_the_mean_pairwise_distance_and_log_entropy():
    uniform = np.full((1, 1, 49, 49), 1 / 49)
    assert attention_distance(uniform, grid=(7, 7))[0, 0] == pytest.approx(57.75144706840818)
    assert attention_entropy(uniform)[0, 0] == pytest.approx(math.log(49))
    assert attention_nmi(uniform)[0, 0] == pytest.approx(0, abs=1e-12)
    assert uniform_distance(grid_positions((14, 14), 16)) == pytest.approx(116.49222709176634)


def test_attention_to_oneself_is_local_certain_and_depends_on_the_query_alone():
    oneself = np.eye(12)[None, None]
    assert attention_distance(oneself, grid=(3, 4)) == 0
    assert attention_distance_quantile(oneself, 0.9, grid=(3, 4)) == 0
    assert attention_entropy(oneself) == 0
    assert attention_nmi(oneself)[0, 0] == pytest.approx(1)


def test_attention_to_the_right_neighbour_is_one_patch_away():
    neighbour = np.zeros((4, 4))
    neighbour[np.arange(4), [1, 2, 3, 2]] = 1
    assert attention_distance(neighbour[None, None], grid=(1, 4), patch_size=14) == 14
    assert attention_distance(neighbour[None, None], grid=(4, 1), patch_size=(10, 99)) == 10


@pytest.mark.parametrize(
    ("quantile", "expected"), [(0.05, 0), (0.1, 0), (0.11, 16), (0.7, 16), (0.71, 48), (0.99, 48)]
)
def test_a_quantile_is_the_smallest_distance_that_holds_the_share(quantile, expected):
    row = np.array([0.1, 0.6, 0.0, 0.3])
    one_query = np.stack([row, row[[1, 0, 2, 3]], row[[2, 3, 0, 1]], row[::-1]])[None, None]
    query_xy = np.zeros((4, 2))
    key_xy = np.stack([np.arange(4) * 16.0, np.zeros(4)], axis=-1)
    found = attention_distance_quantile(
        one_query[:, :, :1], quantile, positions=(query_xy[:1], key_xy)
    )
    assert found == expected


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    quantile=st.floats(0.02, 0.98),
    seed=st.integers(0, 99),
)
def test_quantiles_by_trying_every_distance(rows, columns, quantile, seed):
    x = maps(1, 1, 0, (rows, columns), seed)
    centres = grid_positions((rows, columns), 16)
    distance = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    expected = [
        min(d for d in away if row[away <= d + 1e-9].sum() >= quantile)
        for row, away in zip(x[0, 0], distance, strict=True)
    ]
    found = attention_distance_quantile(x, quantile, grid=(rows, columns))
    assert float(found) == pytest.approx(float(torch.stack(expected).mean()))


def test_shares_that_miss_a_quantile_by_rounding_reach_it():
    # 0.1 + 0.1 + 0.1 is 0.30000000000000004, and nine tenths of ten tenths fall short of 0.9.
    tenths = np.full((1, 1, 1, 10), 0.1)
    positions = (np.zeros((1, 2)), np.stack([np.arange(10.0), np.zeros(10)], axis=-1))
    for tenth in range(1, 10):
        found = attention_distance_quantile(tenths, tenth / 10, positions=positions)
        assert found == tenth - 1


def test_prefix_tokens_are_dropped_and_rows_renormalised():
    patches = maps(prefix=0)
    share = 0.9
    with_class = torch.zeros(3, 2, 13, 13, dtype=torch.float64)
    with_class[..., 1:, 1:] = (1 - share) * patches
    with_class[..., 1:, 0] = share
    with_class[..., 0, 0] = 1
    grid = {"grid": (3, 4)}
    expected = attention_distance(patches, **grid)
    found = attention_distance(with_class, **grid, prefix_tokens=1)
    torch.testing.assert_close(found, expected)
    raw = attention_distance(with_class, **grid, prefix_tokens=1, renormalize=False)
    torch.testing.assert_close(raw, (1 - share) * expected)
    torch.testing.assert_close(
        attention_distance_quantile(with_class, 0.5, **grid, prefix_tokens=1),
        attention_distance_quantile(patches, 0.5, **grid),
    )
    for function in (attention_entropy, attention_nmi, head_divergence):
        torch.testing.assert_close(function(with_class, prefix_tokens=1), function(patches))
    assert torch.allclose(sink_mass(with_class, prefix_tokens=1), torch.tensor(share).double())
    assert class_attention_entropy(with_class, prefix_tokens=1).isnan().all()


def test_nmi_of_heads_that_all_look_at_one_key_is_undefined():
    collapsed = torch.zeros(1, 2, 6, 6)
    collapsed[..., 2] = 1
    collapsed[:, 1] = torch.eye(6)
    assert attention_nmi(collapsed)[0].isnan().tolist() == [True, False]
    found = stream("attention_nmi", chunks(collapsed, 0, (2, 3), rows=(4,)))
    assert np.isnan(found.mean[0]).tolist() == [True, False]
    assert found.undefined_rows.tolist() == [[6, 0]]


def test_nmi_is_the_mutual_information_of_the_joint_table():
    x = maps(1, 1, 0, (2, 3))[0, 0] / 6
    query, key = x.sum(1, keepdim=True), x.sum(0, keepdim=True)
    information = (x * (x / (query * key)).log()).sum()
    scale = torch.sqrt((query * query.log()).sum() * (key * key.log()).sum())
    found = attention_nmi(maps(1, 1, 0, (2, 3)))
    assert float(found) == pytest.approx(float(information / scale), rel=1e-12)


def test_heads_that_agree_and_heads_that_share_nothing():
    heads = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    heads[:, 0, :, 0] = heads[:, 1, :, 0] = 1
    heads[:, 2, :, 2:] = 0.5
    js, kl = head_divergence(heads), head_divergence(heads, kind="kl")
    ln2 = math.log(2)
    torch.testing.assert_close(
        js[0], torch.tensor([[0, 0, ln2], [0, 0, ln2], [ln2, ln2, 0]]).double()
    )
    assert kl[0].tolist() == [[0, 0, math.inf], [0, 0, math.inf], [math.inf, math.inf, 0]]


def test_kl_is_from_the_row_to_the_column():
    heads = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)[None, :, None]
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = head_divergence(heads, kind="kl")[0]
    assert float(found[0, 1]) == pytest.approx(expected)
    assert float(found[1, 0]) != pytest.approx(expected)


@pytest.mark.parametrize("name", ["head_divergence", "head_divergence_kl"])
def test_a_head_alone_diverges_from_none(name):
    found = stream(name, chunks(maps(heads=1), 1, (3, 4)))
    assert np.isnan(found.mean).all()
    assert (found.undefined_rows == 12).all()


def test_rounding_makes_nothing_negative():
    logits = 0.01 * torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for sharpness in (12, 15, 20):
        one_key = (logits + sharpness * (torch.arange(64) == 7)).softmax(-1)
        assert (attention_nmi(one_key) >= 0).all()
    heads = (0.001 * logits[:, :, :, :7] + torch.arange(7)).softmax(-1)
    for kind in ("js", "kl"):
        assert (head_divergence(heads, kind=kind) >= 0).all()


def test_rows_of_infinite_divergence_are_left_out_and_counted():
    x = maps(1, 2, 0, (2, 3))
    expected = stream("head_divergence_kl", chunks(x[:, :, 1:], 0, (2, 3), rows=()))
    x[0, 1, 0, 3] = 0
    x[0, 1, 0] /= x[0, 1, 0].sum()
    assert head_divergence(x, kind="kl").isinf().tolist() == [[[False, True], [False, False]]]
    found = stream("head_divergence_kl", chunks(x, 0, (2, 3), rows=(2,)))
    assert found.undefined_rows.tolist() == [[1, 0]]
    assert found.mean[0, 0] == pytest.approx(expected.mean[0, 0])
    assert np.isfinite(found.mean).all()


def test_rows_without_mass_on_patches_are_left_out():
    x = maps(images=2)
    x[0, 0, 3] = 0
    x[0, 0, 3, 0] = 1
    x[1, 1] = 0
    x[1, 1, :, 0] = 1
    distance = attention_distance(x, grid=(3, 4), prefix_tokens=1)
    centres = grid_positions((3, 4), 16)
    wanted = x[0, 0, [i for i in range(1, 13) if i != 3], 1:]
    wanted = wanted / wanted.sum(-1, keepdim=True)
    rows = torch.cdist(centres, centres)[[i for i in range(12) if i != 2]]
    assert distance[0, 0] == pytest.approx(float((wanted * rows).sum(-1).mean()))
    assert distance[1, 1].isnan()
    assert not distance[1, 0].isnan()
    for name in ("attention_distance", "attention_distance_q50", "attention_nmi"):
        streamed = stream(name, chunks(x, 1, (3, 4), rows=(5,)))
        assert streamed.undefined_rows.tolist() == [[1, 0], [0, 12]]
        assert np.isnan(streamed.mean[1, 1])
        expected = pure(x, (3, 4), 1)[name]
        assert streamed.mean[0, 0] == pytest.approx(float(expected[0, 0]), rel=1e-6)
    divergence = stream("head_divergence", chunks(x, 1, (3, 4)))
    assert divergence.undefined_rows.tolist() == [[1, 1], [12, 12]]


def test_a_model_without_prefix_tokens_has_images_without_class_attention():
    found = stream("class_attention_entropy", chunks(maps(prefix=0), 0, (3, 4), rows=(5,)))
    assert found.mean.shape == (3, 2)
    assert np.isnan(found.mean).all()
    assert (found.undefined_rows == 0).all()


def test_registers_are_no_class_token_wherever_the_queries_are_cut():
    x = maps(prefix=3)
    found = stream("class_attention_entropy", chunks(x, 3, (3, 4), rows=(1, 2, 9)))
    np.testing.assert_allclose(found.mean, class_attention_entropy(x, prefix_tokens=3), rtol=1e-6)


@pytest.mark.parametrize("name", STREAMING)
def test_nan_is_not_an_undefined_row(name):
    x = maps()
    x[0, 0, 2] = torch.nan
    with pytest.raises(MeasureError, match="attention is NaN in layer 0"):
        stream(name, chunks(x, 1, (3, 4)))


def test_positions_generalise_the_grid():
    x = maps()
    centres = grid_positions((3, 4), 16)
    for function, arguments in ((attention_distance, ()), (attention_distance_quantile, (0.5,))):
        by_grid = function(x, *arguments, grid=(3, 4), prefix_tokens=1)
        by_position = function(x, *arguments, positions=(centres, centres), prefix_tokens=1)
        torch.testing.assert_close(by_grid, by_position)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: attention_distance(x, grid=(3, 4), prefix_tokens=1),
        lambda x: attention_distance_quantile(x, 0.9, grid=(3, 4), prefix_tokens=1),
        attention_entropy,
        lambda x: class_attention_entropy(x, prefix_tokens=1),
        lambda x: sink_mass(x, prefix_tokens=1),
        attention_nmi,
        head_divergence,
        lambda x: attention_rollout([x, x]),
    ],
)
def test_the_kind_of_array_given_comes_back(function):
    x = maps()
    assert isinstance(function(x), torch.Tensor)
    assert isinstance(function(x.numpy()), np.ndarray)
    np.testing.assert_allclose(function(x.float()), function(x.numpy()), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    prefix=st.integers(0, 3),
    heads=st.integers(1, 3),
    image_cut=st.integers(0, 2),
    row_cuts=st.sets(st.integers(1, 8), max_size=3),
    seed=st.integers(0, 99),
)
def test_streaming_equals_the_pure_functions_however_chunked(
    rows, columns, prefix, heads, image_cut, row_cuts, seed
):
    grid = (rows, columns)
    x = maps(3, heads, prefix, grid, seed)
    parts = list(chunks(x, prefix, grid, images=(image_cut,), rows=sorted(row_cuts)))
    expected = pure(x, grid, prefix)
    assert expected.keys() == STREAMING.keys()
    for name, values in expected.items():
        found = stream(name, parts).mean
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6, err_msg=name)
        low, high = STREAMING[name].info.bounds
        defined = found[~np.isnan(found)]
        assert ((low - 1e-6 <= defined) & (defined <= high + 1e-6)).all(), name
    assert (expected["attention_entropy"] <= math.log(rows * columns) + 1e-9).all()
    farthest = math.hypot((rows - 1) * 16, (columns - 1) * 16)
    for name in ("attention_distance", "attention_distance_q90", "rollout_distance"):
        assert (expected[name] <= farthest + 1e-9).all()


@pytest.mark.parametrize("name", STREAMING)
def test_measures_need_what_they_declare(name):
    x = maps(2, 3)
    cls = STREAMING[name]
    whole = stream(name, chunks(x, 1, (3, 4))).mean
    split = [part for one in x.split(1, dim=1) for part in chunks(one, 1, (3, 4), rows=(4, 7))]
    if cls.needs == "rows":
        alone = [stream(name, split[start : start + 3]).mean for start in range(0, 9, 3)]
        np.testing.assert_allclose(np.concatenate(alone, axis=1), whole, rtol=1e-6)
        return
    parts = list(chunks(x, 1, (3, 4), rows=(4, 7)))
    np.testing.assert_allclose(stream(name, parts).mean, whole, rtol=1e-6)
    if cls.needs == "heads":
        assert not np.allclose(stream(name, split[:3]).mean, whole[:, :1])
        half = dataclasses.replace(parts[0], queries=None)
        assert stream(name, [half]).mean.shape == whole.shape
        return
    with pytest.raises(MeasureError, match=f"{name}: .* only the first 7 queries have come"):
        stream(name, parts[:2])
    unfinished = cls()
    unfinished.update(parts[0])
    with pytest.raises(MeasureError, match="only the first 4 queries"):
        cls().merge(unfinished)
    with pytest.raises(MeasureError, match="only the first 4 queries"):
        unfinished.merge(cls())
    with pytest.raises(MeasureError, match="queries from 7 come where queries from 4"):
        stream(name, [parts[0], parts[2]])
    with pytest.raises(MeasureError, match="image 0 comes twice in layer 0"):
        stream(name, [*parts, *parts])


@pytest.mark.parametrize("name", STREAMING)
def test_declared_invariances_hold_and_no_other(name):
    x = maps(4, 3)
    generator = torch.Generator().manual_seed(1)
    images, patches = (
        torch.randperm(4, generator=generator),
        torch.randperm(12, generator=generator),
    )
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), 1 + patches])
    expected = stream(name, chunks(x, 1, (3, 4))).mean
    changed = {
        "order of images": (x[images], expected[images]),
        "order of keys": (x[..., tokens], expected),
        "order of tokens": (x[..., tokens][:, :, tokens], expected),
    }
    for invariance, (other, same) in changed.items():
        found = stream(name, chunks(other, 1, (3, 4))).mean
        holds = np.allclose(found, same, rtol=1e-5)
        assert holds == (invariance in STREAMING[name].info.invariances), invariance


@pytest.mark.parametrize("name", STREAMING)
def test_merging_is_a_union_of_images(name):
    x = maps(5)
    parts = list(chunks(x, 1, (3, 4), images=(2,)))
    whole = stream(name, parts)
    first, second = STREAMING[name](), STREAMING[name]()
    first.update(parts[0])
    second.update(parts[1])
    second.merge(first)
    assert np.array_equal(second.compute()[0].mean, whole.mean)
    with pytest.raises(MeasureError, match="image 0 is in both parts"):
        second.merge(first)
    overlapping = STREAMING[name]()
    overlapping.update(next(chunks(x[1:2], 1, (3, 4))))
    with pytest.raises(MeasureError, match="image 0 is in both parts"):
        overlapping.merge(second)
    other = STREAMING[name]()
    other.update(dataclasses.replace(next(chunks(maps(heads=7), 1, (3, 4))), first_image=9))
    if not other.per_block:
        with pytest.raises(MeasureError, match="7 numbers an image after 2"):
            second.merge(other)


@pytest.mark.parametrize("name", STREAMING)
def test_relative_units_are_one_under_uniform_attention(name):
    uniform = torch.full((1, 2, 14, 14), 1 / 14)
    centres = grid_positions((3, 4), 16)
    level = STREAMING[name].uniform(next(chunks(uniform, 2, (3, 4))))
    found = stream(name, chunks(uniform, 2, (3, 4))).mean
    if name.startswith("rollout"):
        # Half of each token stays where it is, or more where heads are fused by their sum.
        assert 0 < found < level == pytest.approx(uniform_distance(centres))
    elif level is None:
        assert found == pytest.approx(2 / 14 if name == "sink_mass" else 0, abs=1e-6)
    else:
        assert found == pytest.approx(level, rel=1e-5)


def test_one_patch_has_no_relative_units():
    (alone,) = chunks(torch.ones(1, 1, 1, 1), 0, (1, 1))
    for name, cls in STREAMING.items():
        assert cls.uniform(alone) is None, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
)
def test_a_model_gives_the_same_however_its_attention_arrives(fused, options, monkeypatch):
    model = tiny(**options)
    for block in model.module.blocks:
        block.attn.fused_attn = fused
    x = squares(5)
    maps_of: dict[int, torch.Tensor] = {}

    def run(micro_batches, elements):
        monkeypatch.setattr(chunks_module, "CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(rows, "TILE", elements)
        measures = [cls() for cls in STREAMING.values()]
        recorder = Recorder(model, on_attention=lambda chunk: add(measures, chunk))
        with torch.inference_mode(), recorder:
            for first, last in micro_batches:
                recorder.run(x[first:last], first)
        return [measure.compute() for measure in measures]

    def keep(chunk):
        maps_of[chunk.layer] = chunk.log_p.exp()

    with torch.inference_mode(), Recorder(model, on_attention=keep) as recorder:
        recorder.run(x)
    prefix = model.anatomy.prefix_tokens
    distance = attention_distance(maps_of[2], grid=(4, 4), patch_size=8, prefix_tokens=prefix)
    expected = run([(0, 5)], 1 << 21)
    np.testing.assert_allclose(expected[0][2].mean, distance, rtol=1e-5)
    for found in (run([(0, 2), (2, 5)], 2000), run([(0, 5)], 300)):
        for name, ours, theirs in zip(STREAMING, found, expected, strict=True):
            assert sorted(ours) == [0, 1, 2]
            for layer in ours:
                np.testing.assert_allclose(
                    ours[layer].mean, theirs[layer].mean, rtol=1e-4, atol=1e-5, err_msg=name
                )


def test_state_is_small_and_grows_with_images_only():
    measure = STREAMING["attention_entropy"]()
    x = maps(4, heads=8)
    for first in range(0, 4000, 4):
        for part in chunks(x, 1, (3, 4)):
            measure.update(dataclasses.replace(part, first_image=first))
    assert measure._sums.nbytes <= 2 * 4000 * (12 * 8 + 1)
    assert measure.compute()[0].mean.shape == (4000, 8)


@pytest.mark.parametrize("name", STREAMING)
def test_every_measure_says_what_it_is(name):
    cls = STREAMING[name]
    assert cls.info.group == "attention"
    assert cls.per_block == name.startswith("rollout")
    assert issubclass(cls, AttentionMeasure)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (np.ones((2, 3, 3)), {"grid": (1, 3)}, "give \\(batch, heads, queries, keys\\)"),
        (maps(), {"grid": (3, 3), "prefix_tokens": 1}, "12 patch queries .* for 9 and 9"),
        (maps(), {}, "give either grid"),
        (maps(), {"grid": (3, 4), "prefix_tokens": 1, "patch_size": 0}, "0 x 0 pixels is none"),
        (-maps(), {"grid": (3, 4), "prefix_tokens": 1}, "post-softmax"),
        (maps() * 3, {"grid": (3, 4), "prefix_tokens": 1}, "sum to more than 1"),
        (maps() * np.nan, {"grid": (3, 4), "prefix_tokens": 1}, "non-finite"),
        (maps(), {"grid": (3, 4), "prefix_tokens": 13}, "leave no patches"),
    ],
)
def test_refusals(given, options, message):
    with pytest.raises(MeasureError, match=message):
        attention_distance(given, **options)
    with pytest.raises(MeasureError, match=message):
        attention_distance_quantile(given, 0.5, **options)


def test_refusals_of_single_functions():
    for quantile in (0, 1, 50):
        with pytest.raises(MeasureError, match=f"a quantile of {quantile} is none"):
            attention_distance_quantile(maps(), quantile, grid=(3, 4), prefix_tokens=1)
    for prefix in (0, 13):
        with pytest.raises(MeasureError, match=f"{prefix} prefix tokens among 13 keys"):
            class_attention_entropy(maps(), prefix_tokens=prefix)
    with pytest.raises(MeasureError, match="unknown divergence 'jsd': use 'js' or 'kl'"):
        head_divergence(maps(), kind="jsd")


def test_golden_values(golden):
    x = golden["arrays"]["attention"].astype(np.float64)
    expected = {key: np.array(value) for key, value in golden["attention"].items()}
    options = {"grid": (7, 7), "prefix_tokens": 1}
    found = {
        "distance_px_renorm": attention_distance(x, **options),
        "distance_px_no_renorm": attention_distance(x, **options, renormalize=False),
        "entropy_patches_renorm_nats": attention_entropy(x, prefix_tokens=1),
        "entropy_all_tokens_nats": attention_entropy(x),
        "mass_patch_queries_to_prefix": sink_mass(x, prefix_tokens=1),
    }
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-9)


def test_golden_values_of_heads(golden):
    x = golden["arrays"]["attention"].astype(np.float64)
    expected = golden_attention()["cls_7x7_first_image"]
    np.testing.assert_allclose(attention_nmi(x, prefix_tokens=1), expected["nmi"], rtol=1e-9)
    kl = head_divergence(x, kind="kl", prefix_tokens=1)
    np.testing.assert_allclose(kl, expected["kl_heads"], rtol=1e-9)
    entropy = class_attention_entropy(x, prefix_tokens=1)
    np.testing.assert_allclose(entropy, expected["class_entropy"], rtol=1e-9)
    x, expected = (
        part["analytic_7x7"] for part in (golden_attention()["arrays"], golden_attention())
    )
    nmi = np.array(expected["nmi"], float)
    np.testing.assert_allclose(attention_nmi(x), nmi, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(head_divergence(x)[0], expected["js_heads"], rtol=1e-9)
    x = x + 1e-8
    kl = head_divergence(x / x.sum(-1, keepdims=True), kind="kl")
    np.testing.assert_allclose(kl, expected["kl_heads_of_weights_plus_1e-8"], rtol=1e-9)


@pytest.mark.parametrize("case", ["cls_7x7", "nocls_6x8", "local_7x7", "analytic_7x7"])
def test_reference_maps(shared, case):
    folder = shared / "reference"
    expected = json.loads((folder / "attention_expected.json").read_text().replace('"nan"', "NaN"))
    expected = expected[case]
    with np.load(folder / "attention_cases.npz") as arrays:
        x = arrays[case].astype(np.float64)
    grid, prefix = tuple(expected["layout"]["grid"]), expected["layout"]["prefix_tokens"]
    options = {"grid": grid, "prefix_tokens": prefix}
    found = {
        "distance_px_renorm": attention_distance(x, **options),
        "distance_px_no_renorm": attention_distance(x, **options, renormalize=False),
        "entropy_patches_renorm_nats": attention_entropy(x, prefix_tokens=prefix),
        "entropy_all_tokens_nats": attention_entropy(x),
        "nmi_patches_exact": attention_nmi(x, prefix_tokens=prefix),
    }
    if prefix:
        found["mass_patch_queries_to_prefix"] = sink_mass(x, prefix_tokens=prefix)
        found["entropy_cls_row_over_patches_renorm_nats"] = class_attention_entropy(
            x, prefix_tokens=prefix
        )
    for key, value in found.items():
        np.testing.assert_allclose(value, np.array(expected[key]), rtol=1e-9, atol=1e-12)
    js = head_divergence(x, prefix_tokens=prefix).mean(0)
    np.testing.assert_allclose(js, expected["js_heads_patches"]["mean_over_images"], rtol=1e-9)
    if expected["kl_heads_patches"]["eps"] == 0:
        kl = head_divergence(x, kind="kl", prefix_tokens=prefix)
        np.testing.assert_allclose(kl, expected["kl_heads_patches"]["per_image"], rtol=1e-9)


def test_reference_positions(shared):
    folder = shared / "reference"
    expected = json.loads((folder / "attention_expected.json").read_text())
    with np.load(folder / "attention_cases.npz") as arrays:
        pooled = arrays["pvt_sr2_8x8_to_4x4"].astype(np.float64)
        of_class = arrays["class_attention_1x37"].astype(np.float64)
    case = expected["pvt_sr2_8x8_to_4x4"]
    query = grid_positions((8, 8), case["layout"]["px_per_query_token"])
    key = grid_positions((4, 4), 2 * case["layout"]["px_per_query_token"])
    distance = attention_distance(pooled, positions=(query, key))
    np.testing.assert_allclose(distance, np.array(case["distance_px_cell_centres"]), rtol=1e-9)
    case = expected["class_attention_1x37"]
    entropy = class_attention_entropy(of_class, prefix_tokens=1)
    np.testing.assert_allclose(entropy, case["entropy_patch_keys_renorm_nats"], rtol=1e-9)
