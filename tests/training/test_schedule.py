"""Values of the learning-rate schedule known in closed form."""

from __future__ import annotations

import pytest

from vitprobe.training.schedule import warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 1.0), (10, 2.0), (10 + 45, 1.0), (10 + 30, 1.5), (10 + 60, 0.5), (100, 0.0)],
)
def test_linear_warmup_then_half_a_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(step, steps=100, warmup=10, peak=2.0) == pytest.approx(expected, abs=1e-12)


def test_floor_and_no_warmup() -> None:
    assert warmup_cosine(0, steps=10, warmup=0, peak=1.0, floor=0.2) == pytest.approx(1.0)
    assert warmup_cosine(5, steps=10, warmup=0, peak=1.0, floor=0.2) == pytest.approx(0.6)
    assert warmup_cosine(10, steps=10, warmup=0, peak=1.0, floor=0.2) == pytest.approx(0.2)
