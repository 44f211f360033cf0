"""Gram matrices of the images of a layer, and how they are centred."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError

_TILE: Final = 1 << 22
"""Features that are centred and multiplied at a time on a CPU: more take memory, fewer time."""
_STRIPES: Final = 2
"""Parts of a Gram's lower triangle, which is all that is multiplied there."""
_REFERENCES: Final = 8
"""Images at least whose mean is taken off before the product."""


def centered_gram(features: Tensor) -> Tensor:
    """Gram matrix of column-centred features.

    Single precision stays accurate when features share a large mean: an uncentred float32 Gram of
    features with mean 100 and deviation 1 has lost the deviation's digits. What is taken off first
    is the mean of a few of the n images, m of them, which spares a pass over all features; the
    Gram is then centred exactly. By Cauchy and Schwarz that mean lies within sqrt(n / m) standard
    deviations of the whole one, whatever the images, so that rounding grows by 1 + n / m at most,
    and that only where these few are all the outliers there are.

    Features whose spread over the images is below the rounding of the mean they share (such as the
    class token before the first block) are constant: their Gram is exactly zero.

    Args:
        features: (n, ...), taken as (n, p).

    Returns:
        (n, n), symmetric, in the precision of `features` (at least float32).
    """
    # Axis 1 is that of tokens, or of features where there is no other.
    tokens = features.flatten(2) if features.ndim > 2 else features
    dtype = torch.promote_types(features.dtype, torch.float32)
    n = len(tokens)
    reference = tokens[:: max(1, n // _REFERENCES)].to(dtype).mean(0)
    gram = torch.zeros((n, n), dtype=dtype, device=features.device)
    step, stripes = tokens.shape[1], 1
    if features.device.type == "cpu":
        step = max(1, _TILE * step // max(1, tokens.numel()))
        stripes = _STRIPES
    bounds = [n * i // stripes for i in range(stripes + 1)]
    # Under a caller's autocast the product alone would fall to half precision.
    with torch.autocast(features.device.type, enabled=False):
        for part, shared in zip(tokens.split(step, dim=1), reference.split(step), strict=True):
            x = (part.to(dtype) - shared).flatten(1)
            for first, last in pairwise(bounds):
                gram[first:last, :last].addmm_(x[first:last], x[:last].T)
    gram = gram.tril() + gram.tril(-1).T
    means = gram.mean(0)
    # Sums first: they are symmetric to the last bit.
    gram -= means + means[:, None] - means.mean()
    rounding = 4 * torch.finfo(dtype).eps * reference.norm() * n**0.5
    return gram * (gram.trace() > rounding.square())


def rbf_gram(features: Tensor, bandwidth: Literal["median"] | float = "median") -> Tensor:
    """Gaussian Gram matrix exp(-d^2 / (2 sigma^2)) (Kornblith et al. 2019, section 3).

    sigma^2 is t^2 times the median of all n^2 squared distances, the zero diagonal included.

    Args:
        features: (n, ...), flattened to (n, p).
        bandwidth: the fraction t of the median distance; `"median"` is t = 1.

    Returns:
        (n, n).

    Raises:
        MeasureError: the median distance is zero, so the kernel has no width; a bandwidth that is
            not above 0.
    """
    fraction = 1.0 if bandwidth == "median" else float(bandwidth)
    if not fraction > 0:
        raise MeasureError(f"an RBF bandwidth of {bandwidth} is none; give 'median' or one above 0")
    squared = squared_distances(centered_gram(features))
    variance = fraction**2 * median_entry(squared)
    if not variance > 0:
        raise MeasureError(
            "the RBF bandwidth is zero because half of the images or more have identical features; "
            "use kernel='linear' or give images that differ"
        )
    return torch.exp(squared / (-2 * variance))


def squared_distances(gram: Tensor) -> Tensor:
    """Between images, of a centred linear Gram; the diagonal is exactly zero."""
    norms = gram.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return squared.fill_diagonal_(0)


def median_entry(squared: Tensor) -> float:
    """Median of all entries."""
    # numpy's is the mean of the two middle values, where torch takes the lower.
    return float(np.median(squared.cpu().numpy()))


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
