"""The images of a layer as points, as measures that need all of them together take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import to_tensor

TIE = 1e-12
"""Distances and cosines this close, relative to the largest, are tied: float64 rounds them apart
where images are duplicated."""
_COLUMNS = 8192


@dataclass(frozen=True)
class Points:
    """n images as points of one layer: all that the measures need of its features.

    Up to n + 2 features are kept as they are. More are replaced by the exact coordinates of the
    images, of their mean and of the vector of ones in an orthonormal basis that these n + 2
    vectors span, so that all inner products stay what they were. The coordinates come from a QR
    decomposition, which does not square the condition number as a Gram matrix does.
    """

    centered: Tensor
    """(n, d) float64, features less their mean over the images."""
    mean: Tensor
    """(d,) float64, mean over the images."""
    ones: Tensor
    """(d,) float64, the vector whose every feature is 1."""
    width: int
    """Features a layer has, which is d unless the coordinates replace them."""
    epsilon: float
    """Relative rounding of the features as given."""

    @classmethod
    def of(cls, features: Tensor) -> Points:
        """The points of features (n, ...), flattened to (n, p)."""
        x = to_tensor(features).flatten(1).cpu()
        n, width = x.shape
        epsilon = torch.finfo(x.dtype).eps
        if width <= n + 2:
            rows = _with_mean_and_ones(x)
        else:
            triangle = torch.empty(0, n + 2, dtype=torch.float64)
            # Column blocks, so that no float64 copy of all the features is ever held.
            for part in x.split(_COLUMNS, dim=1):
                stacked = torch.cat([triangle, _with_mean_and_ones(part).T])
                triangle = torch.linalg.qr(stacked, mode="r").R
            rows = triangle.T
        return cls(rows[:n], rows[n], rows[n + 1], width, epsilon)

    def take(self, images: Tensor) -> Points:
        """The points of some images (n',), centred anew."""
        kept = self.centered[images]
        mean = kept.mean(0)
        rows = torch.cat([kept - mean, (self.mean + mean)[None], self.ones[None]])
        if rows.shape[1] > len(rows):
            rows = torch.linalg.qr(rows.T, mode="r").R.T
        return Points(rows[:-2], rows[-2], rows[-1], self.width, self.epsilon)

    def __len__(self) -> int:
        return len(self.centered)

    @cached_property
    def rows(self) -> Tensor:
        """(n, d), the images without centring."""
        return self.centered + self.mean

    @cached_property
    def rounding(self) -> float:
        """Singular values of the centred features up to here may be rounding alone."""
        return 4 * self.epsilon * float(torch.linalg.vector_norm(self.rows))

    def refuse_constant(self) -> None:
        """Raise MeasureError if the layer is constant over the images."""
        if torch.linalg.vector_norm(self.centered) <= self.rounding:
            raise MeasureError("is constant over the images")

    @cached_property
    def normalized(self) -> Tensor:
        """(n, d), centred and of Frobenius norm 1.

        Raises:
            MeasureError: the layer is constant over the images.
        """
        self.refuse_constant()
        return self.centered / torch.linalg.vector_norm(self.centered)

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Principal directions: left singular vectors (n, rank) and singular values (rank,).

        Raises:
            MeasureError: the layer is constant over the images.
        """
        left, singular, _ = torch.linalg.svd(self.centered, full_matrices=False)
        rank = int((singular > self.rounding).sum())
        if rank == 0:
            raise MeasureError("is constant over the images")
        return left[:, :rank], singular[:rank]


def _with_mean_and_ones(x: Tensor) -> Tensor:
    """Features (n, p) centred over the images, their mean and ones: (n + 2, p) float64."""
    rows = torch.ones(len(x) + 2, x.shape[1], dtype=torch.float64)
    rows[:-2] = x
    rows[-2] = rows[:-2].mean(0)
    rows[:-2] -= rows[-2]
    return rows
