"""Results that figures are drawn from; every figure is closed behind its test."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from plots.synthetic import Subject, comparison


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def alike():
    return comparison({"MAE": Subject(depth=4), "DeiT": Subject(depth=4)})


@pytest.fixture(scope="module")
def unlike():
    """Another depth, grid and patch, and no class token."""
    return comparison(
        {"MAE": Subject(depth=4), "small": Subject(2, 2, grid=(7, 7), patch=4, prefix=0)}
    )
