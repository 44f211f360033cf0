"""Canonical correlations of two layers: SVCCA and PWCCA.

Sources: Raghu et al. 2017 (SVCCA), Morcos et al. 2018 (PWCCA), Björck & Golub 1973.

Layers are centred over the images first. Singular values below four roundings of the features *as
given* (`Points.rounding`) are no directions: the output of a layer norm spans one direction fewer
than it has features, and single precision fills the missing one with noise that CCA would weigh
like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, Array, like
from vitprobe.measures.base import Info
from vitprobe.measures.points import Points
from vitprobe.measures.subset import FEW, INTERVAL, NULL, TOO_WIDE, OfRows, SubsetMeasure, compared


def canonical_correlations(x: A, y: Array) -> A:
    """Canonical correlations of two representations of the same n images, in descending order.

    Cosines of the principal angles between the spans of the centred features (Björck & Golub 1973).

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q).

    Returns:
        (min of the two ranks,) float64, between 0 and 1.

    Raises:
        MeasureError: fewer than 4 images, different numbers of them, non-finite or constant
            features, or so many features that correlations of 1 are certain (ranks that sum to n or
            more).
    """
    return like(compared(x, y, _principal, _canonical), x)


def svcca(x: Array, y: Array, *, variance: float = 0.99) -> float:
    """Singular vector CCA: mean canonical correlation of the leading principal directions.

    Each side is reduced to the fewest principal directions that hold the share `variance` of its
    variance; the mean is over the smaller number of directions (Raghu et al. 2017).

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q).
        variance: share of variance to keep, above 0 and at most 1.

    Returns:
        Between 0 and 1.

    Raises:
        MeasureError: as `canonical_correlations`, counting the directions that are kept; or a
            share out of range.
    """
    if not 0 < variance <= 1:
        raise MeasureError(f"a share {variance} of variance cannot be kept: give 0 < variance <= 1")
    return compared(x, y, lambda points: _principal(points, variance), _mean_canonical)


def _mean_canonical(a: Tensor, b: Tensor) -> float:
    return float(_canonical(a, b).mean())


def pwcca(x: Array, y: Array) -> float:
    """Projection-weighted CCA, symmetrised.

    The mean of the canonical correlations rho_i with weights sum_j |<h_i, x_j>|, where h_i is the
    i-th canonical variate of x at unit length and x_j its j-th centred feature (Morcos et al. 2018,
    section 3), averaged with the same mean weighted by y.

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q).

    Returns:
        Between 0 and 1.

    Raises:
        MeasureError: as `canonical_correlations`; or as many features as images on one side.
    """
    return compared(x, y, _variates, _projection_weighted)


def _principal(points: Points, variance: float = 1.0) -> Tensor:
    """Orthonormal (n, k): the fewest principal directions that hold this share of variance."""
    left, singular = points.directions
    share = singular.square().cumsum(0) / singular.square().sum()
    return left[:, : int((share < variance).sum()) + 1]


def _canonical(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the angles between the spans of two orthonormal bases (n, k) and (n, m)."""
    _enough_images(a, b)
    return torch.linalg.svdvals(a.T @ b).clamp_max(1)


def _enough_images(a: Tensor, b: Tensor) -> None:
    n, k = a.shape
    if k + b.shape[1] >= n:
        raise MeasureError(
            f"is compared over too few images: the two layers span {k} and {b.shape[1]} "
            f"directions, which together are not fewer than the {n} images, so that canonical "
            "correlations of 1 are certain whatever the features; give more images or fewer "
            "features (such as the mean of the patches)"
        )


class _Variates(NamedTuple):
    basis: Tensor  # (n, rank), orthonormal
    features: Tensor  # (n, p), centred


def _variates(points: Points) -> _Variates:
    points.refuse_constant()
    if points.width >= len(points):
        raise MeasureError(
            f"has {points.width} features, which PWCCA weighs one by one and which must be fewer "
            f"than the {len(points)} images; give more images or fewer features (such as the mean "
            "of the patches)"
        )
    return _Variates(points.directions[0], points.normalized)


def _projection_weighted(a: _Variates, b: _Variates) -> float:
    _enough_images(a.basis, b.basis)
    left, correlations, right = torch.linalg.svd(a.basis.T @ b.basis, full_matrices=False)
    total = 0.0
    for side, rotation in ((a, left), (b, right.T)):
        weights = ((side.basis @ rotation).T @ side.features).abs().sum(1)
        total += float(weights @ correlations.clamp_max(1) / weights.sum())
    return total / 2


class SVCCA(OfRows):
    """Streaming `svcca` at 99 % of variance."""

    info = Info(
        name="svcca",
        title="SVCCA",
        unit="",
        range="0 to 1",
        direction="higher: the leading directions of the two layers span more alike spaces",
        what=(
            "SVCCA keeps the directions that hold 99 % of each layer's variance and says how well, "
            "on average, they can be matched by linear combinations."
        ),
        formula=(
            "mean canonical correlation of the fewest principal directions with 99 % of variance, "
            "over the smaller number of them"
        ),
        source="Raghu et al. 2017",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL + TOO_WIDE,
        null=NULL.format("well above 0 for independent layers, and more so the more are kept"),
        caveats=(
            "Directions with 1 % of the variance count as much as the first. Chance correlations "
            "grow with directions per image; once both layers' directions together are not fewer "
            "than the images the value is not defined, which patch tokens of few images soon "
            "reach: use pooled tokens or more images." + FEW
        ),
        elsewhere=(
            "anatome cuts at 99 % of the sum of singular values, not of their squares, and so "
            "keeps more directions, and reports 1 less the value; platonic-rep takes 10 directions "
            "of standardised features; google/svcca, on which ReSi builds, leaves trailing "
            "correlations out of its mean."
        ),
        bounds=(0, 1),
    )

    @classmethod
    def side(cls, points: Points) -> Tensor:
        return _principal(points, 0.99)

    between = staticmethod(_mean_canonical)


class PWCCA(SubsetMeasure):
    """Streaming `pwcca`."""

    info = Info(
        name="pwcca",
        title="PWCCA",
        unit="",
        range="0 to 1",
        direction="higher: what one layer's features express, the other expresses too",
        what=(
            "PWCCA is the mean canonical correlation of two layers in which a direction counts by "
            "how much of the layer's own features it accounts for."
        ),
        formula=(
            "sum_i w_i rho_i / sum_i w_i, w_i = sum_j |<h_i, x_j>|, h_i the i-th canonical variate "
            "and x_j the j-th centred feature; mean of the values weighted by either layer"
        ),
        source="Morcos et al. 2018 (section 3)",
        invariances=("isotropic scaling", "shift", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL + TOO_WIDE,
        null=NULL.format("well above 0 for independent layers, and more so the wider they are"),
        caveats=(
            "The weights belong to single features, so a rotation of a layer changes the value. "
            "Not defined unless the features of both layers together are fewer than the images: "
            "it asks for pooled tokens and several images a feature." + FEW
        ),
        elsewhere=(
            "google/svcca weighs by one layer alone, the one with fewer features, and adds the "
            "mean back to the variates before weighing; anatome weighs by the first layer and "
            "reports 1 less the value. Neither is symmetric."
        ),
        bounds=(0, 1),
    )

    side = staticmethod(_variates)
    between = staticmethod(_projection_weighted)

    @classmethod
    def reorder(cls, side: _Variates, order: Tensor) -> _Variates:
        return _Variates(side.basis[order], side.features[order])
