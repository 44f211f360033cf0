"""How much of a layer's variance lies along one direction: what to read beside its CKA."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.gram import h_center


def first_direction(gram: Tensor) -> Tensor:
    """What each image adds to the leading eigenvalue and to the trace of centred Grams.

    Args:
        gram: (..., n, n).

    Returns:
        (..., n, 2) float64: the image's squared coordinate along the first principal direction, and
        its squared norm. The ratio of their sums is the first-direction share.
    """
    k = h_center(gram)
    values, vectors = torch.linalg.eigh(k)
    along = values[..., -1, None] * vectors[..., -1].square()
    return torch.stack([along, k.diagonal(dim1=-2, dim2=-1)], dim=-1)


class FirstDirectionShare(Measure):
    """Share of a layer's variance along its first principal direction, averaged over blocks.

    A few massive dimensions can own a CKA; this share says so.

    The state: `sums` (layers, 2) over images of `first_direction`, and `squares` (layers, 2, 2) of
    their products, from which the standard error follows: to first order an image adds to the
    share what its squared coordinate exceeds the share of its squared norm by.
    """

    info = Info(
        name="first_direction_share",
        title="First-direction share",
        unit="share",
        range="0 to 1",
        direction="higher: one direction dominates the layer, and so its CKA",
        what=(
            "The share of a layer's variance over images that lies along its first principal "
            "direction; when it is large, CKA mostly compares that one direction."
        ),
        formula="largest eigenvalue / trace of the centred Gram, block sums of both",
        source="Ding et al. 2021 and Nguyen et al. 2022 on dominant directions in CKA",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="blocked",
        group="tokens",
        interval=(
            "Student's t with images / 7 degrees of freedom around the value, over draws of the "
            "images, from the influence function of the ratio; of the share in blocks of this "
            "size. None below 7 images."
        ),
        null=(
            "Features alike in all directions: up to (1 + sqrt(m / M))^2 / m, m the smaller and M "
            "the larger of images in a block - 1 and dimensions (Marchenko & Pastur 1967)."
        ),
        caveats=(
            "Biased upwards where a block has fewer images than the layer has dimensions, so "
            "compare it only between runs of the same block size. Where no direction leads the "
            "others, the interval is wider than it need be."
        ),
        elsewhere=(
            "Nguyen et al. 2022 take the first principal component over all images at once; the "
            "usual CKA packages do not report it."
        ),
        bounds=(0.0, 1.0),
    )

    def __init__(self, layers: int) -> None:
        self.images = 0
        self.sums = torch.zeros(layers, 2, dtype=torch.float64)
        self.squares = torch.zeros(layers, 2, 2, dtype=torch.float64)

    def update_grams(self, grams: Tensor) -> None:
        """Add one block given its Gram matrices (layers, n, n)."""
        parts = first_direction(grams.cpu())
        self.sums += parts.sum(1)
        self.squares += parts.mT @ parts
        self.images += grams.shape[-1]

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers.

        Raises:
            MeasureError: a different number of layers.
        """
        if other.sums.shape != self.sums.shape:
            raise MeasureError("only first-direction sums of the same layers can be merged")
        self.sums = self.sums + other.sums
        self.squares = self.squares + other.squares
        self.images += other.images

    @property
    def degrees(self) -> float:
        """Of freedom of Student's t in intervals, as for `CKA`."""
        return self.images / 7

    def compute(self) -> Tensor:
        """(layers,) float64; nan for a layer that is constant over the images."""
        return self.sums[:, 0] / self._trace()

    def standard_error(self) -> Tensor:
        """(layers,) float64; nan for a layer that is constant over the images."""
        share = self.compute()
        weights = torch.stack([torch.ones_like(share), -share], dim=-1)[:, None]
        squared = (weights @ self.squares @ weights.mT).flatten()
        return squared.clamp_min(0).sqrt() / self._trace()

    def _trace(self) -> Tensor:
        return torch.where(self.sums[:, 1] > 0, self.sums[:, 1], torch.nan)
