"""Standard errors and floors of CKA."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cka_for_tests import blocks, features, in_one_block, layers, streamed

from vitprobe.measures.cka import CKA
from vitprobe.measures.gram import u_center


def permutations(n):
    return [torch.tensor(order) for order in itertools.permutations(range(n))]


@pytest.mark.parametrize("n", [4, 5, 6])
def test_permuted_products_have_mean_zero_and_a_known_variance(n):
    x, y = (torch.from_numpy(side) for side in features(n))
    a, b = u_center(x @ x.T), u_center(y @ y.T)
    found = torch.stack([(a * b[order][:, order]).sum() for order in permutations(n)])
    expected = 2 * a.square().sum() * b.square().sum() / (n * (n - 3))
    assert found.mean() == pytest.approx(0, abs=1e-9 * float(expected.sqrt()))
    assert found.square().mean() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("n", [4, 5])
def test_the_estimated_variance_of_a_product_is_unbiased_under_permutation(n):
    x, y = (torch.from_numpy(side) for side in features(n))
    estimates, products = [], []
    for order in permutations(n):
        measure = CKA(2)
        measure.update([x, y[order]])
        products.append(measure.products[0, 1])
        estimates.append(4 * (measure.squares - measure.pair_squares / 2)[0, 1])
    expected = float(torch.stack(products).square().mean())
    assert torch.stack(estimates).mean() == pytest.approx(expected, rel=1e-12)


def unrelated(n=70):
    """Layers of one direction each: near 0, where the first-order part is estimated negative."""
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(3, n, 1, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("xs", [layers(), unrelated()], ids=["related", "unrelated"])
@pytest.mark.parametrize("sizes", [[70], [40, 26, 4]])
def test_standard_error_is_that_of_the_influences_less_what_pairs_count_twice(sizes, xs):
    negative = 0
    result = streamed(blocks(xs, sizes)).compute()
    centred = [[u_center(x @ x.T).numpy() for x in part] for part in blocks(xs, sizes)]
    total = sum(np.einsum("anm,bnm->ab", np.stack(part), np.stack(part)) for part in centred)
    for i, j in itertools.permutations(range(3), 2):
        value = total[i, j] / np.sqrt(total[i, i] * total[j, j])
        from_images = from_pairs = 0.0
        for part in centred:
            n = len(part[0])
            phi = value * (
                2 * part[i] * part[j] / total[i, j]
                - part[i] ** 2 / total[i, i]
                - part[j] ** 2 / total[j, j]
            )
            from_images += (phi.sum(1) ** 2).sum() * (n - 2) / (n - 3)
            from_pairs += (phi**2).sum() * (n - 1) / (n - 3)
        expected = np.sqrt(max(from_images - from_pairs, 0) + from_pairs / 2)
        assert result.standard_error[i, j] == pytest.approx(expected, rel=1e-9)
        negative += from_images < from_pairs
    assert result.standard_error.diagonal().isnan().all()
    assert result.degrees == 10
    assert (negative > 0) == (xs[0].shape[1] == 1)


@pytest.mark.parametrize("dependence", [0, 1])
def test_standard_error_is_the_spread_over_repeated_draws(dependence):
    values, errors = [], []
    generator = torch.Generator().manual_seed(0)
    mixing = dependence * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    for _ in range(150):
        x = torch.randn(100, 20, generator=generator, dtype=torch.float64)
        y = x @ mixing + 2 * torch.randn(100, 20, generator=generator, dtype=torch.float64)
        result = streamed(blocks([x, y], [50, 50])).compute()
        values.append(float(result.value[0, 1]))
        errors.append(float(result.standard_error[0, 1]))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_floor_is_the_96th_of_100_permuted_values(estimator):
    xs = layers()
    measure = CKA(3, estimator)
    for first, part in zip((0, 30), blocks(xs, [30, 40]), strict=True):
        measure.update(part, first)
    generators = [torch.Generator().manual_seed(first) for first in (0, 30)]
    found = []
    for _ in range(50):
        orders = [torch.randperm(n, generator=g) for n, g in zip((30, 40), generators, strict=True)]
        for way in (orders, [order.argsort() for order in orders]):
            order = torch.cat([way[0], 30 + way[1]])
            shuffled = streamed(blocks([xs[0], xs[1][order]], [30, 40]), estimator)
            found.append(float(shuffled.compute().value[0, 1]))
    floor = measure.compute().floor
    assert floor[0, 1] == pytest.approx(sorted(found)[95], abs=1e-6)
    assert floor[0, 1] == floor[1, 0]


def test_floor_depends_on_the_blocks_and_not_on_their_order_or_scale():
    parts = list(zip((0, 30), blocks(layers(), [30, 40]), strict=True))

    def floor(parts, scale=1.0):
        measure = CKA(3)
        for first, part in parts:
            measure.update([scale * x for x in part], first)
        return measure.compute().floor

    expected = floor(parts)
    torch.testing.assert_close(floor(parts[::-1]), expected, rtol=1e-12, atol=0)
    for scale in (1e-30, 1e-4, 1e4, 1e30):
        torch.testing.assert_close(floor(parts, scale), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(floor(parts), expected, rtol=1e-6, atol=0)
    assert (floor([(7, part) for _, part in parts]) - expected).abs().max() > 1e-3


def test_independent_layers_exceed_their_floor_one_time_in_twenty():
    generator = torch.Generator().manual_seed(0)
    exceeded = []
    for _ in range(40):
        xs = [torch.randn(40, 6, generator=generator) for _ in range(10)]
        result = streamed([xs]).compute()
        exceeded += (result.value > result.floor)[*torch.triu_indices(10, 10, 1)].tolist()
    assert 0.03 < np.mean(exceeded) < 0.07


def test_uncertainty_of_the_exact_value_counts_all_pairs_of_images():
    xs = layers()
    value = in_one_block("exact", xs)
    whole = streamed([xs]).compute(value)
    assert torch.equal(whole.value, value)
    for exact, blocked in zip(whole[1:3], streamed([xs]).compute()[1:3], strict=True):
        torch.testing.assert_close(exact, blocked, equal_nan=True)
    parts = streamed(blocks(xs, [30, 40]))
    ratio = parts.compute(value).floor / parts.compute().floor
    share = (30 * 27 + 40 * 37) / (70 * 67)
    torch.testing.assert_close(ratio, torch.full_like(ratio, share**0.5))
    smaller = parts.compute(value).standard_error < parts.compute().standard_error
    assert smaller[~torch.eye(3, dtype=bool)].all()
    biased = streamed([xs], "biased")
    assert biased.compute(value).floor.isnan().all()
    assert not biased.compute().floor.isnan().any()
