"""CKA over all images at once, where an image is one vector (pooled and class tokens)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.base import Measure
from vitprobe.measures.cka import CKA, MINIMUM_IMAGES, Estimator, check_estimator


class ExactCKA(Measure):
    """Linear CKA over all images at once, of layers with one vector an image.

    Blocks see only pairs of images within a block; sums in feature space see all. With centred
    features X (n, p), Y (n, q) and squared norms r_i = |x_i|^2, s_i = |y_i|^2, n (n - 3) times the
    unbiased HSIC is |X'Y|^2 - n/(n - 2) sum_i r_i s_i + sum r sum s / ((n - 1)(n - 2)); without
    the last two terms it is the biased one's numerator.

    The state is float64 sums over images of features less a `shift`, the mean of the first block,
    without which the digits of a large common mean would drown the deviations; (W the sum of the
    layers' widths) `sums` (W,), `moments` (W, W) of products of features, `weighted` (layers, W) of
    features times a layer's squared norm, `norms` (layers, layers) of products of squared norms.
    Moving the shift changes no statistic, so merging is exact in any split and order, up to
    rounding.
    """

    info = CKA.info

    def __init__(self, widths: Sequence[int], estimator: Estimator = "unbiased") -> None:
        """
        Args:
            widths: of each layer's vectors.
            estimator: of HSIC.
        """
        check_estimator(estimator)
        self.widths = tuple(widths)
        self.estimator: Estimator = estimator
        self.images = 0
        total, layers = sum(self.widths), len(self.widths)
        self.shift = torch.zeros(total, dtype=torch.float64)
        self.sums = torch.zeros(total, dtype=torch.float64)
        self.moments = torch.zeros((total, total), dtype=torch.float64)
        self.weighted = torch.zeros((layers, total), dtype=torch.float64)
        self.norms = torch.zeros((layers, layers), dtype=torch.float64)
        self.precision = torch.finfo(torch.float64).eps
        """Relative, of the least precise features seen."""

    @staticmethod
    def state_bytes(widths: Sequence[int]) -> int:
        """Memory of the state, nearly all of it the products of all features with all others."""
        total, layers = sum(widths), len(widths)
        return 8 * (total * (total + 2 + layers) + layers * layers)

    def update(self, features: Sequence[Tensor]) -> None:
        """Add some images: for each layer their vectors (n, width).

        Raises:
            MeasureError: vectors of other widths, of different numbers of images, or not finite.
        """
        if len(features) != len(self.widths):
            raise MeasureError(f"{len(features)} layers given to CKA sums of {len(self.widths)}")
        n = len(features[0])
        for layer, (x, width) in enumerate(zip(features, self.widths, strict=True)):
            if x.shape != (n, width):
                raise MeasureError(
                    f"layer {layer} has features of shape {tuple(x.shape)}: give ({n}, {width})"
                )
            if not torch.isfinite(x).all():
                raise MeasureError(f"layer {layer} holds NaN or infinite features")
        if n == 0:
            return
        self.precision = max(self.precision, *(torch.finfo(x.dtype).eps for x in features))
        x = torch.cat([x.detach().cpu().double() for x in features], dim=1)
        if self.images == 0:
            self.shift = x.mean(0)
        x = x - self.shift
        squared = self._by_layer(x.square())
        self.sums += x.sum(0)
        self.moments.addmm_(x.T, x)
        self.weighted.addmm_(squared.T, x)
        self.norms.addmm_(squared.T, squared)
        self.images += n

    def _by_layer(self, values: Tensor) -> Tensor:
        """Sums over each layer's features: (..., W) → (..., layers)."""
        return torch.stack([part.sum(-1) for part in values.split(self.widths, dim=-1)], dim=-1)

    def _move(self, shift: Tensor) -> None:
        """Write the sums about another shift: every vector u becomes u + d."""
        d = self.shift - shift
        n = self.images
        layer = torch.repeat_interleave(torch.arange(len(self.widths)), torch.tensor(self.widths))
        along = torch.zeros_like(self.weighted).index_add_(0, layer, d[:, None] * self.moments)
        """sum_i (d_a . u_a,i) u_i, (layers, W)."""
        lengths = self._by_layer(d.square())
        total = self._by_layer(self.moments.diagonal())
        once = self._by_layer(d * self.sums)
        # |u + d|^2 = |u|^2 + (2 d.u + |d|^2), multiplied out.
        mixed = 2 * self._by_layer(self.weighted * d) + total[:, None] * lengths
        self.norms += mixed + mixed.T + 4 * self._by_layer(along * d)
        between = lengths[:, None] * (2 * once + n * lengths / 2)
        self.norms += between + between.T
        self.weighted += 2 * along + lengths[:, None] * self.sums
        self.weighted += (total + 2 * once + n * lengths)[:, None] * d
        self.moments.addr_(self.sums, d).addr_(d, self.sums + n * d)
        self.sums += n * d
        self.shift = shift

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers.

        Raises:
            MeasureError: layers of other widths or another estimator.
        """
        if other.widths != self.widths or other.estimator != self.estimator:
            raise MeasureError("only CKA sums of the same widths and estimator can be merged")
        if other.images == 0:
            return
        self._move(other.shift)
        for name in ("sums", "moments", "weighted", "norms"):
            getattr(self, name).add_(getattr(other, name))
        self.images += other.images
        self.precision = max(self.precision, other.precision)

    def compute(self) -> Tensor:
        """(layers, layers) float64 CKA; nan where a layer is constant over the images.

        Raises:
            MeasureError: fewer images than the estimator needs.
        """
        n = self.images
        if n < MINIMUM_IMAGES[self.estimator]:
            raise MeasureError(
                f"{self.estimator} CKA needs at least {MINIMUM_IMAGES[self.estimator]} images, "
                f"got {n}"
            )
        self._move(self.shift + self.sums / n)
        rows = self.moments.split(self.widths)
        plain = torch.stack([self._by_layer(part.square().sum(0)) for part in rows])
        hsic = (plain + plain.T) / 2
        total = self._by_layer(self.moments.diagonal())
        if self.estimator == "unbiased":
            hsic = hsic - n / (n - 2) * self.norms
            hsic = hsic + total[:, None] * total / ((n - 1) * (n - 2))
        own = hsic.diagonal()
        # As in `centered_gram` and `_center`: what rounding alone could have left is constant.
        shared = math.sqrt(n) * self._by_layer(self.shift.square()).sqrt()
        varies = total.sqrt() > 4 * self.precision * shared
        varies &= own > 64 * torch.finfo(torch.float64).eps * plain.diagonal()
        own = torch.where(varies, own, torch.nan)
        return hsic / torch.sqrt(own[:, None] * own)
