"""Mutual nearest neighbours: whether layers agree on which images are most alike.

Source: Huh et al. 2024 ("The Platonic Representation Hypothesis").
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array
from vitprobe.measures.base import Info
from vitprobe.measures.points import TIE, Points
from vitprobe.measures.subset import FEW, INTERVAL, NULL, TOO_WIDE, OfPairs, compared


def mutual_knn(x: Array, y: Array, *, neighbours: int = 10) -> float:
    """Mutual nearest neighbours: the share of an image's neighbours that both sides agree on.

    Neighbours are the images with the largest cosine of uncentred features, the image itself left
    out (Huh et al. 2024, appendix A). Images that tie for the last places share them evenly, and
    the shares that both sides give an image are counted as the smaller of the two: duplicated
    images then neither raise nor lower the value by the order in which they come.

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q); p and q may differ.
        neighbours: how many, k; n must be at least k + 2.

    Returns:
        Between 0 and 1; k/(n - 1) on average for independent features.

    Raises:
        MeasureError: too few images, different numbers of them, non-finite or constant features, or
            an image whose features are all zero.
    """
    return compared(x, y, lambda points: _neighbourhoods(points, neighbours), _overlap)


def _neighbourhoods(points: Points, neighbours: int) -> Tensor:
    """(n, n): row i says which images are neighbours of i, and sums to 1/n."""
    n = len(points)
    if not 1 <= neighbours <= n - 2:
        raise MeasureError(
            f"has {n} images, of which {neighbours} neighbours are no choice; give at least "
            f"{neighbours + 2} images or fewer neighbours"
        )
    points.refuse_constant()
    norms = torch.linalg.vector_norm(points.rows, dim=1)
    if not norms.all():
        raise MeasureError(
            f"has zeros alone as features of image {int((norms == 0).nonzero()[0])}, "
            "which has no direction"
        )
    unit = points.rows / norms[:, None]
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    last = cosines.topk(neighbours).values[:, -1:]
    nearer = (cosines > last + TIE).double()
    tied = ((cosines - last).abs() <= TIE).double()
    places = neighbours - nearer.sum(1, keepdim=True)
    return (nearer + tied * places / tied.sum(1, keepdim=True)) / (n * neighbours)


def _overlap(a: Tensor, b: Tensor) -> float:
    return float(torch.minimum(a, b).sum().clamp_max(1))


class MutualKNN(OfPairs):
    """Streaming `mutual_knn` of 10 neighbours."""

    info = Info(
        name="mutual_knn",
        title="Mutual nearest neighbours",
        unit="share",
        range="0 to 1",
        direction="higher: the two layers agree more on which images are most alike",
        what=(
            "Mutual nearest neighbours is the share of an image's 10 nearest images in one layer "
            "that are also among its 10 nearest in the other."
        ),
        formula=(
            "mean over images i of |N_x(i) & N_y(i)| / 10, neighbours by cosine of uncentred "
            "features; images tied for the last places share them evenly"
        ),
        source="Huh et al. 2024 (appendix A)",
        invariances=("orthogonal transformation", "isotropic scaling", "order of images"),
        streams="subset",
        group="similarity",
        interval=INTERVAL + TOO_WIDE,
        null=NULL.format("10/(n - 1) for independent layers of n images"),
        caveats=(
            "Local only: it does not see how classes lie to each other. The chance level falls "
            "with the number of images, and so does the value. A mean shared by all images makes "
            "all cosines near 1 and the neighbours subject to rounding. Duplicated images are "
            "each other's neighbours in every layer and raise it." + FEW
        ),
        elsewhere=(
            "platonic-rep clips the largest 5 % of features, normalises, takes the best pair of "
            "layers and breaks ties by memory order; ReSi's Jaccard similarity divides by the "
            "union of the neighbourhoods and gives lower values."
        ),
        bounds=(0, 1),
    )

    @classmethod
    def side(cls, points: Points) -> Tensor:
        return _neighbourhoods(points, 10)

    between = staticmethod(_overlap)
