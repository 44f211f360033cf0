from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures import CKA, FirstDirectionShare, cka
from vitprobe.measures.cka import centered_gram, u_center


def features(n=40, p=17, q=23, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x[:, :5] @ rng.normal(size=(5, q)) + rng.normal(size=(n, q))


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
        (np.eye(5), np.full((5, 2), np.nan), {}, "y holds NaN or infinite features"),
        (np.ones(5), np.eye(5), {}, r"x has shape \(5,\)"),
        (np.eye(5), np.eye(5), {"kernel": "cosine"}, "unknown CKA kernel 'cosine'"),
        (np.eye(5), np.eye(5), {"estimator": "mle"}, "unknown CKA estimator 'mle'"),
        ("abc", np.eye(5), {}, "expected a torch tensor or numpy array of real numbers, got str"),
        (np.repeat([[0.0], [1.0]], [9, 1], 0), np.eye(10), {"kernel": "rbf"}, "bandwidth is zero"),
    ],
)
def test_refusals(x, y, options, message):
    with pytest.raises(MeasureError, match=message):
        cka(x, y, **options)


def layers(n=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 9, generator=generator, dtype=torch.float64)
    widths = (6, 11, 4)
    return [
        base @ torch.randn(9, w, generator=generator, dtype=torch.float64)
        + torch.randn(n, w, generator=generator, dtype=torch.float64)
        for w in widths
    ]


def streamed(parts, estimator="unbiased"):
    measure = CKA(len(parts[0]), estimator)
    for part in parts:
        measure.update(part)
    return measure


def blocks(xs, sizes):
    return [list(part) for part in zip(*(x.split(sizes) for x in xs), strict=True)]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_one_block_is_the_full_batch(estimator):
    xs = layers()
    value = streamed([xs], estimator).compute().value
    for i, x in enumerate(xs):
        assert value[i, i] == 1
        for j, y in enumerate(xs):
            assert value[i, j] == pytest.approx(cka(x, y, estimator=estimator), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 4), seed=st.integers(0, 50))
def test_merging_any_split_gives_the_same_sums(cut, seed):
    parts = blocks(layers(seed=seed), [14] * 5)
    whole = streamed(parts)
    left, right = streamed(parts[:cut]), streamed(parts[cut:])
    left.merge(right)
    for name in ("products", "squares", "cross", "selves"):
        torch.testing.assert_close(getattr(left, name), getattr(whole, name), rtol=1e-13, atol=0)
    assert (left.images, left.blocks) == (whole.images, whole.blocks) == (70, 5)


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


def test_standard_error_is_the_root_mean_square_influence():
    xs = layers()
    result = streamed([xs]).compute()
    n = len(xs[0])
    centred = [u_center(x @ x.T).numpy() for x in xs]
    for i in range(3):
        for j in range(3):
            g = {
                key: (centred[key[0]] * centred[key[1]]).sum(1) / (n - 3)
                for key in ((i, j), (i, i), (j, j))
            }
            h = {key: value.mean() for key, value in g.items()}
            value = h[i, j] / np.sqrt(h[i, i] * h[j, j])
            psi = value * (2 * g[i, j] / h[i, j] - g[i, i] / h[i, i] - g[j, j] / h[j, j])
            if i == j:
                assert np.allclose(psi, 0)
                assert result.standard_error[i, j].isnan()
            else:
                expected = np.sqrt(np.mean(psi**2) / n)
                assert result.standard_error[i, j] == pytest.approx(expected, rel=1e-9)


def test_standard_error_is_the_spread_over_repeated_draws():
    values, errors = [], []
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    for _ in range(200):
        x = torch.randn(120, 6, generator=generator, dtype=torch.float64)
        y = x @ mixing + 2 * torch.randn(120, 8, generator=generator, dtype=torch.float64)
        value, error = streamed(blocks([x, y], [60, 60])).compute()
        values.append(float(value[0, 1]))
        errors.append(float(error[0, 1]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_a_constant_layer_is_undefined_and_leaves_the_others_alone():
    xs = layers()
    constant = torch.full((70, 5), 1 / 3, dtype=torch.float32) * torch.rand(5)
    value = streamed([[*xs, constant]]).compute().value
    assert value[3].isnan().all()
    torch.testing.assert_close(value[:3, :3], streamed([xs]).compute().value, rtol=1e-12, atol=0)


def test_undefined_merges_are_refused():
    with pytest.raises(MeasureError, match="same layers and estimator"):
        CKA(2).merge(CKA(3))


def test_golden_values(golden):
    x, y = (golden["arrays"][key].astype(np.float64) for key in "xy")
    expected = golden["cka"]
    assert cka(x, y) == pytest.approx(expected["linear_cka_debiased"], abs=1e-9)
    assert cka(x, y, estimator="biased") == pytest.approx(expected["linear_cka_biased"], abs=1e-9)
    assert cka(x, y, kernel="rbf", estimator="biased") == pytest.approx(
        expected["rbf_cka_biased_allmedian_t1.0"], abs=1e-9
    )
    assert cka(x, y, kernel="rbf", bandwidth=0.5) == pytest.approx(
        expected["rbf_cka_debiased_allmedian_t0.5"], abs=1e-9
    )


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
            for estimator, word in (("biased", "biased"), ("unbiased", "debiased")):
                found = {f"linear_cka_{word}": cka(x, y, estimator=estimator)}
                for t in (0.5, 1.0):
                    found[f"rbf_cka_{word}_allmedian_t{t}"] = cka(
                        x, y, kernel="rbf", estimator=estimator, bandwidth=t
                    )
                for name, value in found.items():
                    if name in values:
                        assert value == pytest.approx(values[name]["value"], abs=1e-9), (key, name)
                        checked += 1
            if "linear_cka_minibatch16" in values:
                parts = blocks([torch.from_numpy(x), torch.from_numpy(y)], 16)
                value = float(streamed(parts).compute().value[0, 1])
                assert value == pytest.approx(values["linear_cka_minibatch16"]["value"], abs=1e-9)
                checked += 1
    assert checked > 40


def test_first_direction_share():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(50, 1, generator=generator) @ torch.randn(1, 8, generator=generator)
    flat = torch.linalg.qr(torch.randn(50, 50, generator=generator))[0]
    measure = FirstDirectionShare(3)
    measure.update_grams(torch.stack([centered_gram(x) for x in (line, flat, torch.ones(50, 2))]))
    share = measure.compute()
    assert share[0] == pytest.approx(1, abs=1e-5)
    assert share[1] == pytest.approx(1 / 49, rel=1e-3)
    assert share[2].isnan()
    other = FirstDirectionShare(3)
    other.merge(measure)
    assert torch.equal(other.sums, measure.sums)
