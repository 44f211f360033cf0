from __future__ import annotations

import itertools

import pytest
import torch
from cka_for_tests import layers
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures.cka import cka
from vitprobe.measures.exact_cka import ExactCKA


def split_in(whole, make, order, seed):
    """Parts of the images, each of any size from 1, added up in any order."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm(len(whole[0]) - 1, generator=generator)[:3] + 1).sort().values
    parts = list(zip(*(x.tensor_split(cuts) for x in whole), strict=True))
    sums = []
    for index in order:
        sums.append(make())
        sums[-1].update(list(parts[index]))
    for other in sums[1:]:
        sums[0].merge(other)
    return sums[0]


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(4)),
    seed=st.integers(0, 99),
    estimator=st.sampled_from(["unbiased", "biased"]),
    mean=st.sampled_from([0.0, 1e4]),
)
def test_exact_cka_is_that_of_all_images_in_any_split_and_order(order, seed, estimator, mean):
    xs = [mean + x for x in layers(seed=seed)]
    measure = split_in(xs, lambda: ExactCKA([6, 11, 4], estimator), order, seed)
    value = measure.compute()
    for i, j in itertools.product(range(3), repeat=2):
        assert value[i, j] == pytest.approx(cka(xs[i], xs[j], estimator=estimator), abs=1e-10)
    torch.testing.assert_close(measure.compute(), value, rtol=1e-14, atol=0)


def test_exact_cka_goes_on_after_it_is_computed_or_merged_with_nothing():
    xs = [1e4 + x for x in layers()]
    measure = ExactCKA([6, 11, 4])
    measure.update([x[:20] for x in xs])
    measure.update([x[:0] for x in xs])
    measure.compute()
    measure.merge(ExactCKA([6, 11, 4]))
    measure.update([x[20:] for x in xs])
    first = ExactCKA([6, 11, 4])
    first.merge(measure)
    expected = cka(xs[0], xs[1])
    assert first.compute()[0, 1] == pytest.approx(expected, abs=1e-10)
    assert measure.images == first.images == 70


def test_exact_cka_refuses_what_does_not_fit_and_says_how_large_it_is():
    measure = ExactCKA([6, 11, 4])
    with pytest.raises(MeasureError, match="2 layers given to CKA sums of 3"):
        measure.update(layers()[:2])
    with pytest.raises(MeasureError, match=r"layer 0 has features of shape \(70, 11\): give \(70"):
        measure.update([layers()[1]] * 3)
    with pytest.raises(MeasureError, match="same widths and estimator"):
        measure.merge(ExactCKA([6, 4, 11]))
    held = sum(x.nbytes for x in vars(measure).values() if isinstance(x, torch.Tensor))
    assert ExactCKA.state_bytes([6, 11, 4]) == held
