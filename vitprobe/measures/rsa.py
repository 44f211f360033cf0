"""Representational similarity analysis (RSA): whether layers agree on how far apart images are.

Sources: Kriegeskorte et al. 2008, Nili et al. 2014.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array
from vitprobe.measures.base import Info
from vitprobe.measures.points import TIE, Points
from vitprobe.measures.subset import FEW, INTERVAL, NULL, OfPairs, compared, inner

Distance = Literal["correlation", "euclidean", "sqeuclidean"]
Correlation = Literal["spearman", "pearson"]


def rsa(
    x: Array,
    y: Array,
    *,
    distance: Distance = "correlation",
    correlation: Correlation = "spearman",
) -> float:
    """Representational similarity analysis: correlation of the distances between images.

    The n(n - 1)/2 distances between pairs of images on either side are correlated
    (Kriegeskorte et al. 2008).

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q); p and q may differ.
        distance: `correlation` (1 less the Pearson correlation of two images over the features,
            which are not centred over images), `euclidean`, or its square `sqeuclidean`.
        correlation: `spearman` (ties, as from duplicated images, share their mean rank) or
            `pearson`.

    Returns:
        Between -1 and 1.

    Raises:
        MeasureError: fewer than 4 images, different numbers of them, non-finite or constant
            features, images that are all equally far apart; for the correlation distance, an image
            with the same value in every feature.
    """
    if distance not in get_args(Distance):
        raise MeasureError(
            f"unknown distance '{distance}': use one of {', '.join(get_args(Distance))}"
        )
    if correlation not in get_args(Correlation):
        raise MeasureError(f"unknown correlation '{correlation}': use 'spearman' or 'pearson'")
    return compared(
        x, y, lambda points: _standardized_distances(points, distance, correlation), inner
    )


def _standardized_distances(points: Points, distance: Distance, correlation: Correlation) -> Tensor:
    """(n, n) symmetric with zero diagonal: the inner product of two is their correlation."""
    n = len(points)
    pairs = torch.triu_indices(n, n, 1)
    values = _distances(points, distance)[*pairs]
    if values.max() - values.min() <= TIE * values.max():
        raise MeasureError("has all images equally far apart")
    if correlation == "spearman":
        values = _average_ranks(values)
    values = values - values.mean()
    values /= torch.linalg.vector_norm(values) * 2**0.5
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[*pairs] = values
    return matrix + matrix.T


def _distances(points: Points, distance: Distance) -> Tensor:
    """(n, n) distances between the images, the representational dissimilarity matrix."""
    points.refuse_constant()
    if distance != "correlation":
        # Differences first: duplicated images are at distance 0, not at the root of a rounding.
        found = torch.cdist(
            points.centered, points.centered, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return found.square() if distance == "sqeuclidean" else found
    rows, ones = points.rows, points.ones
    centered = rows - (rows @ ones / (ones @ ones))[:, None] * ones
    norms = torch.linalg.vector_norm(centered, dim=1)
    same = norms <= 4 * points.epsilon * torch.linalg.vector_norm(rows, dim=1)
    if same.any():
        raise MeasureError(
            f"has the same value in every feature of image {int(same.nonzero()[0])}, "
            "so that its correlation with other images is not defined"
        )
    unit = centered / norms[:, None]
    return 1 - unit @ unit.T


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1; values that are tied within rounding share the mean of their ranks."""
    ordered, order = values.sort()
    starts = ordered.diff() > TIE * ordered.abs().max()
    groups = torch.cat([torch.zeros(1, dtype=torch.long), starts.cumsum(0)])
    counts = torch.bincount(groups).double()
    means = counts.cumsum(0) - (counts - 1) / 2
    ranks = torch.empty_like(values)
    ranks[order] = means[groups]
    return ranks


_RSA_ELSEWHERE = (
    "ReSi correlates similarities instead of distances, which gives the same number, and calls the "
    "measure invariant to translation, which holds only for the same constant added to every "
    "feature; rsatoolbox offers many more distances and comparisons under the same name, "
    "cross-validated and whitened ones among them."
)
_RSA_CAVEATS = (
    "Each image is centred over its own features, so rotations and shifts of a layer change the "
    "value, and a few massive features dominate the distances. The n(n - 1)/2 distances are far "
    "from independent: tests that take them for a sample are wrong." + FEW
)


class RSASpearman(OfPairs):
    """Streaming `rsa` with Spearman correlation."""

    info = Info(
        name="rsa_spearman",
        title="RSA (Spearman)",
        unit="",
        range="-1 to 1",
        direction="higher: the two layers rank the distances between images more alike",
        what=(
            "RSA asks whether pairs of images that are far apart in one layer are far apart in the "
            "other; this variant compares the ranks of the distances."
        ),
        formula=(
            "Spearman correlation of the n(n - 1)/2 distances 1 - r_ij, r_ij the Pearson "
            "correlation of images i and j over the features; ties share their mean rank"
        ),
        source="Kriegeskorte et al. 2008; Nili et al. 2014",
        invariances=("isotropic scaling", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL,
        null=NULL.format("0 for independent layers"),
        caveats=_RSA_CAVEATS,
        elsewhere=_RSA_ELSEWHERE,
        bounds=(-1, 1),
    )

    @classmethod
    def side(cls, points: Points) -> Tensor:
        return _standardized_distances(points, "correlation", "spearman")

    between = staticmethod(inner)


class RSAPearson(OfPairs):
    """Streaming `rsa` with Pearson correlation."""

    info = Info(
        name="rsa_pearson",
        title="RSA (Pearson)",
        unit="",
        range="-1 to 1",
        direction="higher: distances between images in the two layers are closer to linear",
        what=(
            "RSA asks whether pairs of images that are far apart in one layer are far apart in the "
            "other; this variant compares the distances themselves."
        ),
        formula=(
            "Pearson correlation of the n(n - 1)/2 distances 1 - r_ij, r_ij the Pearson "
            "correlation of images i and j over the features"
        ),
        source="Kriegeskorte et al. 2008",
        invariances=("isotropic scaling", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL,
        null=NULL.format("0 for independent layers"),
        caveats=_RSA_CAVEATS + " A few far-away images can own a Pearson correlation.",
        elsewhere=_RSA_ELSEWHERE,
        bounds=(-1, 1),
    )

    @classmethod
    def side(cls, points: Points) -> Tensor:
        return _standardized_distances(points, "correlation", "pearson")

    between = staticmethod(inner)
