from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures.canonical import PWCCA, SVCCA, canonical_correlations, pwcca, svcca
from vitprobe.measures.neighbours import MutualKNN, mutual_knn
from vitprobe.measures.points import Points
from vitprobe.measures.rsa import RSAPearson, RSASpearman, rsa
from vitprobe.measures.similarity import (
    SUBSET_MEASURES,
    LinearRegression,
    Procrustes,
    linear_regression,
    procrustes,
)
from vitprobe.measures.subset import Subset

PURE = {
    SVCCA: svcca,
    PWCCA: pwcca,
    Procrustes: procrustes,
    RSASpearman: rsa,
    RSAPearson: lambda x, y: rsa(x, y, correlation="pearson"),
    MutualKNN: mutual_knn,
    LinearRegression: linear_regression,
}
each_measure = pytest.mark.parametrize("measure", SUBSET_MEASURES, ids=lambda m: m.info.name)


def pair(n=60, p=7, q=9, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    shared = x[:, :4]
    return x, shared @ rng.normal(size=(shared.shape[1], q)) + rng.normal(size=(n, q))


def subset(*layers, images=None):
    made = Subset(len(layers), images or max(4, len(layers[0])))
    for layer, features in enumerate(layers):
        made.update(layer, 0, torch.as_tensor(features))
    return made


# Analytic truths


@each_measure
def test_a_layer_is_its_own_copy(measure):
    x, _ = pair()
    assert PURE[measure](x, x) == pytest.approx(1, abs=1e-12)


def test_canonical_correlation_of_single_features_is_the_correlation():
    x, y = pair(p=1, q=1)
    x, y = y[:, :1] + x[:, :1], y
    expected = abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1])
    for value in (canonical_correlations(x, y)[0], svcca(x, y), pwcca(x, y), procrustes(x, y)):
        assert value == pytest.approx(expected, abs=1e-12)
    assert linear_regression(x, y) == pytest.approx(expected**2, abs=1e-12)


def test_canonical_correlations_solve_the_eigenproblem():
    x, y = pair()
    c = np.cov(x.T, y.T)
    xx, xy, yy = c[:7, :7], c[:7, 7:], c[7:, 7:]
    squares = np.linalg.eigvals(np.linalg.solve(xx, xy) @ np.linalg.solve(yy, xy.T)).real
    np.testing.assert_allclose(
        canonical_correlations(x, y), np.sqrt(np.sort(squares)[::-1]), atol=1e-9
    )


def test_svcca_keeps_the_fewest_directions_with_the_share_of_variance():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(50, 8))
    left = np.linalg.qr(left - left.mean(0))[0]
    x = left[:, :4] * np.sqrt([90, 9, 0.9, 0.1])
    y = left[:, [0, 4, 5, 6]] * np.sqrt([90, 9, 0.9, 0.1])
    assert svcca(x, y, variance=0.89) == pytest.approx(1, abs=1e-12)
    assert svcca(x, y, variance=0.98) == pytest.approx(1 / 2, abs=1e-12)
    assert svcca(x, y, variance=0.995) == pytest.approx(1 / 3, abs=1e-12)
    assert svcca(x, y, variance=1) == pytest.approx(1 / 4, abs=1e-12)


def test_pwcca_weighs_by_the_features():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(50, 4))
    q = np.linalg.qr(q - q.mean(0))[0]
    # One shared direction that x has at length 3 and y at length 1, one that they do not share.
    x, y = q[:, [0, 1]] * [3, 1], q[:, [0, 2]] * [1, 1]
    assert pwcca(x, y) == pytest.approx((3 / 4 + 1 / 2) / 2, abs=1e-12)


def test_procrustes_is_one_up_to_rotation_and_scale():
    x, y = pair()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0]
    assert procrustes(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    a, b = (z - z.mean(0) for z in (x, y[:, :7]))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    best = scipy.linalg.orthogonal_procrustes(a, b)[0]
    expected = np.linalg.norm(a @ best - b)
    assert np.sqrt(2 - 2 * procrustes(x, y[:, :7])) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("distance", ["correlation", "euclidean", "sqeuclidean"])
def test_rsa_is_the_correlation_of_the_distances(distance):
    x, y = pair(p=40, q=90, n=30)
    pairs = np.triu_indices(30, 1)

    def distances(z):
        if distance == "correlation":
            return (1 - np.corrcoef(z))[pairs]
        found = np.linalg.norm(z[:, None] - z[None], axis=-1)[pairs]
        return found**2 if distance == "sqeuclidean" else found

    a, b = distances(x), distances(y)
    value = rsa(x, y, distance=distance)
    assert value == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)
    value = rsa(x, y, distance=distance, correlation="pearson")
    assert value == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)


def test_mutual_knn_counts_shared_neighbours():
    angles = np.deg2rad([0, 1, 3, 90, 91, 93.5, 200])
    x = np.stack([np.cos(angles), np.sin(angles)], 1)
    moved = angles.copy()
    moved[0] = angles[3] + 0.001
    y = np.stack([np.cos(moved), np.sin(moved)], 1) * np.arange(1, 8)[:, None]
    # Nearest in x: 1 0 1 4 3 4 5; in y: 3 2 1 0 0 4 5, whatever the lengths.
    assert mutual_knn(x, y, neighbours=1) == pytest.approx(3 / 7)


def test_independent_features_give_the_chance_level():
    rng = np.random.default_rng(0)
    n, p, q = 101, 20, 30
    pairs = [(rng.normal(size=(n, p)), rng.normal(size=(n, q))) for _ in range(60)]

    def mean(measure):
        values = [measure(x, y) for x, y in pairs]
        return np.mean(values), 4 * np.std(values) / np.sqrt(len(values))

    for measure, expected in (
        (linear_regression, q / (n - 1)),
        (mutual_knn, 10 / (n - 1)),
        (rsa, 0),
    ):
        value, error = mean(measure)
        assert abs(value - expected) < error


def test_linear_regression_is_one_for_a_linear_function_and_not_symmetric():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(80, 12))
    x = y[:, :3] @ rng.normal(size=(3, 5)) + 2
    assert linear_regression(x, y) == pytest.approx(1, abs=1e-12)
    assert linear_regression(y, x) < 0.5
    # Any invertible linear map of the predictor leaves it.
    z = rng.normal(size=(80, 4)) + y[:, :4]
    assert linear_regression(y, z @ rng.normal(size=(4, 4))) == pytest.approx(
        linear_regression(y, z), abs=1e-9
    )


# Scale and shift


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("p", [7, 200])
@each_measure
def test_scale_does_not_matter(measure, p, scale):
    if p > 60 and measure in (PWCCA, SVCCA, LinearRegression):
        pytest.skip("not defined with more features than images")
    x, y = pair(p=p)
    x, y = x.astype(np.float32), y.astype(np.float32)
    value = PURE[measure](x, y)
    assert PURE[measure](np.float32(scale) * x, y) == pytest.approx(value, abs=1e-6)


@each_measure
def test_a_large_common_mean_keeps_its_digits(measure):
    x, y = pair()
    value = PURE[measure](x + 1e5, y)
    if measure in (RSASpearman, RSAPearson, MutualKNN):
        # Row statistics see the mean; the same to float64's digits of a shifted copy.
        assert PURE[measure](np.ldexp(x + 1e5, 3), y) == pytest.approx(value, abs=1e-9)
    else:
        assert value == pytest.approx(PURE[measure](x, y), abs=1e-9)


# Ties


def duplicated(x, *copies):
    return np.concatenate([x, x[list(copies)]])


def test_duplicated_images_tie_in_rsa():
    x, y = (duplicated(z, 0, 0, 3) for z in pair(n=12, p=30, q=5))
    pairs = np.triu_indices(15, 1)
    # Rounded, so that scipy sees the ties that rounding parts.
    a, b = (np.round((1 - np.corrcoef(z))[pairs], 11) for z in (x, y))
    assert rsa(x, y) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("measure", [RSASpearman, MutualKNN], ids=lambda m: m.info.name)
def test_duplicated_images_give_the_same_in_any_order(measure):
    x, y = (duplicated(z, *range(10)) for z in pair(n=20))
    order = np.random.default_rng(1).permutation(30)
    value = PURE[measure](x, y)
    assert PURE[measure](x[order], y[order]) == pytest.approx(value, abs=1e-12)
    assert PURE[measure](x, x) == pytest.approx(1, abs=1e-12)


def test_neighbours_tie_within_rounding():
    x, y = (duplicated(z, *range(10)) for z in pair(n=20))
    # Lengths do not change a cosine, but they change how it is rounded.
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(30, 1))
    assert mutual_knn(x * lengths, y) == pytest.approx(mutual_knn(x, y), abs=1e-12)


def test_images_tied_for_the_last_place_share_it():
    # Images 1 and 2 tie for the neighbour of 0 in x; in y it is 1 alone.
    x = np.array([[1, 0], [1, 1], [1, 1], [-1, 0.1], [-1, -0.1]], dtype=float)
    y = np.array([[1, 0], [1, 0.1], [1, -1], [-1, 0.1], [-1, -0.1]], dtype=float)
    # Row 0: 1/2. Rows 1, 2 of x have each other; in y 1 has 0 and 2 has 0. Rows 3, 4 agree.
    assert mutual_knn(x, y, neighbours=1) == pytest.approx((0.5 + 0 + 0 + 1 + 1) / 5)


# Undefined


@pytest.mark.parametrize(
    ("measure", "x", "y", "message"),
    [
        (procrustes, np.eye(5), np.eye(4), "x has 5 images and y has 4"),
        (procrustes, np.eye(3), np.eye(3), "x has 3 images: give at least 4"),
        (procrustes, np.ones(5), np.eye(5), r"x has shape \(5,\): give \(images, features\)"),
        (rsa, np.eye(5), np.full((5, 2), np.nan), "y holds NaN or infinite features"),
        (mutual_knn, "abc", np.eye(5), "expected a torch tensor or numpy array"),
        (mutual_knn, *pair(n=11), "x has 11 images, of which 10 neighbours are no choice"),
        (rsa, *pair(q=1), "y has the same value in every feature of image 0"),
        (rsa, np.eye(5), np.eye(5), "x has all images equally far apart"),
        (svcca, np.eye(9), np.eye(9), "x is compared over too few images: the two layers span 8 a"),
        (canonical_correlations, *pair(n=16), "x is compared over too few images"),
        (pwcca, *pair(n=8, q=12), "y has 12 features, which PWCCA weighs one by one"),
        (pwcca, *pair(n=16), "the two layers span 7 and 9 directions"),
        (linear_regression, *pair(n=10, p=3, q=12), "the predicting layer spans 9 directions, all"),
    ],
)
def test_refusals(measure, x, y, message):
    with pytest.raises(MeasureError, match=message):
        measure(x, y)


@each_measure
def test_a_constant_layer_is_refused(measure):
    x, _ = pair()
    for constant in (np.full((60, 3), 1 / 3), np.float32(1 / 3) * np.ones((60, 99), np.float32)):
        with pytest.raises(MeasureError, match="y is constant over the images"):
            PURE[measure](x, constant)


def test_unknown_options_are_refused():
    x, y = pair()
    with pytest.raises(MeasureError, match="unknown distance 'cosine': use one of correlation, eu"):
        rsa(x, y, distance="cosine")
    with pytest.raises(MeasureError, match="unknown correlation 'kendall'"):
        rsa(x, y, correlation="kendall")
    with pytest.raises(MeasureError, match=r"a share 1\.5 of variance cannot be kept"):
        svcca(x, y, variance=1.5)
    x[3] = 0
    with pytest.raises(MeasureError, match="x has zeros alone as features of image 3"):
        mutual_knn(x, y)


def test_zero_variance_features_change_nothing():
    x, y = pair()
    wide = np.concatenate([x, np.full((60, 2), 3.0)], axis=1)
    for measure in (svcca, pwcca, procrustes, linear_regression):
        assert measure(wide, y) == pytest.approx(measure(x, y), abs=1e-12)


# Subsets


@each_measure
def test_streaming_equals_the_pure_function(measure):
    layers = [*pair(), pair(seed=3)[1]]
    result = measure(subset(*layers)).compute()
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            assert result.value[i, j] == pytest.approx(PURE[measure](x, y), abs=1e-12)
    assert torch.equal(result.value, result.value.T) == measure.symmetric
    assert result.standard_error.diagonal().isnan().all()
    assert not result.floor.isnan().any()


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 29), max_size=4),
    owners=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    merges=st.permutations([0, 1, 2]),
    limit=st.sampled_from([13, 30]),
)
def test_any_split_and_order_of_merging_gives_the_same_points(cuts, owners, merges, limit):
    layers = [torch.from_numpy(z).float() for z in pair(n=30, p=50)]
    parts = [Subset(2, limit) for _ in range(3)]
    for owner, (start, end) in zip(owners, pairwise([0, *sorted(cuts), 30]), strict=False):
        for layer, x in enumerate(layers):
            parts[owner].update(layer, start, x[start:end])
    whole = Subset(2, limit)
    for owner in merges:
        whole.merge(parts[owner])
    expected = subset(*(x[:limit] for x in layers), images=limit)
    for ours, theirs in zip(whole.points(), expected.points(), strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.centered, theirs.centered)


def test_images_beyond_the_limit_are_ignored_and_twice_is_refused():
    x = torch.randn(10, 3)
    made = Subset(1, 6)
    made.update(0, 0, x[:4])
    made.update(0, 4, x[4:])
    made.update(0, 8, x[8:])
    assert len(made.points()[0]) == 6
    with pytest.raises(MeasureError, match="image 5 of layer 0 was given twice"):
        made.update(0, 5, x[5:])
    other = Subset(1, 6)
    other.update(0, 3, x[3:4])
    with pytest.raises(MeasureError, match="image 3 of layer 0 is in both parts"):
        made.merge(other)
    with pytest.raises(MeasureError, match="same layers and max_images"):
        made.merge(Subset(1, 5))
    with pytest.raises(MeasureError, match="subset of 3 images is too small"):
        Subset(1, 3)


def test_a_subset_keeps_its_own_copy():
    x = torch.randn(8, 3)
    made = Subset(1, 20)
    made.update(0, 0, x)
    expected = Points.of(x.clone()).rows
    x.zero_()
    assert torch.equal(made.points()[0].rows, expected)
    made.update(0, 8, torch.randn(2, 3))
    assert len(made.points()[0]) == 10, "images that come later count"


def test_incomplete_or_broken_subsets_are_refused():
    made = Subset(2, 8)
    with pytest.raises(MeasureError, match="no images of layer 0"):
        made.points()
    made.update(0, 0, torch.randn(8, 3))
    made.update(1, 0, torch.randn(6, 3))
    with pytest.raises(MeasureError, match="layers 0 and 1 were given different images"):
        made.points()
    with pytest.raises(MeasureError, match="NaN or infinite in layer 1"):
        made.update(1, 6, torch.full((1, 3), torch.nan))


@each_measure
def test_an_undefined_layer_leaves_the_others_alone(measure):
    x, y = pair()
    made = measure(subset(x, np.full((60, 4), 2.5), y))
    result = made.compute()
    assert result.value[1].isnan().all()
    assert result.value[:, 1].isnan().all()
    assert result.floor[1].isnan().all()
    assert made.reasons == {1: "is constant over the images"}
    assert result.value[0, 2] == pytest.approx(PURE[measure](x, y), abs=1e-12)
    assert result.standard_error[0, 2] > 0


def test_layers_too_wide_together_are_undefined_with_the_reason():
    (narrow, wide), other = pair(n=40, p=5, q=30), pair(n=40, p=25)[0]
    made = LinearRegression(subset(narrow, np.tile(wide, 2) ** np.repeat([1, 3], 30), other))
    value = made.compute().value
    assert value[:, 1].isnan().all()
    assert not value[1, [0, 2]].isnan().any(), "it can be predicted, though it cannot predict"
    assert "the predicting layer spans 39 directions" in made.reasons[0]
    made = PWCCA(subset(narrow, wide, other))
    value = made.compute().value
    assert not value[0].isnan().any()
    assert value[1:, 1:].isnan().all()
    assert sorted(made.reasons) == [1, 2]
    assert made.reasons[1].startswith("is compared over too few images: the two layers span 30")


@each_measure
def test_few_images(measure):
    x, y = pair(n=3)
    made = measure(subset(x, y, images=10))
    assert made.compute().value.isnan().all()
    assert made.reasons[0] == "has 3 images of the 4 it needs"
    x, y = pair(n=9, p=2, q=2)
    result = measure(subset(x, y)).compute()
    assert result.standard_error.isnan().all(), "fewer images than groups"
    assert result.value.isnan().all() == (measure is MutualKNN)


# Uncertainty


def test_the_jackknife_deletes_interleaved_groups():
    x, y = pair(n=47)
    deleted = []
    for group in range(10):
        kept = np.arange(47) % 10 != group
        deleted.append(procrustes(x[kept], y[kept]))
    expected = np.sqrt(9 / 10 * np.sum((np.array(deleted) - np.mean(deleted)) ** 2))
    result = Procrustes(subset(x, y)).compute()
    assert result.standard_error[0, 1] == pytest.approx(expected, rel=1e-9)
    assert result.degrees == 9


@each_measure
def test_the_floor_is_the_largest_of_permuted_values(measure):
    x, y = pair(seed=4)
    made = measure(subset(x, y))
    first, again = made.compute(), measure(subset(x, y)).compute()
    assert torch.equal(first.floor, again.floor)
    assert torch.equal(first.standard_error.nan_to_num(), again.standard_error.nan_to_num())
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(60, generator=generator).numpy() for _ in range(19)]
    expected = max(PURE[measure](x, y[order]) for order in orders)
    assert first.floor[0, 1] == pytest.approx(expected, abs=1e-9)
    assert first.floor[0, 1] < first.value[0, 1]


@pytest.mark.parametrize(
    ("measure", "low", "high"),
    [(Procrustes, 0.8, 1.25), (RSAPearson, 0.8, 1.25), (MutualKNN, 0.9, 1.8)],
    ids=["procrustes", "rsa_pearson", "mutual_knn"],
)
def test_the_standard_error_is_the_spread_over_samples(measure, low, high, monkeypatch):
    monkeypatch.setattr("vitprobe.measures.subset._permutations", lambda n: [torch.arange(n)])
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 8))
    values, errors = [], []
    for _ in range(100):
        x = rng.normal(size=(120, 6))
        result = measure(subset(x, x @ mixing + 2 * rng.normal(size=(120, 8)))).compute()
        values.append(float(result.value[0, 1]))
        errors.append(float(result.standard_error[0, 1]))
    assert low < np.sqrt(np.mean(np.square(errors))) / np.std(values) < high


# Golden values


def leading(x, k):
    left, singular, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return left[:, :k] * singular[:k]


def kept(x, share):
    singular = np.linalg.svd(x - x.mean(0))[1]
    return int((np.cumsum(singular**2) / np.sum(singular**2) < share).sum()) + 1


def computed(x, y):
    """Every reference name to its value, undefined ones left out."""
    found = {}
    families = {
        "cca": lambda z: z,
        "svcca99": lambda z: leading(z, kept(z, 0.99)),
        "svcca90": lambda z: leading(z, kept(z, 0.90)),
        "svcca_top5": lambda z: leading(z, 5),
    }
    for name, reduce in families.items():
        try:
            rho = canonical_correlations(reduce(x), reduce(y))
        except MeasureError:
            continue
        found[f"{name}_rho"] = rho
        found[f"{name}_mean_rho"] = rho.mean()
        found[f"{name}_mean_sq_rho"] = (rho**2).mean()
    for name, share in (("svcca99_mean_rho", 0.99), ("svcca90_mean_rho", 0.90)):
        if name in found:
            found[name] = svcca(x, y, variance=share)
        else:
            with pytest.raises(MeasureError, match="too few images"):
                svcca(x, y, variance=share)
    try:
        found["pwcca_symmetrised"] = pwcca(x, y)
    except MeasureError:
        assert "cca_rho" not in found
    similarity = procrustes(x, y)
    found["procrustes_nuclear"] = similarity
    found["procrustes_distance"] = np.sqrt(2 - 2 * similarity)
    found["procrustes_angular"] = np.arccos(similarity)
    for distance, correlation in (
        ("correlation", "spearman"),
        ("correlation", "pearson"),
        ("euclidean", "spearman"),
        ("sqeuclidean", "pearson"),
    ):
        found[f"rsa_{distance}_{correlation}"] = rsa(
            x, y, distance=distance, correlation=correlation
        )
    for k in (5, 10):
        found[f"mutual_knn_cosine_k{k}"] = mutual_knn(x, y, neighbours=k)
    return found


def matches(x, y, expected):
    found = computed(x, y)
    assert set(found) == set(expected), "defined here and left out there, or the reverse"
    for name, value in expected.items():
        tolerance = 1e-6 if "cca" in name or "procrustes" in name else 1e-9
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)
    return len(expected)


GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.mark.parametrize("name", ["A_n64_p32", "D_independent_n64_p128"])
def test_golden_values(name):
    expected = json.loads((GOLDEN / "similarity.json").read_text())[name]
    with np.load(GOLDEN / "similarity.npz") as arrays:
        x, y = (arrays[f"{name}__{side}"].astype(np.float64) for side in "XY")
    assert matches(x, y, expected) > 10


VIEWS = {
    "": lambda x: x,
    "flatten_all": lambda x: x.reshape(len(x), -1),
    "flatten_patch": lambda x: x[:, 1:].reshape(len(x), -1),
    "cls": lambda x: x[:, 0],
    "mean_patch": lambda x: x[:, 1:].mean(1),
    "mean_all": lambda x: x.mean(1),
    "tokens_as_samples": lambda x: x.reshape(-1, x.shape[-1]),
}


def test_all_reference_pairs(shared):
    folder = shared / "reference"
    expected = json.loads((folder / "similarity_expected.json").read_text())["pairs"]
    ours = ("svcca", "pwcca", "cca", "procrustes", "rsa", "mutual_knn")
    checked = 0
    with np.load(folder / "similarity_pairs.npz") as arrays:
        for key, values in expected.items():
            base, _, view = key.partition("/")
            x, y = (VIEWS[view](arrays[f"{base}__{side}"].astype(np.float64)) for side in "XY")
            wanted = {
                name: item["value"] if isinstance(item, dict) else item
                for name, item in values.items()
                if name.startswith(ours)
            }
            checked += matches(x, y, wanted)
    assert checked > 150
