from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cka_for_tests import blocks, features, in_one_block, layers, streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from vitprobe.errors import MeasureError
from vitprobe.measures.cka import CKA, CKARBF, cka
from vitprobe.measures.gram import u_center

GOLDEN = Path(__file__).parent.parent / "golden" / "cka.json"


def direct_unbiased_hsic(k, m):
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def test_equals_the_formula_term_by_term():
    x, y = features()
    k, m = x @ x.T, y @ y.T
    h = [direct_unbiased_hsic(*pair) for pair in ((k, m), (k, k), (m, m))]
    assert cka(x, y) == pytest.approx(h[0] / np.sqrt(h[1] * h[2]), abs=1e-12)


def test_biased_equals_normalised_frobenius_norm():
    x, y = features()
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert cka(x, y, estimator="biased") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_invariances(estimator, kernel):
    x, y = features()
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(x.shape[1],) * 2))[0]
    order = rng.permutation(len(x))
    options = {"estimator": estimator, "kernel": kernel}
    value = cka(x, y, **options)
    assert cka(y, x, **options) == pytest.approx(value, abs=1e-12)
    for changed in (x @ rotation, 1e-4 * x, 1e4 * x, x + rng.normal(size=x.shape[1])):
        assert cka(changed, y, **options) == pytest.approx(value, abs=1e-9)
    assert cka(x[order], y[order], **options) == pytest.approx(value, abs=1e-12)
    assert cka(x[order], y, **options) != pytest.approx(value, abs=1e-3)


def test_of_itself_is_one():
    x, _ = features()
    assert cka(x, x) == 1
    assert cka(x.astype(np.float32), x.astype(np.float32)) == 1


def test_independent_features_average_to_zero_only_when_debiased():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(24, 60)), rng.normal(size=(24, 60))) for _ in range(300)]
    unbiased = [cka(*pair) for pair in pairs]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / np.sqrt(len(pairs))
    assert min(unbiased) < 0, "a debiased CKA must not be clamped"
    assert np.mean([cka(*pair, estimator="biased") for pair in pairs]) > 0.5


def test_float32_with_a_large_common_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 300))
    y = x @ rng.normal(size=(300, 200)) / 17 + rng.normal(size=(128, 200))
    low = [(100 + array).astype(np.float32) for array in (x, y)]
    # The reference sees the same rounded numbers, so that only the arithmetic is compared.
    exact = cka(*(array.astype(np.float64) for array in low))
    assert cka(*low) == pytest.approx(exact, abs=1e-5)
    assert exact == pytest.approx(cka(x, y), abs=1e-4)


def test_torch_and_numpy_agree_and_trailing_dimensions_are_flattened():
    x, y = features()
    assert cka(torch.from_numpy(x), torch.from_numpy(y)) == cka(x, y)
    tokens = x[:, :15].reshape(len(x), 3, 5)
    assert cka(tokens, y) == cka(x[:, :15], y)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 20), p=st.integers(1, 30), q=st.integers(1, 30), seed=st.integers(0, 99))
def test_any_shape(n, p, q, seed):
    x, y = features(n, max(p, 5), q, seed)
    assert cka(x[:, :p], y) <= 1 + 1e-12
    centred = u_center(torch.from_numpy(x @ x.T))
    assert torch.allclose(centred.sum(0), torch.zeros(n, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.ones((5, 2)), np.zeros((4, 2)), {}, "x has 5 images and y has 4"),
        (np.eye(3), np.eye(3), {}, "unbiased CKA needs at least 4 images in a block, got 3"),
        (np.ones((5, 2)), np.eye(5), {}, "x is constant over the images"),
        (np.diff(np.eye(6)), np.full((6, 2), np.nan), {}, "y holds NaN or infinite features"),
        (np.eye(5), np.eye(5), {}, "images of x are all alike but for one, or all orthogonal"),
        (np.ones(5), np.eye(5), {}, r"x has shape \(5,\)"),
        (np.eye(5), np.eye(5), {"kernel": "cosine"}, "unknown CKA kernel 'cosine'"),
        (np.eye(5), np.eye(5), {"estimator": "mle"}, "unknown CKA estimator 'mle'"),
        ("abc", np.eye(5), {}, "expected a torch tensor or numpy array of real numbers, got str"),
        (np.repeat([[0.0], [1.0]], [9, 1], 0), np.eye(10), {"kernel": "rbf"}, "bandwidth is zero"),
        (np.eye(10), np.eye(10), {"kernel": "rbf", "bandwidth": -1.0}, "bandwidth of -1.0 is none"),
    ],
)
def test_refusals(x, y, options, message):
    with pytest.raises(MeasureError, match=message):
        cka(x, y, **options)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_one_block_is_the_full_batch(estimator):
    xs = layers()
    value = streamed([xs], estimator).compute().value
    for i, x in enumerate(xs):
        assert value[i, i] == 1
        for j, y in enumerate(xs):
            assert value[i, j] == pytest.approx(cka(x, y, estimator=estimator), abs=1e-12)


@settings(max_examples=8, deadline=None)
@given(cut=st.integers(1, 4), seed=st.integers(0, 50))
def test_merging_any_split_gives_the_same_sums(cut, seed):
    parts = blocks(layers(seed=seed), [14] * 5)
    whole = streamed(parts)
    left, right = streamed(parts[:cut]), streamed(parts[cut:], first=14 * cut)
    left.merge(right)
    for name, state in vars(whole).items():
        if isinstance(state, torch.Tensor):
            torch.testing.assert_close(getattr(left, name), state, rtol=1e-12, atol=1e-9)
    assert (left.images, left.blocks, left.pairs) == (70, 5, 5 * 14 * 11)


def test_ragged_blocks_weigh_n_times_n_minus_3():
    xs = layers()
    sizes = [40, 20, 10]
    hsic = {}
    for part in blocks(xs, sizes):
        n = len(part[0])
        for i in range(3):
            for j in range(3):
                k, m = (p.numpy() @ p.numpy().T for p in (part[i], part[j]))
                hsic[i, j] = hsic.get((i, j), 0) + n * (n - 3) * direct_unbiased_hsic(k, m)
    value = streamed(blocks(xs, sizes)).compute().value
    for (i, j), h in hsic.items():
        assert value[i, j] == pytest.approx(h / np.sqrt(hsic[i, i] * hsic[j, j]), abs=1e-12)


KINDS = ("linear", "rbf", "exact")


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "p", "q"), [(4, 3, 9), (12, 50, 30), (50, 6, 3), (40, 39, 41)])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_one_block_is_the_pure_function_for_any_shape_and_scale(kind, estimator, n, p, q, scale):
    x, y = (torch.from_numpy(side) for side in features(n, max(p, 5), q))
    x = scale * x[:, :p]
    kernel = "rbf" if kind == "rbf" else "linear"
    expected = cka(x / scale, y, kernel=kernel, estimator=estimator)
    value = in_one_block(kind, [x, y], estimator=estimator)
    assert value.diagonal().tolist() == [1, 1]
    assert value[0, 1] == value[1, 0] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_there_twice_count_twice(kind):
    xs = [x[torch.arange(70) % 35] for x in layers()]
    kernel = "rbf" if kind == "rbf" else "linear"
    expected = cka(xs[0], xs[1], kernel=kernel)
    assert in_one_block(kind, xs)[0, 1] == pytest.approx(expected, abs=1e-10)
    assert expected > cka(xs[0][:35], xs[1][:35], kernel=kernel) + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_value_stays_negative(kind):
    x, y = (torch.from_numpy(side) for side in features(6, 40, 40, seed=1))
    value = in_one_block(kind, [x, y[torch.tensor([3, 0, 5, 1, 2, 4])]])
    assert value[0, 1] < -0.01


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_than_four_images_are_refused(kind):
    few = [x[:3] for x in layers()]
    with pytest.raises(MeasureError, match=r"unbiased CKA needs at least 4 images.*, got 3"):
        in_one_block(kind, few)
    assert in_one_block(kind, few, estimator="biased")[0, 1] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_layers_are_undefined_and_leave_the_others_alone(kind, dtype):
    xs = [x.to(dtype) for x in layers()]
    generator = torch.Generator().manual_seed(0)
    constant = torch.rand(5, generator=generator, dtype=dtype).expand(70, 5)
    rounding = 1 + torch.finfo(dtype).eps * torch.randint(-1, 2, (70, 5), generator=generator)
    value = in_one_block(kind, [*xs, constant, constant * rounding])
    assert value[3:].isnan().all()
    assert value[:, 3:].isnan().all()
    torch.testing.assert_close(value[:3, :3], in_one_block(kind, xs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["linear", "exact"])
def test_images_alike_but_for_one_or_all_orthogonal_are_undefined(kind):
    one = torch.zeros(70, 3, dtype=torch.float64)
    one[5] = 7
    orthogonal = torch.diag(torch.arange(1, 71, dtype=torch.float64))
    value = in_one_block(kind, [layers()[0], 0.3 + one, orthogonal])
    assert value[1:].isnan().all()
    assert value[0, 0] == 1


def test_reasons_name_the_undefined_layers():
    xs = [layers()[0], torch.ones(70, 2), torch.arange(70.0)[:, None] // 36]
    linear, rbf = CKA(3), CKARBF(3)
    linear.update(xs)
    rbf.update(xs)
    assert linear.reasons.keys() == {1}
    assert linear.reasons[1].startswith("constant over the images")
    assert rbf.reasons.keys() == {1, 2}
    assert "the kernel has no width" in rbf.reasons[2]
    assert rbf.compute().value[2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_not_finite_are_refused_by_layer(kind):
    xs = layers()
    xs[1][4, 2] = torch.inf
    with pytest.raises(MeasureError, match="layer 1 holds NaN or infinite features"):
        in_one_block(kind, xs)


def squared_distance(x):
    return torch.from_numpy(cdist(x, x, "sqeuclidean"))


def test_rbf_bandwidths_are_those_of_the_first_block():
    xs = layers()
    measure = CKARBF(3)
    for part in blocks(xs, [40, 30]):
        measure.update(part)
    parts = [[], []]
    for index, (x, block) in enumerate(zip(xs, blocks(xs, [40, 30])[0], strict=True)):
        variance = np.median(squared_distance(block))
        assert measure.variances[index] == pytest.approx(variance, rel=1e-12)
        for which, part in zip(parts, x.split([40, 30]), strict=True):
            which.append(torch.exp(-squared_distance(part) / (2 * variance)))
    expected = CKA(3)
    for grams in parts:
        expected.update_grams(torch.stack(grams))
    torch.testing.assert_close(measure.products, expected.products)
    torch.testing.assert_close(
        measure.compute().standard_error, expected.compute().standard_error, equal_nan=True
    )


def test_rbf_merges_parts_of_the_same_bandwidths_only():
    first, second = blocks(layers(), [40, 30])
    whole, left = CKARBF(3), CKARBF(3)
    left.update(first)
    for start, part in zip((0, 40), (first, second), strict=True):
        whole.update(part, start)
    right = CKARBF(3, variances=left.variances)
    right.update(second, 40)
    left.merge(right)
    torch.testing.assert_close(left.permuted, whole.permuted, rtol=1e-12, atol=0)
    assert torch.equal(left.compute().value, whole.compute().value)
    empty = CKARBF(3)
    empty.merge(left)
    assert torch.equal(empty.variances, whole.variances)
    other = CKARBF(3)
    other.update(second)
    with pytest.raises(MeasureError, match="RBF CKA sums of other bandwidths cannot be merged"):
        whole.merge(other)
    whole.merge(CKARBF(3))
    assert whole.images == 70


def test_undefined_merges_are_refused():
    for ours, theirs in ((CKA(2), CKA(3)), (CKA(2), CKARBF(2)), (CKARBF(2), CKA(2))):
        with pytest.raises(MeasureError, match="same kernel, layers and estimator"):
            ours.merge(theirs)


def test_two_images_have_no_biased_cka():
    with pytest.raises(MeasureError, match="biased CKA needs at least 3 images"):
        cka(np.eye(2), np.eye(2), estimator="biased")


def streamed_rbf(xs, estimator, variances):
    measure = CKARBF(2, estimator, torch.tensor(variances, dtype=torch.float64))
    measure.update(xs)
    return float(measure.compute().value[0, 1])


def reference_values(x, y):
    """Every CKA, HSIC and RBF value that the reference names, by its name there."""
    xs = [torch.from_numpy(side.astype(np.float64)) for side in (x, y)]
    n = len(xs[0])
    found = {}
    for estimator, word, divisor in (
        ("unbiased", "debiased", n * (n - 3)),
        ("biased", "biased", n),
    ):
        found[f"linear_cka_{word}"] = cka(*xs, estimator=estimator)
        hsic = streamed([xs], estimator).products / divisor
        for name, pair in (("xx", (0, 0)), ("xy", (0, 1)), ("yy", (1, 1))):
            found[f"hsic_{estimator}_{name}"] = float(hsic[pair])
        for t in (0.5, 1.0):
            name = f"rbf_cka_{word}_allmedian_t{t}"
            found[name] = cka(*xs, kernel="rbf", estimator=estimator, bandwidth=t)
            medians = [t**2 * float(np.median(squared_distance(side))) for side in xs]
            assert streamed_rbf(xs, estimator, medians) == pytest.approx(found[name], abs=1e-12)
            # The other convention is a bandwidth of its own: distances of different images.
            medians = [(t * float(np.median(pdist(side)))) ** 2 for side in xs]
            name = f"rbf_cka_{word}_offdiagmedian_t{t}"
            found[name] = streamed_rbf(xs, estimator, medians)
    if n % 16 == 0:
        value = streamed(blocks(xs, 16)).compute().value[0, 1]
        found["linear_cka_minibatch16"] = float(value)
    return found


def assert_reference(x, y, expected, key=""):
    found = reference_values(x, y)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9, rel=1e-9), (key, name)
    return len(expected)


def test_golden_values(golden):
    expected = json.loads(GOLDEN.read_text())
    x, y = (golden["arrays"][key] for key in "xy")
    assert assert_reference(x, y, expected) == 15


def test_golden_layers(golden):
    names = sorted(key for key in golden["arrays"] if key.startswith(("m1_", "m2_")))
    xs = [torch.from_numpy(golden["arrays"][name]).double() for name in names]
    rows = [i for i, name in enumerate(names) if name.startswith("m1_")]
    columns = [i for i, name in enumerate(names) if name.startswith("m2_")]

    def value(sizes):
        return streamed(blocks(xs, sizes)).compute().value[rows][:, columns].numpy()

    expected = {key: np.array(item) for key, item in golden["layers"].items()}
    assert np.allclose(value([16] * 6), expected["minibatch16_first96"], atol=1e-9)
    assert np.allclose(value([96]), expected["fullbatch_debiased_first96"], atol=1e-9)
    decoy = expected["decoy_mean_of_batch_ratios_first96"]
    assert np.abs(value([16] * 6) - decoy).max() > 1e-3


VIEWS = {
    "flatten_all": lambda x: x.reshape(len(x), -1),
    "flatten_patch": lambda x: x[:, 1:].reshape(len(x), -1),
    "cls": lambda x: x[:, 0],
    "mean_patch": lambda x: x[:, 1:].mean(1),
    "mean_all": lambda x: x.mean(1),
    "tokens_as_samples": lambda x: x.reshape(-1, x.shape[-1]),
}


@pytest.mark.slow
def test_all_reference_pairs(shared):
    folder = shared / "reference"
    expected = json.loads((folder / "similarity_expected.json").read_text())["pairs"]
    checked = 0
    with np.load(folder / "similarity_pairs.npz") as arrays:
        for key, values in expected.items():
            base, _, view = key.partition("/")
            x, y = (arrays[f"{base}__{side}"].astype(np.float64) for side in "XY")
            if view:
                x, y = VIEWS[view](x), VIEWS[view](y)
            ours = {
                name: entry["value"]
                for name, entry in values.items()
                if name.startswith(("linear_cka", "hsic", "rbf_cka"))
            }
            checked += assert_reference(x, y, ours, key)
    assert checked == 135


def test_features_that_require_gradients_are_taken():
    x = torch.randn(2, 16, 8)
    with_gradients, without = CKA(2), CKA(2)
    with_gradients.update(list(x.clone().requires_grad_()))
    without.update(list(x))
    assert torch.equal(with_gradients.permuted, without.permuted)
