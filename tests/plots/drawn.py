"""What tests read off a figure."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import FillBetweenPolyCollection, QuadMesh


def mesh_of(ax) -> QuadMesh:
    return next(child for child in ax.collections if isinstance(child, QuadMesh))


def assert_band(ax, table):
    """The first band of an axes has the ends of the interval as its edges."""
    band = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
    corners = band.get_paths()[0].vertices
    for layer, low, high in zip(*(table[k].values for k in ("layer", "low", "high")), strict=True):
        edges = corners[corners[:, 0] == layer, 1]
        np.testing.assert_allclose([edges.min(), edges.max()], [low, high])
