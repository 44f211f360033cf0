"""Centred kernel alignment between layers.

CKA is the normalised Hilbert-Schmidt independence criterion (HSIC) of two Gram matrices over the
same n images (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
eqs. 2 to 4). Estimators of HSIC:

- `biased`: tr(KHLH) / (n - 1)^2 (Gretton et al. 2005);
- `unbiased`: the U-statistic of Song et al. 2012, eq. 5 ("Feature Selection via Dependence
  Maximization"), written as the inner product of U-centred Grams over n(n - 3) (Szekely & Rizzo
  2014). The ratio of unbiased HSICs is called *debiased* CKA; the ratio itself is not unbiased, may
  be negative, and is never clamped.

Over blocks of images (Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?",
eq. 2) the inner products are summed first and divided once, so that a block of n_b images weighs
n_b (n_b - 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array, to_tensor
from vitprobe.measures.base import Info, Measure

Estimator = Literal["unbiased", "biased"]
MINIMUM_IMAGES = {"unbiased": 4, "biased": 2}


def centered_gram(features: Tensor) -> Tensor:
    """Gram matrix of column-centred features.

    Centring first keeps single precision accurate when features share a large mean: an uncentred
    float32 Gram of features with mean 100 and deviation 1 has lost the deviation's digits.

    Features whose spread over the images is below the rounding of the mean they share (such as the
    class token before the first block) are constant: their Gram is exactly zero.

    Args:
        features: (n, ...), flattened to (n, p).

    Returns:
        (n, n), in the precision of `features` (at least float32).
    """
    x = features.flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(0)
    x = x - mean
    # Under a caller's autocast the product alone would fall to half precision.
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.T
    shared = math.sqrt(len(x)) * torch.linalg.vector_norm(mean)
    if gram.trace().sqrt() <= 4 * torch.finfo(x.dtype).eps * shared:
        return torch.zeros_like(gram)
    return gram


def rbf_gram(features: Tensor, bandwidth: Literal["median"] | float = "median") -> Tensor:
    """Gaussian Gram matrix exp(-d^2 / (2 sigma^2)) (Kornblith et al. 2019, section 3).

    sigma^2 is t^2 times the median of all n^2 squared distances, the zero diagonal included.

    Args:
        features: (n, ...), flattened to (n, p).
        bandwidth: the fraction t of the median distance; `"median"` is t = 1.

    Returns:
        (n, n).

    Raises:
        MeasureError: the median distance is zero, so the kernel has no width.
    """
    gram = centered_gram(features)
    norms = gram.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    squared.fill_diagonal_(0)
    fraction = 1.0 if bandwidth == "median" else float(bandwidth)
    variance = fraction**2 * float(np.median(squared.cpu().numpy()))
    if not variance > 0:
        raise MeasureError(
            "the RBF bandwidth is zero because half of the images or more have identical features; "
            "use kernel='linear' or give images that differ"
        )
    return torch.exp(squared / (-2 * variance))


def u_center(gram: Tensor) -> Tensor:
    """U-centred copy of Gram matrices: (..., n, n) in, float64 out; zero diagonal and row sums.

    The inner product of two U-centred Grams is n(n - 3) times the unbiased HSIC (Song et al. 2012).
    """
    n = gram.shape[-1]
    k = gram.double().clone()
    k.diagonal(dim1=-2, dim2=-1).zero_()
    means = k.sum(-1) / (n - 2)
    means -= means.sum(-1, keepdim=True) / (2 * (n - 1))
    k -= means[..., :, None]
    k -= means[..., None, :]
    k.diagonal(dim1=-2, dim2=-1).zero_()
    return k


def h_center(gram: Tensor) -> Tensor:
    """Doubly centred copy HKH of Gram matrices: (..., n, n) in, float64 out."""
    k = gram.double()
    k = k - k.mean(-1, keepdim=True)
    return k - k.mean(-2, keepdim=True)


def _check_estimator(estimator: str) -> None:
    if estimator not in MINIMUM_IMAGES:
        raise MeasureError(f"unknown CKA estimator '{estimator}': use 'unbiased' or 'biased'")


def _center(gram: Tensor, estimator: Estimator) -> Tensor:
    _check_estimator(estimator)
    n = gram.shape[-1]
    if n < MINIMUM_IMAGES[estimator]:
        raise MeasureError(
            f"{estimator} CKA needs at least {MINIMUM_IMAGES[estimator]} images in a block, got {n}"
        )
    # 1/(n - 1)^2 of the biased HSIC, times n so that larger blocks weigh more.
    return u_center(gram) if estimator == "unbiased" else h_center(gram) * (n**0.5 / (n - 1))


def cka(
    x: Array,
    y: Array,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    estimator: Estimator = "unbiased",
    bandwidth: Literal["median"] | float = "median",
) -> float:
    """CKA between two representations of the same n images.

    Invariant to orthogonal transformation, isotropic scaling and shift of either argument, and to
    permuting the images of both.

    Args:
        x: (n, ...), torch or numpy, flattened to (n, p).
        y: (n, ...), flattened to (n, q); p and q may differ.
        kernel: `linear`, or `rbf` with the median heuristic of Kornblith et al. 2019.
        estimator: `unbiased` (debiased CKA, may be negative) or `biased`.
        bandwidth: of the RBF kernel, see `rbf_gram`.

    Returns:
        The CKA, at most 1; computed in float64 for float64 input.

    Raises:
        MeasureError: different numbers of images, too few of them, non-finite or constant features.
    """
    tensors = {"x": to_tensor(x), "y": to_tensor(y)}
    if len(tensors["x"]) != len(tensors["y"]):
        raise MeasureError(
            f"x has {len(tensors['x'])} images and y has {len(tensors['y'])}: "
            "CKA compares the same images in the same order"
        )
    if kernel not in ("linear", "rbf"):
        raise MeasureError(f"unknown CKA kernel '{kernel}': use 'linear' or 'rbf'")
    centered = []
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            raise MeasureError(f"{name} has shape {tuple(tensor.shape)}: give (images, features)")
        if not torch.isfinite(tensor).all():
            raise MeasureError(f"{name} holds NaN or infinite features")
        gram = centered_gram(tensor) if kernel == "linear" else rbf_gram(tensor, bandwidth)
        gram = _center(gram, estimator)
        if not gram.any():
            raise MeasureError(f"{name} is constant over the images, so its CKA is not defined")
        centered.append(gram)
    a, b = centered
    return float((a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum()))


class CKAResult(NamedTuple):
    """CKA of every pair of layers, with what its uncertainty needs."""

    value: Tensor
    """(layers, layers) float64; nan where a layer is constant over the images."""
    standard_error: Tensor
    """(layers, layers) float64: root of mean(psi^2)/n of the influence function psi; nan for a
    layer with itself (CKA is 1 by construction) and for `biased`."""


class CKA(Measure):
    """Linear CKA between all pairs of layers, accumulated over blocks of images.

    The state is four (layers, layers) float64 sums over images i of the row sums
    r_ab,i = sum_j A_ij B_ij of products of two centred Grams A and B:

    - `products`: sum r_ab, the numerator of the HSIC of layers a and b;
    - `squares`: sum r_ab^2; `cross`: sum r_ab r_aa; `selves`: sum r_aa r_bb, from which the
      variance of the influence function psi_i = CKA (2 r_ab,i/S_ab - r_aa,i/S_aa - r_bb,i/S_bb) of
      the debiased ratio follows without keeping any image.

    All are plain sums, so merging is exact in any split of the blocks.
    """

    info = Info(
        name="cka",
        title="CKA",
        unit="",
        range="at most 1; 0 on average for independent features; may be slightly negative",
        direction="higher: the two layers arrange the images more alike",
        what=(
            "CKA (centred kernel alignment) says how alike two layers arrange the same images: 1 "
            "when one is a rotated, shifted and evenly scaled copy of the other, about 0 when they "
            "have nothing to do with each other."
        ),
        formula="HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), unbiased HSIC, summed over blocks",
        source="Kornblith et al. 2019; Song et al. 2012 (eq. 5); Nguyen et al. 2021 (eq. 2)",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="blocked",
    )

    def __init__(self, layers: int, estimator: Estimator = "unbiased") -> None:
        _check_estimator(estimator)
        self.estimator: Estimator = estimator
        self.images = 0
        self.blocks = 0
        shape = (layers, layers)
        self.products = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.cross = torch.zeros(shape, dtype=torch.float64)
        self.selves = torch.zeros(shape, dtype=torch.float64)

    def update(self, features: Sequence[Tensor]) -> None:
        """Add one block: for each layer the features (n, ...) of the same n images."""
        self.update_grams(torch.stack([centered_gram(x) for x in features]))

    def update_grams(self, grams: Tensor) -> None:
        """Add one block given its Gram matrices (layers, n, n), from `centered_gram`.

        Raises:
            MeasureError: fewer images than the estimator needs, or another number of layers.
        """
        if len(grams) != len(self.products):
            raise MeasureError(f"{len(grams)} layers given to CKA sums of {len(self.products)}")
        if grams.device.type == "mps":
            grams = grams.cpu()
        centered = _center(grams, self.estimator)
        by_image = centered.permute(1, 0, 2)
        rows = torch.bmm(by_image, by_image.mT)  # (n, layers, layers)
        rows = (rows + rows.mT) / 2  # a matrix product is symmetric only up to rounding
        own = rows.diagonal(dim1=1, dim2=2)
        self.products += rows.sum(0).cpu()
        self.squares += rows.square().sum(0).cpu()
        self.cross += (rows * own[:, :, None]).sum(0).cpu()
        self.selves += (own.T @ own).cpu()
        self.images += grams.shape[-1]
        self.blocks += 1

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers.

        Raises:
            MeasureError: a different number of layers or another estimator.
        """
        if other.products.shape != self.products.shape or other.estimator != self.estimator:
            raise MeasureError("only CKA sums of the same layers and estimator can be merged")
        for name in ("products", "squares", "cross", "selves", "images", "blocks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> CKAResult:
        """CKA and its standard error for every pair of layers."""
        own = self.products.diagonal()
        defined = own > 0
        scale = torch.where(defined, own, torch.nan)
        value = self.products / torch.sqrt(scale[:, None] * scale[None, :])
        if self.estimator == "biased":
            return CKAResult(value, torch.full_like(value, torch.nan))
        s_ab, s_aa, s_bb = self.products, scale[:, None], scale[None, :]
        # The squared psi, expanded; CKA / S_ab is 1 / sqrt(S_aa S_bb), which needs no S_ab != 0.
        root = torch.sqrt(s_aa * s_bb)
        diagonal = self.selves.diagonal()
        variance = (
            4 * self.squares / root.square()
            - 4 * (s_ab / root) * (self.cross / s_aa + self.cross.T / s_bb) / root
            + (s_ab / root).square()
            * (
                diagonal[:, None] / s_aa.square()
                + diagonal[None, :] / s_bb.square()
                + 2 * self.selves / (s_aa * s_bb)
            )
        )
        error = torch.sqrt(variance.clamp_min(0))
        error.fill_diagonal_(torch.nan)
        return CKAResult(value, error)


def first_direction_share(gram: Tensor) -> Tensor:
    """Leading eigenvalue and trace of centred Grams: (..., n, n) → (..., 2) float64.

    Their ratio is the share of variance along the first principal direction. A few massive
    dimensions can own a CKA; this share says so.
    """
    k = h_center(gram)
    leading = torch.linalg.eigvalsh(k)[..., -1]
    return torch.stack([leading, k.diagonal(dim1=-2, dim2=-1).sum(-1)], dim=-1)


class FirstDirectionShare(Measure):
    """Share of a layer's variance along its first principal direction, averaged over blocks.

    With fewer images in a block than dimensions the share is biased upwards; layers of one run are
    comparable because they share the block size.
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
    )

    def __init__(self, layers: int) -> None:
        self.sums = torch.zeros(layers, 2, dtype=torch.float64)

    def update_grams(self, grams: Tensor) -> None:
        """Add one block given its Gram matrices (layers, n, n)."""
        self.sums += first_direction_share(grams.cpu())

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers."""
        self.sums = self.sums + other.sums

    def compute(self) -> Tensor:
        """(layers,) float64; nan for a layer that is constant over the images."""
        return self.sums[:, 0] / torch.where(self.sums[:, 1] > 0, self.sums[:, 1], torch.nan)


__all__ = [
    "CKA",
    "CKAResult",
    "FirstDirectionShare",
    "centered_gram",
    "cka",
    "first_direction_share",
    "h_center",
    "rbf_gram",
    "u_center",
]
