"""Fixtures shared by all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors, real images and weights, where they lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("there is no folder ../shared with reference data")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Expected values that independent implementations agree on, with their inputs."""
    with np.load(HERE / "golden" / "golden.npz") as arrays:
        return {**json.loads((HERE / "golden" / "golden.json").read_text()), "arrays": dict(arrays)}
