"""Procrustes and linear regression between layers; the list of all measures on a subset of images.

Sources: Ding et al. 2021 (orthogonal Procrustes), Kornblith et al. 2019 (linear regression).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array
from vitprobe.measures.base import Info
from vitprobe.measures.canonical import PWCCA, SVCCA
from vitprobe.measures.neighbours import MutualKNN
from vitprobe.measures.points import Points
from vitprobe.measures.rsa import RSAPearson, RSASpearman
from vitprobe.measures.subset import (
    FEW,
    INTERVAL,
    NULL,
    OfRows,
    SubsetMeasure,
    compared,
    inner,
)


def procrustes(x: Array, y: Array) -> float:
    """Orthogonal Procrustes similarity: nuclear norm of X'Y, both centred and of Frobenius norm 1.

    With s the similarity, the distance after the best rotation is sqrt(2 - 2 s) (its square is the
    distance of Ding et al. 2021) and the angular distance is arccos(s).

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q); p and q may differ.

    Returns:
        Between 0 and 1.

    Raises:
        MeasureError: fewer than 4 images, different numbers of them, non-finite or constant
            features.
    """
    return compared(x, y, lambda points: points.normalized, _nuclear)


def linear_regression(x: Array, y: Array) -> float:
    """R² of predicting x linearly from y, over all features of x together.

    |Q' X|_F² / |X|_F², with Q an orthonormal basis of the centred features of y (Kornblith et al.
    2019, table 1). Not symmetric: y may hold more than x. In the sample and not cross-validated, so
    that independent features give rank(y)/(n - 1) on average.

    Args:
        x: what is predicted: (n, ...), torch or numpy, flattened to (n, p).
        y: what predicts: (n, ...), flattened to (n, q).

    Returns:
        Between 0 and 1.

    Raises:
        MeasureError: fewer than 4 images, different numbers of them, non-finite or constant
            features, or a y that spans n - 1 directions and predicts anything.
    """
    return compared(x, y, _regression, _explained)


def _nuclear(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.svdvals(a.T @ b).sum().clamp_max(1))


class _Regression(NamedTuple):
    gram: Tensor  # (n, n), of the centred features as predicted, with trace 1
    projection: Tensor  # (n, n), onto their span as predictors
    rank: int


def _regression(points: Points) -> _Regression:
    basis, x = points.directions[0], points.normalized
    return _Regression(x @ x.T, basis @ basis.T, basis.shape[1])


def _explained(a: _Regression, b: _Regression) -> float:
    n = len(b.projection)
    if b.rank >= n - 1:
        raise MeasureError(
            f"is compared over too few images: the predicting layer spans {b.rank} directions, all "
            f"that {n} centred images have, so that R² is 1 whatever the features; give more "
            "images or fewer features (such as the mean of the patches)"
        )
    return inner(a.gram, b.projection)


class Procrustes(OfRows):
    """Streaming `procrustes`."""

    info = Info(
        name="procrustes",
        title="Procrustes similarity",
        unit="",
        range="0 to 1",
        direction="higher: the two layers arrange the images more alike",
        what=(
            "Procrustes similarity says how well one layer's images can be rotated onto the "
            "other's: 1 when a rotation, shift and even scaling makes them coincide."
        ),
        formula="nuclear norm of X'Y, X and Y centred and of Frobenius norm 1",
        source="Ding et al. 2021; Schönemann 1966",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL,
        null=NULL.format("far above 0 for independent layers with many features an image"),
        caveats=(
            "Any two clouds of few points in many dimensions can be rotated close to each other: "
            "with more features than images independent layers can reach 0.8 or more. Read it "
            "against its floor." + FEW
        ),
        elsewhere=(
            "Ding et al. report the squared distance 2 - 2 s of this similarity s, anatome 1 - s, "
            "netrep the angle arccos(s), ReSi a distance."
        ),
        bounds=(0, 1),
    )

    @classmethod
    def side(cls, points: Points) -> Tensor:
        return points.normalized

    between = staticmethod(_nuclear)


class LinearRegression(SubsetMeasure):
    """Streaming `linear_regression`: the layer of the row is predicted from that of the column."""

    info = Info(
        name="linear_regression",
        title="Linear-regression R²",
        unit="share",
        range="0 to 1",
        direction="higher: more of the row's layer follows linearly from the column's",
        what=(
            "Linear-regression R² is the share of the variance of one layer (the row) that a "
            "linear map of another (the column) accounts for; it is not symmetric."
        ),
        formula="|Q'X|_F² / |X|_F², Q an orthonormal basis of the centred column layer",
        source="Kornblith et al. 2019 (table 1)",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL,
        null=NULL.format("rank/(n - 1) for a predictor independent of the row's layer"),
        caveats=(
            "In the sample, not cross-validated: with many features an image anything predicts "
            "anything, and once the predictor spans all n - 1 directions R² is 1 and not defined "
            "here. Any invertible linear map of the predicting layer, but not of the predicted "
            "one, leaves it as it is." + FEW
        ),
        elsewhere=(
            "ReSi inverts the predictor's Gram matrix, which fails without full rank. Encoding "
            "models of brains cross-validate and regularise, and give lower values."
        ),
        bounds=(0, 1),
    )
    symmetric = False

    side = staticmethod(_regression)
    between = staticmethod(_explained)

    @classmethod
    def reorder(cls, side: _Regression, order: Tensor) -> _Regression:
        return side._replace(projection=side.projection[order][:, order])


SUBSET_MEASURES: tuple[type[SubsetMeasure], ...] = (
    SVCCA,
    PWCCA,
    Procrustes,
    RSASpearman,
    RSAPearson,
    MutualKNN,
    LinearRegression,
)
