from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from models_for_tests import squares, tiny
from scipy import stats

import vitprobe as vp
from vitprobe.datasets import (
    FourierArrays,
    LayerArrays,
    SimilarityArrays,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)
from vitprobe.errors import ResultError
from vitprobe.results import Comparison
from vitprobe.scores import Score, Scores


@pytest.fixture(scope="module")
def result():
    models = [tiny("a"), tiny("b", depth=2, heads=2, seed=1)]
    return vp.compare(models, squares(), progress=False, device="cpu")


DEPTHS = {"A 1": 2, "A 2": 2, "A 3": 2, "B 1": 1, "B 2": 1, "A 1 (untrained)": 2}
FEATURES = [(name, layer) for name, depth in DEPTHS.items() for layer in range(depth + 1)]
BLOCKS = [(name, block) for name, depth in DEPTHS.items() for block in range(depth)]
HEADS = 2
IMAGES = 6
# How far the heads and the images lie from the mean of a model's layer.
OF_HEADS = np.array([-1.0, 1.0])
OF_IMAGES = np.array([-5.0, -3, -1, 1, 3, 5])
SEEDS = {"A 1": 11.0, "A 2": 12.0, "A 3": 16.0, "B 1": 20.0, "B 2": 26.0, "A 1 (untrained)": 1.0}


def alike(a, b):
    """Similarity of two models at their diagonal: (1 - |difference of their numbers| / 100)."""
    return 1 - abs(SEEDS[a] - SEEDS[b]) / 100


@pytest.fixture(scope="module")
def made():
    """Numbers that are known: distance is seed + layer, +- 1 by head, -5 ... 5 by image."""
    units = [(name, block, head) for name, block in BLOCKS for head in range(HEADS)]
    of_unit = np.array([SEEDS[name] + 10 * block + OF_HEADS[head] for name, block, head in units])
    distance = of_unit + OF_IMAGES[:, None]
    # The heads of an image move against each other, so that their mean stands still.
    sink = np.array([0.5 + 0.08 * OF_HEADS[head] for *_, head in units]) + 0 * distance
    sink += 0.02 * OF_IMAGES[:, None] * np.array([OF_HEADS[head] for *_, head in units])
    sink[2, :HEADS] = np.nan
    of_block = np.array([SEEDS[name] + block for name, block in BLOCKS])
    values = {
        "attention_distance": distance,
        "sink_mass": sink,
        "rollout_distance": of_block + OF_IMAGES[:, None],
    }
    depth_share = np.array([layer / DEPTHS[name] for name, layer in FEATURES])
    value = np.array([[alike(a, b) for b, _ in FEATURES] for a, _ in FEATURES])
    value[depth_share[:, None] != depth_share] = 0.1
    error = np.full_like(value, 0.02)
    np.fill_diagonal(error, np.nan)
    directed = np.where(np.triu(np.ones_like(value)), value, value - 0.2)
    directed[0, -1] = np.nan
    tall = np.full(len(FEATURES), 4.0)
    groups = {
        "similarity": similarity_dataset(
            FEATURES,
            measures={
                "cka": SimilarityArrays(value, error, value / 2, math.inf, IMAGES),
                "mutual_knn": SimilarityArrays(value, 10 * error, value / 2, 9, 4),
                "linear_regression": SimilarityArrays(directed, error, 0 * value, 9, 4),
            },
            sums={"products": value, "permuted": np.stack([value] * 3)},
        ),
        "attention": attention_dataset(
            units,
            [f"{i}.png" for i in range(IMAGES)],
            values={name: array.astype(np.float32) for name, array in values.items()},
            undefined_rows={
                name: np.isnan(array).astype(np.int32) for name, array in values.items()
            },
            uniform={
                "attention_distance": np.array([10.0 if u[0][0] == "A" else 20.0 for u in units]),
                "rollout_distance": np.full(len(BLOCKS), 10.0),
            },
            blocks=BLOCKS,
        ),
        "tokens": tokens_dataset(
            FEATURES,
            [f"{i}.png" for i in range(IMAGES)],
            per_image={
                "token_cosine": np.full((IMAGES, len(FEATURES)), 0.99, np.float32)
                + 0.004 * OF_IMAGES[:, None].astype(np.float32),
                # Only one model differs, and little: p = 0.02 in each pair with it.
                "fourier_amplitude": np.array([[3.0, 2, 2, 2, -0.5, 1]], np.float32).T
                * np.array([name == "B 2" for name, _ in FEATURES], np.float32),
            },
            per_layer={
                "first_direction_share": LayerArrays(tall / 10),
                "rankme": LayerArrays(tall, tall / 4, 9),
            },
            first_direction_sums=np.stack([tall, 10 * tall], axis=1),
            fourier=FourierArrays(
                np.tile([0.0, 0.5, 1.0], (len(FEATURES), 1)),
                np.tile([0.0, -1.0, -2.0], (len(FEATURES), 1)),
                np.tile([np.nan, 0.1, 0.2], (len(FEATURES), 1)),
            ),
        ),
    }
    provenance = {
        "models": [{"name": name, "facts": facts()} for name in DEPTHS],
        "measures": [
            *("cka", "mutual_knn", "linear_regression"),
            *("attention_distance", "sink_mass", "rollout_distance"),
            *("token_cosine", "fourier_amplitude", "rankme"),
        ],
        "notes": [],
        "images": {"count": IMAGES},
        "groups": {"A": ["A 1", "A 2", "A 3"], "B": ["B 1", "B 2"]},
        "references": {"A 1": "A 1 (untrained)"},
    }
    return Comparison.assemble(groups, provenance)


def facts(grid=(4, 4), width=24):
    return {"grid": {"value": list(grid)}, "width": {"value": width}}


def datasets(result):
    return {name: node.to_dataset() for name, node in result.tree.children.items()}


@pytest.mark.parametrize("which", ["result", "made"])
def test_save_and_open_round_trip(which, request, tmp_path):
    result = request.getfixturevalue(which)
    path = result.save(tmp_path / "run.nc")
    again = vp.open_result(path)
    assert again.provenance == result.provenance
    assert [p.name for p in tmp_path.iterdir()] == ["run.nc"]
    for node in result.tree.subtree:
        assert again.tree[node.path].to_dataset().identical(node.to_dataset()), node.path


def test_samples_survive_a_round_trip(result, tmp_path):
    again = vp.open_result(result.save(tmp_path / "run.nc"))
    assert again.samples("a")["attention"].dtype == np.float16


def test_similarity_table(result):
    table = result.to_dataframe("cka")
    assert list(table) == [
        *("model_a", "layer_a", "model_b", "layer_b", "cka", "standard_error", "low", "high"),
        "floor",
    ]
    assert len(table) == 10 + 4 * 3 + 6
    row = table[(table.model_a == "a") & (table.model_b == "b") & (table.layer_a == 3)].iloc[1]
    assert row.cka == float(result.cka("a", "b")[3, 1])
    assert row.floor == float(result.floor("cka", "a", "b")[3, 1])


def test_a_measure_that_is_not_symmetric_is_listed_both_ways(made):
    table = made.to_dataframe("linear_regression")
    assert len(table) == len(FEATURES) ** 2
    forth = made.similarity("linear_regression", "A 1", "A 2")
    back = made.similarity("linear_regression", "A 2", "A 1")
    assert not np.allclose(forth, back.T)
    row = table[(table.model_a == "A 2") & (table.model_b == "A 1") & (table.layer_a == 1)].iloc[1]
    assert row.linear_regression == pytest.approx(float(back[1, 1]))


def test_attention_table(result):
    table = result.to_dataframe("attention_distance")
    assert len(table) == 3 * 3 + 2 * 2
    row = table[(table.model == "a") & (table.layer == 2) & (table["head"] == 1)].iloc[0]
    assert row.attention_distance == pytest.approx(float(result.attention_distance("a")[2, 1]))
    relative = result.attention_distance("a", relative=True)
    assert row.relative == pytest.approx(float(relative[2, 1]), rel=1e-5)
    assert (row.images, row.undefined_rows) == (40, 0)
    values = result.per_image("attention_distance", "a")[:, 2, 1].values
    assert row.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=1e-4)
    low, high = result.interval("attention_distance", "a")
    assert (row.low, row.high) == (float(low[2, 1]), float(high[2, 1]))
    assert "relative" not in result.to_dataframe("sink_mass")
    assert len(result.to_dataframe("first_direction_share")) == 7


def test_token_tables(made):
    table = made.to_dataframe("token_cosine")
    assert list(table) == [
        *("model", "layer", "token_cosine", "standard_error", "low", "high", "images")
    ]
    assert len(table) == len(FEATURES)
    assert (table.high == 1).all()
    table = made.to_dataframe("rankme")
    assert list(table) == ["model", "layer", "rankme", "standard_error", "low", "high"]
    assert len(made.to_dataframe("rollout_distance")) == len(BLOCKS)


def test_a_result_of_one_group_has_its_tables(made):
    groups = {"tokens": datasets(made)["tokens"]}
    tokens = Comparison.assemble(groups, {**made.provenance, "measures": ["token_cosine"]})
    whole = made.to_dataframe("token_cosine")
    assert tokens.to_dataframe("token_cosine").equals(whole)
    assert set(tokens.differences().measure) == {"token_cosine"}


def test_unequal_heads_are_nan_where_they_do_not_exist(result):
    both = result.attention_distance("a"), result.attention_distance("b")
    assert [array.shape for array in both] == [(3, 3), (2, 2)]


def test_the_interval_of_a_layer_with_itself_is_undefined(result):
    low, high = result.interval("cka", "a", "a")
    assert np.isnan(np.diag(low)).all()
    assert not np.isnan(low.values[~np.eye(4, dtype=bool)]).any()
    assert (high.fillna(1) <= 1).all()


def test_similarity_its_floor_and_its_interval(made):
    value = made.similarity("mutual_knn", "A 1", "B 1")
    assert value.dims == ("layer_a", "layer_b")
    assert (value.shape, value.attrs["images"], value.attrs["units"]) == ((3, 2), 4, "share")
    np.testing.assert_allclose(value[[0, 2], [0, 1]].values.diagonal(), alike("A 1", "B 1"))
    np.testing.assert_array_equal(made.floor("mutual_knn", "A 1", "B 1"), value / 2)
    low, high = made.interval("mutual_knn", "A 1", "B 1", level=0.9)
    np.testing.assert_allclose(value - low, np.minimum(stats.t.ppf(0.95, 9) * 0.2, value))
    assert (high == 1).any()
    assert (high <= 1).all()
    normal, _ = made.interval("cka", "A 1", "B 1", level=0.9)
    np.testing.assert_allclose(made.cka("A 1", "B 1") - normal, stats.norm.ppf(0.95) * 0.02)


def test_an_interval_of_heads_is_over_images(made):
    low, high = made.interval("attention_distance", "A 2", level=0.9)
    assert low.dims == ("layer", "head")
    margin = stats.t.ppf(0.95, IMAGES - 1) * OF_IMAGES.std(ddof=1) / np.sqrt(IMAGES)
    np.testing.assert_allclose((low + high) / 2, [[11, 13], [21, 23]], rtol=1e-6)
    np.testing.assert_allclose((high - low) / 2, margin, rtol=1e-6)
    relative = made.interval("attention_distance", "A 2", level=0.9, relative=True)
    np.testing.assert_allclose(relative[1], high / 10)
    low, _ = made.interval("attention_distance", "A 1 (untrained)")
    assert float(low[0, 0]) == 0


def test_heads_are_averaged_within_each_image_first(made):
    found = made.by_layer("sink_mass", "A 1")
    np.testing.assert_allclose(found["value"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["high"] - found["low"], 0, atol=1e-6)
    low, high = made.interval("sink_mass", "A 1")
    assert (high - low > 0.1).all()
    assert made.per_image("sink_mass", "A 1")[2, 0].isnull().all()
    found = made.by_layer("attention_distance", "A 1", relative=True)
    np.testing.assert_allclose(found["value"], [1.1, 2.1], rtol=1e-6)
    assert found.attrs["units"] == "relative to uniform"


def test_a_measure_of_a_block_has_one_head(made):
    found = made.attention("rollout_distance", "A 2")
    assert found.shape == (2, 1)
    np.testing.assert_allclose(found[:, 0], [12, 13])
    assert made.per_image("rollout_distance", "A 2", relative=True).shape == (IMAGES, 2, 1)
    assert made.interval("rollout_distance", "A 2")[0].shape == (2, 1)


def test_tokens(made):
    assert made.tokens("token_cosine", "B 1").dims == ("layer",)
    assert made.per_image("token_cosine", "B 1").shape == (IMAGES, 2)
    assert float(made.interval("token_cosine", "B 1")[1][0]) == 1  # a cosine is at most 1
    low, high = made.interval("rankme", "A 1")
    margin = stats.t.ppf(0.975, 9)
    np.testing.assert_allclose((low, high), ([max(1, 4 - margin)] * 3, [4 + margin] * 3))
    np.testing.assert_array_equal(made.by_layer("rankme", "A 1")["high"], high)
    assert made.interval("first_direction_share", "A 1")[0].isnull().all()
    np.testing.assert_array_equal(made.first_direction_share("A 1"), [0.4] * 3)


def test_fourier_curves(made):
    found = made.fourier_curves("A 1")
    assert found["value"].dims == ("layer", "step")
    margin = stats.t.ppf(0.975, IMAGES - 1) * 0.2
    np.testing.assert_allclose(found["low"][:, 2], -2 - margin)
    assert found["low"][:, 0].isnull().all()
    np.testing.assert_array_equal(found["frequency"][0], [0, 0.5, 1])


def test_differences_are_paired(made):
    found = made.difference("attention_distance", "A 2", "A 1")
    # Images differ by far more than the models do; their differences do not.
    np.testing.assert_allclose(found["value"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["high"] - found["low"], 0, atol=1e-5)
    assert found.attrs["overall_value"] == pytest.approx(1, rel=1e-6)
    assert found.attrs["overall_low"] > 0.999
    assert (found.attrs["units"], found.attrs["images"]) == ("px", IMAGES)
    back = made.difference("attention_distance", "A 1", "A 2")
    np.testing.assert_allclose(back["value"], -found["value"])


def test_differences_over_images_where_both_are_defined(made):
    found = made.difference("sink_mass", "A 1", "A 2")
    assert found.attrs["images"] == IMAGES  # block 1 is defined in all of them
    assert float(found["value"][0]) == pytest.approx(0, abs=1e-7)


def test_a_difference_is_over_the_layers_that_both_have(made):
    copies = {name: dataset.copy(deep=True) for name, dataset in datasets(made).items()}
    result = Comparison.assemble(copies, made.provenance)
    a, b = (result.tree["tokens"]["model"].values == name for name in ("A 1", "A 2"))
    values = result.tree["tokens"]["token_cosine"]
    values[:, a] = np.array([1.0, 5.0, 2.0])
    values[:, b] = np.array([1.0, np.nan, 3.0])
    found = result.difference("token_cosine", "A 1", "A 2").attrs
    assert found["overall_value"] == pytest.approx(-0.5)
    other_depth = result.difference("token_cosine", "A 2", "B 1").attrs
    assert other_depth["images"] == 0  # no image has all layers in both


def test_models_whose_values_do_not_compare_are_in_no_list(made):
    provenance = json.loads(json.dumps(made.provenance))
    provenance["models"][0]["facts"] = facts(grid=(6, 6))
    other = Comparison.assemble(datasets(made), provenance)
    for name, there in (("fourier_amplitude", False), ("token_cosine", True)):
        table = other.differences([name])
        assert len(table)
        assert ("A 1" in {*table["model_a"], *table["model_b"]}) == there
        assert bool(len(other.group_differences([name]))) == there


def test_units_of_a_difference(made):
    found = made.difference("attention_distance", "A 1", "B 1")
    assert found.attrs["units"] == "relative to uniform"
    assert found.attrs["overall_value"] == pytest.approx((11 + 21) / 2 / 10 - 20 / 20, rel=1e-6)
    assert found.sizes["layer"] == 0  # of other depths
    pixels = made.difference("attention_distance", "A 1", "B 1", relative=False)
    assert pixels.attrs["overall_value"] == pytest.approx(16 - 20, rel=1e-6)
    assert not made.needs_relative("attention_distance", ["A 1", "A 2"])
    assert made.needs_relative("attention_distance", ["A 1", "B 1"])
    assert not made.needs_relative("rollout_distance", ["A 1", "B 1"])


def test_the_list_of_differences(made):
    table = made.differences(["attention_distance", "token_cosine"])
    assert list(table) == [
        *("measure", "model_a", "model_b", "difference", "low", "high", "units", "images", "p"),
        *("p_holm", "verdict"),
    ]
    pairs = list(zip(table.model_a, table.model_b, strict=True))[: len(table) // 2]
    assert len(pairs) == 10 + 1
    assert pairs[-1] == ("A 1", "A 1 (untrained)")
    assert not any("untrained" in name for pair in pairs[:-1] for name in pair)
    verdicts = table.set_index(["measure", "model_a", "model_b"])["verdict"]
    assert verdicts["attention_distance", "A 1", "A 2"] == "lower"
    assert verdicts["attention_distance", "A 1", "A 1 (untrained)"] == "higher"
    assert set(verdicts["token_cosine"]) == {"cannot be told apart"}
    assert set(made.differences().measure) == {
        *("attention_distance", "sink_mass", "rollout_distance"),
        *("token_cosine", "fourier_amplitude"),
    }


def test_holm_is_over_the_whole_list(result):
    few = result.differences(["attention_distance", "attention_distance"])
    assert len(few) == 1, "a measure that is named twice is one test"
    many = result.differences()
    assert len(many) == 3 * len(few)
    both = [table[table.measure == "attention_distance"].iloc[0] for table in (few, many)]
    assert both[0].p == both[0].p_holm == both[1].p
    assert both[1].p_holm >= both[1].p


def test_a_difference_of_many_is_decided_by_holm_and_not_by_its_own_interval(made):
    table = made.differences(["fourier_amplitude"])
    row = table[(table.model_a == "A 1") & (table.model_b == "B 2")].iloc[0]
    assert row.high < 0
    assert row.p < 0.05 < row.p_holm
    assert row.verdict == "cannot be told apart"
    assert (made.differences(["fourier_amplitude"], level=0.5).verdict == "lower").any()


def test_groups_and_references(made, result):
    assert made.groups == {"A": ("A 1", "A 2", "A 3"), "B": ("B 1", "B 2")}
    assert made.references == {"A 1": "A 1 (untrained)"}
    assert (result.groups, result.references) == ({}, {})


def test_means_of_groups_take_seeds_as_the_unit(made):
    table = made.group_means(["rollout_distance", "attention_distance"]).set_index(
        ["measure", "group"]
    )
    row = table.loc["rollout_distance", "A"]
    seeds = np.array([11.5, 12.5, 16.5])  # mean over the blocks 0 and 1
    low, high = stats.ttest_1samp(seeds, 0).confidence_interval()
    assert (row.seeds, row["mean"]) == (3, pytest.approx(seeds.mean()))
    assert (row.low, row.high) == (pytest.approx(max(low, 0)), pytest.approx(high))
    assert row.between_seeds == pytest.approx(seeds.std(ddof=1))
    assert row.units == "px"
    # Groups whose uniform values differ are set side by side in relative units.
    row = table.loc["attention_distance", "B"]
    assert (row.units, row["mean"]) == ("relative to uniform", pytest.approx(23 / 20))
    assert "rankme" in set(made.group_means().measure)


def test_differences_of_groups_are_welchs(made):
    table = made.group_differences(["rollout_distance"])
    assert len(table) == 1
    row = table.iloc[0]
    a, b = np.array([11.5, 12.5, 16.5]), np.array([20.0, 26.0])
    expected = stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval()
    assert (row.group_a, row.group_b, row.difference) == ("A", "B", pytest.approx(-9.5))
    assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    assert (row.p, row.df) == (pytest.approx(expected.pvalue), pytest.approx(expected.df))
    pooled = np.sqrt((2 * a.var(ddof=1) + b.var(ddof=1)) / 3)
    assert row.between_seeds == pytest.approx(pooled)
    assert row.verdict == "cannot be told apart"


def test_one_seed_has_no_interval(made):
    groups = {"A": ["A 1", "A 2", "A 3"], "B": ["B 1"]}
    alone = Comparison.assemble(datasets(made), {**made.provenance, "groups": groups})
    means = alone.group_means(["rollout_distance"]).set_index("group").loc["B"]
    assert (means.seeds, means["mean"]) == (1, pytest.approx(20))
    assert np.isnan([means.low, means.high, means.between_seeds]).all()
    row = alone.group_differences(["rollout_distance"]).iloc[0]
    assert (row.difference, row.verdict) == (pytest.approx(-6.5), "one seed: no interval")
    assert np.isnan([row.low, row.high, row.p, row.p_holm]).all()
    within = alone.group_similarity("cka").set_index(["group_a", "group_b"])
    assert np.isnan(within.loc[("B", "B"), ["mean", "low", "high"]].astype(float)).all()
    assert within.loc[("B", "B"), "pairs"] == 0
    assert np.isnan(within.loc[("A", "B"), "low"])


@pytest.fixture
def undefined(made):
    """`made`, where no image of A 2, B 1 and B 2 has a rollout distance."""
    groups = datasets(made)
    attention = groups["attention"]
    missing = np.isin(attention["block_model"].values, ["A 2", "B 1", "B 2"])
    groups["attention"] = attention.assign(
        rollout_distance=attention["rollout_distance"].where(~missing)
    )
    return Comparison.assemble(groups, made.provenance)


def test_what_no_image_has_is_no_difference(undefined):
    table = undefined.differences(["rollout_distance"])
    pairs = list(zip(table["model_a"], table["model_b"], strict=True))
    assert pairs == [("A 1", "A 3"), ("A 1", "A 1 (untrained)")]
    assert table["p_holm"].notna().all()


def test_seeds_without_a_value_do_not_count(undefined):
    means = undefined.group_means(["rollout_distance"]).set_index("group")
    seeds = [11.5, 16.5]  # A 1 and A 3
    row = means.loc["A"]
    assert (row.seeds, row["mean"]) == (2, pytest.approx(np.mean(seeds)))
    assert row.between_seeds == pytest.approx(np.std(seeds, ddof=1))
    assert means.loc["B", "seeds"] == 0
    assert np.isnan(means.loc["B", "mean"])
    assert not len(undefined.group_differences(["rollout_distance"]))
    three = {"A": ["A 1", "A 2", "A 3"], "B": ["A 1 (untrained)"]}
    alone = Comparison.assemble(datasets(undefined), {**undefined.provenance, "groups": three})
    assert (
        alone.group_differences(["rollout_distance"])["verdict"].item() == "one seed: no interval"
    )


def test_similarity_of_groups(made):
    table = made.group_similarity("cka").set_index(["group_a", "group_b"])
    assert list(table.index) == [("A", "A"), ("A", "B"), ("B", "B")]
    within = table.loc[("A", "A")]
    pairs = np.array([alike("A 1", "A 2"), alike("A 1", "A 3"), alike("A 2", "A 3")])
    assert (within.pairs, within["mean"]) == (3, pytest.approx(pairs.mean()))
    # Leaving one of three seeds out leaves one pair.
    error = np.sqrt(2 / 3 * ((pairs - pairs.mean()) ** 2).sum())
    assert within.low == pytest.approx(within["mean"] - stats.t.ppf(0.975, 2) * error)
    between = table.loc[("A", "B")]
    cells = np.array([[alike(f"A {i}", f"B {j}") for j in (1, 2)] for i in (1, 2, 3)])
    assert (between.pairs, between["mean"]) == (6, pytest.approx(cells.mean()))
    error = np.sqrt(cells.mean(1).var(ddof=1) / 3 + cells.mean(0).var(ddof=1) / 2)
    margin = stats.t.ppf(0.975, 1) * error
    assert between.low == pytest.approx(max(-1, between["mean"] - margin))
    assert between.high == pytest.approx(min(1, between["mean"] + margin))
    two = table.loc[("B", "B")]
    assert (two.pairs, two["mean"]) == (1, pytest.approx(alike("B 1", "B 2")))
    assert np.isnan(two.low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.cka("a", "c"), "no model 'c' in this result"),
        (lambda r: r.attention("attention_distanc", "a"), "Did you mean 'attention_distance'"),
        (lambda r: r.attention("sink_mass", "a", relative=True), "'sink_mass' has no relative"),
        (lambda r: r.attention("cka", "a"), "'cka' is a measure of similarity, not attention"),
        (lambda r: r.similarity("sink_mass", "a", "b"), "is a measure of attention"),
        (lambda r: r.tokens("sink_mass", "a"), "is a measure of attention, not tokens"),
        (lambda r: r.interval("sink_mass", "a", "b"), "the interval of 'sink_mass' takes 1 model"),
        (lambda r: r.interval("cka", "a"), "the interval of 'cka' takes 2 model"),
        (lambda r: r.interval("cka", "a", "b", relative=True), "'cka' has no relative unit"),
        (lambda r: r.interval("cka", "a", "b", level=95), "a level of 95 is no probability"),
        (lambda r: r.by_layer("cka", "a"), "'cka' is of two layers"),
        (lambda r: r.per_image("first_direction_share", "a"), "number of all images together"),
        (lambda r: r.difference("cka", "a", "b"), "number of all images together"),
        (lambda r: r.standard_error("sink_mass", "a"), "is a measure of attention"),
        (lambda r: r.differences(["cka"]), "'cka' is no number of every image"),
        (lambda r: r.differences("sink_mass"), r"give \['sink_mass'\]"),
        (lambda r: r.group_means(), "has no groups of seeds"),
        (lambda r: r.group_similarity("cka"), "has no groups of seeds"),
        (lambda r: r.fourier_curves("a"), "'fourier_amplitude' was not measured"),
        (lambda r: r.to_dataframe("rsa_spearman"), "'rsa_spearman' was not measured"),
        (lambda r: r.describe("z"), "no model 'z'"),
    ],
)
def test_refusals(result, call, message):
    with pytest.raises(ResultError, match=message):
        call(result)


def test_files_that_are_no_results(tmp_path, result):
    with pytest.raises(ResultError, match="no result file"):
        vp.open_result(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("hello")
    with pytest.raises(ResultError, match="is no whole vitprobe result"):
        vp.open_result(tmp_path / "text.nc")
    path = result.save(tmp_path / "cut.nc")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ResultError, match="is no whole vitprobe result"):
        vp.open_result(path)
    result.tree["similarity"].to_dataset().to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match="is no vitprobe result of format 2"):
        vp.open_result(tmp_path / "other.nc")
    earlier = xr.Dataset(attrs={"format": 1, "provenance": "{}"})
    earlier.to_netcdf(tmp_path / "earlier.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match="write it again with 'vitprobe compare'"):
        vp.open_result(tmp_path / "earlier.nc")


def test_a_result_that_lacks_what_it_names(made, tmp_path):
    for change, message in (
        ({"measures": [*made.measures, "cka_rbf"]}, "it has no cka_rbf"),
        ({"models": [{"name": name} for name in ("A 1", "A 1")]}, "models is named twice"),
        ({"measures": ["cka", "cka"]}, "measures is named twice"),
        ({"notes": [None]}, "its notes are no list"),
        ({"groups": {"G": ["none"]}}, "no model 'none'"),
        ({"references": {"A 1": "none"}}, "no model 'none'"),
        ({"groups": {}, "references": {}, "models": [{"name": "A 1"}]}, "its models are not those"),
    ):
        result = Comparison.assemble(datasets(made), {**made.provenance, **change})
        path = result.save(tmp_path / "run.nc")
        with pytest.raises(ResultError, match=message):
            vp.open_result(path)


@pytest.mark.parametrize(
    ("group", "gone", "message"),
    [
        ("similarity", "cka_floor", "it has no cka_floor"),
        ("similarity", "layer_a", "it has no layer_a"),
        ("attention", "head", "it has no head"),
        ("attention", "sink_mass_undefined_rows", "it has no sink_mass_undefined_rows"),
        ("tokens", "fourier_frequency", "it has no fourier_frequency"),
        ("tokens", "first_direction_share", "it has no first_direction_share"),
    ],
)
def test_a_result_that_lacks_a_variable(made, tmp_path, group, gone, message):
    parts = datasets(made)
    parts[group] = parts[group].drop_vars(gone)
    path = Comparison.assemble(parts, made.provenance).save(tmp_path / "run.nc")
    with pytest.raises(ResultError, match=message):
        vp.open_result(path)


def test_a_measure_that_lacks_an_attribute(made, tmp_path):
    parts = {name: dataset.copy(deep=True) for name, dataset in datasets(made).items()}
    del parts["similarity"]["cka"].attrs["least"]
    path = Comparison.assemble(parts, made.provenance).save(tmp_path / "run.nc")
    with pytest.raises(ResultError, match="its cka has no attribute least"):
        vp.open_result(path)


def test_a_full_disk_leaves_the_earlier_file(result, tmp_path, monkeypatch):
    path = result.save(tmp_path / "run.nc")
    before = path.read_bytes()

    def write(self, data):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(ResultError, match=r"cannot write .*run.nc': No space left on device"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.nc"]


def test_a_folder_that_does_not_exist(result, tmp_path):
    with pytest.raises(ResultError, match=r"cannot write .*run.nc.*: there is no folder"):
        result.save(tmp_path / "no" / "run.nc")
    assert list(tmp_path.iterdir()) == []


def families(**more):
    from plots.synthetic import Subject, comparison

    subjects = {
        "ViT": Subject(depth=2),
        "XCiT": Subject(depth=2, kinds=("global", "channels")),
        "conv": Subject(depth=2, no_attention="it is convolutional"),
    }
    return comparison(subjects, images=6, **more)


def test_models_say_what_was_measured_of_them():
    found = families()
    assert found.measured("attention_distance") == ("ViT", "XCiT")
    assert found.measured("cka") == ("ViT", "XCiT", "conv")
    assert found.measured("first_direction_share") == ("ViT", "XCiT", "conv")
    assert found.attention_layers("conv") == []
    # A result from before attention layers were recorded: each is a block.
    assert [layer["block"] for layer in found.attention_layers("ViT")] == [0, 1]
    with pytest.raises(ResultError, match="'conv' has no attention: it is convolutional"):
        found.per_image("sink_mass", "conv")


def test_differences_are_between_attention_over_patches():
    found = families()
    # Of XCiT only its first layer is between patches.
    first = found.layer_images("attention_entropy", "ViT")[:, 0]
    second = found.layer_images("attention_entropy", "XCiT")[:, 0]
    expected = float((first - second).mean())
    difference = found.difference("attention_entropy", "ViT", "XCiT").attrs
    assert difference["overall_value"] == pytest.approx(expected, rel=1e-5)
    table = found.differences()
    assert set(table["model_a"]) | set(table["model_b"]) == {"ViT", "XCiT"}


def test_damaged_attention_layers_are_told_in_words(tmp_path):
    found = families()
    provenance = json.loads(json.dumps(found.provenance))
    del provenance["models"][1]["attention"][0]["kind"]
    groups = {name: found.tree[name].to_dataset() for name in ("similarity", "tokens", "attention")}
    path = Comparison.assemble(groups, provenance).save(tmp_path / "bad.nc")
    with pytest.raises(ResultError, match="an attention layer of XCiT has no kind"):
        vp.open_result(path)


def test_scores_join_a_result_and_are_saved_with_it(made, tmp_path):
    row = Score("A 1", "a.pth", "knn", "digits", 360, "top1", 0.9, 0.87, 0.93, settings={"k": 20})
    assert len(made.scores) == 0
    assert list(made.scores) == list(Scores([row]).to_dataframe())
    joined = made.with_scores(Scores([row], [{"seed": 0}]))
    joined = joined.with_scores(Scores([row, replace(row, model="B 1", layer=2)]))
    assert len(made.scores) == 0
    again = vp.open_result(joined.save(tmp_path / "run.nc"))
    for result in (joined, again):
        assert list(result.scores["model"]) == ["A 1", "B 1"]
        assert result.scores["layer"].isna().tolist() == [True, False]
        assert result.scores["value"].tolist() == [0.9, 0.9]
    assert len(vp.open_result(made.save(tmp_path / "older.nc")).scores) == 0


def test_scores_of_no_model_are_refused(made):
    row = Score("C", "c.pth", "knn", "digits", 360, "top1", 0.9)
    with pytest.raises(ResultError, match=r"the scores of 'C' \(c.pth\) belong to no model"):
        made.with_scores(Scores([row]))


def test_damaged_scores_are_told_in_a_sentence(made, tmp_path):
    row = Score("A 1", "a.pth", "knn", "digits", 360, "top1", 0.9)
    joined = made.with_scores(Scores([row]))
    joined.tree["scores"] = joined.tree["scores"].to_dataset().drop_vars("metric")
    with pytest.raises(ResultError, match="no whole vitprobe result"):
        vp.open_result(joined.save(tmp_path / "run.nc"))
