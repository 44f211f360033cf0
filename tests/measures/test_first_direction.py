from __future__ import annotations

import numpy as np
import pytest
import torch

from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.gram import centered_gram


def test_first_direction_share_error_is_the_spread_over_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([2.0, 1, 1, 1, 1, 1])
    shares, errors = [], []
    for _ in range(200):
        measure = FirstDirectionShare(1)
        for _ in range(2):
            x = deviations * torch.randn(100, 6, generator=generator)
            measure.update_grams(centered_gram(x)[None])
        shares.append(float(measure.compute()))
        errors.append(float(measure.standard_error()))
    assert np.mean(shares) == pytest.approx(4 / 9, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)
    assert measure.degrees == pytest.approx(200 / 7)


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
    assert measure.standard_error()[2].isnan()
    other = FirstDirectionShare(3)
    other.merge(measure)
    other.merge(measure)
    torch.testing.assert_close(other.compute(), share, equal_nan=True)
    torch.testing.assert_close(
        other.standard_error() * 2**0.5, measure.standard_error(), equal_nan=True
    )
    assert other.images == 100
