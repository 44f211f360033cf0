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

Uncertainty of the debiased ratio, from sums over images and pairs of images that merge exactly:

- phi_ij = CKA (2 A_ij B_ij / S_ab - A_ij^2 / S_aa - B_ij^2 / S_bb), of the pair of images i and j,
  with A and B the U-centred Grams and S_ab = sum_ij A_ij B_ij, sums to zero; psi_i = sum_j phi_ij,
  times n, is the influence function of CKA (Hampel 1974).
- The Hoeffding decomposition writes phi_ij as a_i + a_j + d_ij. Then CKA varies by
  n (n - 1)^2 var(a) + n (n - 1) var(d) / 2, but sum_i psi_i^2 counts the second term twice, as
  every jackknife variance does (Efron & Stein 1981, "The Jackknife Estimate of Variance"): near
  independence, where a vanishes, it is twice too large. With P = sum_i psi_i^2 and
  Q = sum_ij phi_ij^2, the variance without that excess is, of a block of n images,
  P (n - 2)/(n - 3) - Q (n - 1)/(2 (n - 3)). Under the permutation null it is unbiased: with the
  images of one side permuted, S_ab has mean 0 and variance 2 |A|^2 |B|^2 / (n (n - 3)), |.| the
  Frobenius norm, and the mean of this estimate of it over all permutations is the same.
- The part of it that a gives cannot be negative, and is not let be.
- The variance is a mean of n squared influences, themselves of heavy tails: the square of a
  Gaussian, which features along one direction give, has kurtosis 15, and so the variance the
  2n / (15 - 1) degrees of freedom of Satterthwaite (1946). Intervals take Student's t with n / 7.

`benchmarks/coverage.py` measures how often these intervals hold the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array, to_tensor
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.gram import (
    centered_gram,
    h_center,
    median_entry,
    rbf_gram,
    squared_distances,
    u_center,
)

Estimator = Literal["unbiased", "biased"]
MINIMUM_IMAGES = {"unbiased": 4, "biased": 3}
"""Two images are at one distance in any layer, which makes biased CKA 1."""

PERMUTATIONS = 50
"""Drawn for the floor. Each serves twice: <A, PBP'> permutes the images of one layer, and
<B, PAP'> is the same with the inverse of P."""
FLOOR_RANK = math.ceil(0.95 * (2 * PERMUTATIONS + 1))
"""The floor is the 96th smallest of 100 permuted values: a layer independent of the other exceeds
it with probability 5/101. The 95th would let 6/101 pass."""
_TOGETHER = 256
"""Columns, of layers and permutations, that a product has about: few make it slow, many take
memory."""


def check_estimator(estimator: str) -> None:
    """Raise MeasureError for an estimator that there is not."""
    if estimator not in MINIMUM_IMAGES:
        raise MeasureError(f"unknown CKA estimator '{estimator}': use 'unbiased' or 'biased'")


def _center(gram: Tensor, estimator: Estimator) -> Tensor:
    """Centred Grams (..., n, n) float64; zero where nothing but rounding is left."""
    check_estimator(estimator)
    n = gram.shape[-1]
    if n < MINIMUM_IMAGES[estimator]:
        raise MeasureError(
            f"{estimator} CKA needs at least {MINIMUM_IMAGES[estimator]} images in a block, got {n}"
        )
    # 1/(n - 1)^2 of the biased HSIC, times n so that larger blocks weigh more.
    k = u_center(gram) if estimator == "unbiased" else h_center(gram) * (n**0.5 / (n - 1))
    # U-centring takes every Gram whose off-diagonal is u_i + u_j to zero, but for rounding.
    kept = _norm(k) > 16 * torch.finfo(gram.dtype).eps * _norm(gram.double())
    return torch.where(kept, k, 0)


DEGENERATE = "all alike but for one, or all orthogonal about some point"
"""When off-diagonal Grams are u_i + u_j, and so debiased HSICs 0."""


def _norm(k: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(k, keepdim=True)


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
        if not gram.any():
            raise MeasureError(f"{name} is constant over the images, so its CKA is not defined")
        centered.append(_center(gram, estimator))
        if not centered[-1].any():
            raise MeasureError(
                f"the images of {name} are {DEGENERATE}, so its debiased CKA is not defined"
            )
    a, b = centered
    return float((a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum()))


class SimilarityResult(NamedTuple):
    """A similarity of every pair of layers, with its uncertainty."""

    value: Tensor
    """(layers, layers) float64; nan where undefined."""
    standard_error: Tensor
    """(layers, layers) float64; nan where there is none."""
    floor: Tensor
    """(layers, layers) float64: the 95th percentile of the value when the images of one side are
    permuted; nan where there is none."""
    degrees: float
    """Of freedom of Student's t in intervals; `math.inf`: normal."""


class CKA(Measure):
    """Linear CKA between all pairs of layers, accumulated over blocks of images.

    The state is float64 sums, where A and B are centred Grams of layers a and b,
    r_ab,i = sum_j A_ij B_ij over the images of a block, and each sum runs over all blocks:

    - `products`: sum_i r_ab,i, the numerator of the HSIC of layers a and b;
    - `squares`: sum_i r_ab^2; `cross`: sum_i r_ab r_aa; `selves`: sum_i r_aa r_bb, each weighted by
      (n - 2)/(n - 3) of its block: they give sum_i psi_i^2 without keeping any image;
    - `pair_squares`: sum_ij A_ij^2 B_ij^2; `pair_cross`: sum_ij A_ij^3 B_ij, weighted by
      (n - 1)/(n - 3): they give sum_ij phi_ij^2 (see the module);
    - `permuted`: (permutations, layers, layers), the products with the images of b permuted within
      the block, by permutations that depend on the block's first image only.

    All are plain sums, so merging is exact in any split of the blocks.
    """

    info = Info(
        name="cka",
        title="CKA",
        unit="",
        range="-1 to 1; 0 on average for independent features; may be slightly negative",
        direction="higher: the two layers arrange the images more alike",
        what=(
            "CKA (centred kernel alignment) says how alike two layers arrange the same images: 1 "
            "when one is a rotated, shifted and evenly scaled copy of the other, about 0 when they "
            "have nothing to do with each other."
        ),
        formula="HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), unbiased HSIC, summed over blocks "
        "(tokens `cls` and `mean`: over all images at once)",
        source="Kornblith et al. 2019; Song et al. 2012 (eq. 5); Nguyen et al. 2021 (eq. 2)",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="blocked",
        group="similarity",
        interval=(
            "Student's t with images / 7 degrees of freedom around the value, over draws of the "
            "images: the variance of the influence function of the debiased ratio, less the "
            "second-order term that it counts twice (Efron & Stein 1981). Pointwise, of one pair "
            "of layers. None for a layer with itself, for biased CKA, or below 7 images."
        ),
        null=(
            "The floor: the 95th percentile of CKA when the images of one side are permuted within "
            "their blocks (the 96th smallest of 100). Debiased CKA of independent layers is 0 on "
            "average. Untrained networks see the same pixels, so that theirs is a higher null: ask "
            "for the random reference."
        ),
        caveats=(
            "One direction of large variance can own the value: read it beside the first-direction "
            "share. Linear maps other than rotations and scalings change it, so a low CKA does not "
            "mean that information differs. Images of one class in a row bias it over blocks. "
            "Where layers of few directions are independent, the interval is wider than it need be."
        ),
        elsewhere=(
            "Kornblith et al. 2019 define CKA with the biased HSIC, which is near 1 for any layers "
            "of many more features than images. mae-lite, torch_cka and pytorch-cka weigh every "
            "batch alike, a short last one too, where weights are n (n - 3) here; mae-lite and "
            "pytorch-cka centre after a single-precision product, and lose features of large mean; "
            "pytorch-cka cuts negative values to 0; ckatorch keeps the last batch only; netrep's "
            "LinearCKA is an angle. None of them gives an interval."
        ),
        bounds=(-1.0, 1.0),
    )

    def __init__(self, layers: int, estimator: Estimator = "unbiased") -> None:
        check_estimator(estimator)
        self.estimator: Estimator = estimator
        self.images = 0
        self.blocks = 0
        self.pairs = 0
        """Sum over blocks of n (n - 3), what unbiased HSICs are divided by."""
        shape = (layers, layers)
        self.products = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.cross = torch.zeros(shape, dtype=torch.float64)
        self.selves = torch.zeros(shape, dtype=torch.float64)
        self.pair_squares = torch.zeros(shape, dtype=torch.float64)
        self.pair_cross = torch.zeros(shape, dtype=torch.float64)
        self.permuted = torch.zeros((PERMUTATIONS, *shape), dtype=torch.float64)

    def update(self, features: Sequence[Tensor], first_image: int = 0) -> None:
        """Add one block: for each layer the features (n, ...) of the same n images."""
        self.update_grams(torch.stack([centered_gram(x) for x in features]), first_image)

    def update_grams(self, grams: Tensor, first_image: int = 0) -> None:
        """Add one block given its Gram matrices (layers, n, n), from `centered_gram`.

        Args:
            grams: of the same n images in every layer.
            first_image: index in the run of the block's first image; it seeds the permutations.

        Raises:
            MeasureError: fewer images than the estimator needs, another number of layers, or Grams
                that are not finite.
        """
        if len(grams) != len(self.products):
            raise MeasureError(f"{len(grams)} layers given to CKA sums of {len(self.products)}")
        if not torch.isfinite(grams).all():
            layer = int(torch.isfinite(grams).flatten(1).all(1).logical_not().nonzero()[0])
            raise MeasureError(f"layer {layer} holds NaN or infinite features")
        if grams.device.type == "mps":
            grams = grams.cpu()
        centered = _center(grams, self.estimator)
        n = grams.shape[-1]
        by_image = centered.permute(1, 0, 2)
        rows = torch.bmm(by_image, by_image.mT)  # (n, layers, layers)
        rows = (rows + rows.mT) / 2  # a matrix product is symmetric only up to rounding
        self.products += rows.sum(0).cpu()
        if self.estimator == "unbiased":
            weight = (n - 2) / (n - 3)
            own = rows.diagonal(dim1=1, dim2=2)
            self.squares += weight * rows.square().sum(0).cpu()
            self.cross += weight * (rows * own[:, :, None]).sum(0).cpu()
            self.selves += weight * (own.T @ own).cpu()
            self._add_pairs(centered.flatten(1), (n - 1) / (n - 3))
        self._add_permuted(centered, first_image)
        self.images += n
        self.blocks += 1
        self.pairs += n * (n - 3)

    def _add_pairs(self, entries: Tensor, weight: float) -> None:
        squared = entries.square()
        self.pair_squares += weight * (squared @ squared.T).cpu()
        self.pair_cross += weight * ((squared * entries) @ entries.T).cpu()

    def _add_permuted(self, centered: Tensor, first_image: int) -> None:
        n = centered.shape[-1]
        norms = torch.linalg.matrix_norm(centered)
        # Of unit norm, Grams of any scale fit single precision, which is ample for a null.
        unit = (centered / torch.where(norms > 0, norms, 1)[:, None, None]).float()
        # Rows hold one entry of all layers, so that a permutation moves rows.
        entries = unit.detach().flatten(1).T.contiguous()
        i, j = torch.triu_indices(n, n, device=entries.device)
        half = entries.index_select(0, i * n + j) * torch.where(i == j, 1.0, 2.0)[:, None]
        layers = entries.shape[1]
        generator = torch.Generator().manual_seed(first_image)
        orders = [torch.randperm(n, generator=generator) for _ in range(PERMUTATIONS)]
        together = max(1, _TOGETHER // max(1, layers))
        parts = torch.stack(orders, dim=1).to(entries.device).split(together, dim=1)
        room = entries.new_empty(len(i) * parts[0].shape[1] * layers)
        found = []
        # Under a caller's autocast the product would fall to half precision.
        with torch.autocast(entries.device.type, enabled=False):
            for order in parts:
                moved = order.index_select(0, i) * n + order.index_select(0, j)
                permuted = room[: moved.numel() * layers].view(moved.numel(), layers)
                torch.index_select(entries, 0, moved.flatten(), out=permuted)
                products = half.T @ permuted.view(len(i), -1)
                found.append(products.unflatten(1, (-1, layers)).transpose(0, 1))
        self.permuted += (torch.cat(found).double() * norms[:, None] * norms[None, :]).cpu()

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers.

        Raises:
            MeasureError: a different number of layers or another estimator.
        """
        if (
            type(other) is not type(self)
            or other.products.shape != self.products.shape
            or other.estimator != self.estimator
        ):
            raise MeasureError("only CKA sums of the same kernel, layers and estimator merge")
        for name in (
            *("products", "squares", "cross", "selves", "pair_squares", "pair_cross", "permuted"),
            *("images", "blocks", "pairs"),
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def reasons(self) -> dict[int, str]:
        """Why the CKA of a layer is undefined, by layer."""
        undefined = (self.products.diagonal() <= 0).nonzero().flatten().tolist()
        return dict.fromkeys(undefined, f"constant over the images, or they are {DEGENERATE}")

    def compute(self, exact: Tensor | None = None) -> SimilarityResult:
        """CKA of every pair of layers, nan where a layer is constant over the images.

        Args:
            exact: (layers, layers) values of `ExactCKA` over the same images, to be given in place
                of the blocked ones. More pairs of images make them: the second-order part of the
                variance, and the variance of the null, are scaled by the share of pairs of images
                that blocks see. Biased values then have no floor.
        """
        own = self.products.diagonal()
        s_aa = torch.where(own > 0, own, torch.nan)[:, None]
        s_bb = s_aa.T
        root = torch.sqrt(s_aa * s_bb)
        blocked = self.products / root
        share = 1.0 if exact is None else self.pairs / (self.images * (self.images - 3))
        permuted = torch.cat([self.permuted, self.permuted.mT]) / root
        floor = math.sqrt(share) * permuted.kthvalue(FLOOR_RANK, dim=0).values
        value = blocked if exact is None else exact
        none = torch.full_like(value, torch.nan)
        if self.estimator == "biased":
            return SimilarityResult(value, none, floor if exact is None else none, math.inf)

        def squared(squares: Tensor, cross: Tensor, selves: Tensor) -> Tensor:
            """Sum of squares of CKA (2 u_ab / S_ab - u_aa / S_aa - u_bb / S_bb), expanded.

            CKA / S_ab is written 1 / sqrt(S_aa S_bb), which needs no S_ab other than 0.
            """
            diagonal = selves.diagonal()[:, None]
            return (
                4 * squares / root.square()
                - 4 * blocked * (cross / s_aa + cross.T / s_bb) / root
                + blocked.square()
                * (
                    diagonal / s_aa.square()
                    + diagonal.T / s_bb.square()
                    + 2 * selves / (s_aa * s_bb)
                )
            ).clamp_min(0)

        images = squared(self.squares, self.cross, self.selves)
        pairs = squared(self.pair_squares, self.pair_cross, self.pair_squares)
        error = torch.sqrt((images - pairs).clamp_min(0) + share * pairs / 2)
        error.fill_diagonal_(torch.nan)
        return SimilarityResult(value, error, floor, self.images / 7)


class CKARBF(CKA):
    """CKA with a Gaussian kernel between all pairs of layers, accumulated over blocks of images.

    Takes the same linear Grams as `CKA`. Every layer's sigma^2 is the median squared distance
    between the images of the first block (see `rbf_gram`) and stays: `variances`, (layers,), is
    part of the state.
    """

    info = Info(
        name="cka_rbf",
        title="CKA (RBF)",
        unit="",
        range="-1 to 1; 0 on average for independent features; may be slightly negative",
        direction="higher: the two layers have the same images near one another",
        what=(
            "CKA with a Gaussian (RBF) kernel says how alike two layers arrange the same images, "
            "counting near neighbours and forgetting how far apart distant images are."
        ),
        formula=(
            "CKA of exp(-d^2 / (2 sigma^2)), d the distance of two images, sigma^2 the median d^2 "
            "in the first block"
        ),
        source="Kornblith et al. 2019, section 3; Song et al. 2012 (eq. 5)",
        invariances=("orthogonal transformation", "isotropic scaling", "shift", "order of images"),
        streams="blocked",
        group="similarity",
        interval=CKA.info.interval + " The bandwidth is taken as given.",
        null=CKA.info.null,
        caveats=(
            "The bandwidth decides what counts as near, and is that of the first block: another "
            "first block gives slightly another number. Where features far outnumber images all "
            "distances are about equal, and it then tells little that linear CKA does not."
        ),
        elsewhere=(
            "Kornblith et al. 2019 take fractions of the median distance too (0.2, 0.4, 0.8), over "
            "all images at once; theirs and ours count the zero distances of images to themselves, "
            "where many take the median over pairs of different images."
        ),
        bounds=(-1.0, 1.0),
    )

    def __init__(
        self, layers: int, estimator: Estimator = "unbiased", variances: Tensor | None = None
    ) -> None:
        """
        Args:
            layers: how many.
            estimator: of HSIC.
            variances: (layers,) sigma^2 of another part of the run, so that both can be merged;
                otherwise the first block decides.
        """
        super().__init__(layers, estimator)
        self.variances = variances

    def update_grams(self, grams: Tensor, first_image: int = 0) -> None:
        squared = torch.stack([squared_distances(gram) for gram in grams])
        if self.variances is None:
            self.variances = torch.tensor(
                [median_entry(part) for part in squared], dtype=torch.float64
            )
        variances = self.variances.to(squared)[:, None, None]
        kernel = torch.exp(squared / (-2 * torch.where(variances > 0, variances, torch.inf)))
        super().update_grams(kernel * (variances > 0), first_image)

    def merge(self, other: Self) -> None:
        """Add the sums of another instance over other images and the same layers.

        Raises:
            MeasureError: another number of layers, estimator or bandwidth.
        """
        theirs = getattr(other, "variances", None)
        ours = self.variances
        if ours is not None and theirs is not None and not torch.equal(ours, theirs):
            raise MeasureError(
                "RBF CKA sums of other bandwidths cannot be merged: give one part's `variances` to "
                "the other before its first block"
            )
        super().merge(other)
        self.variances = theirs if ours is None else ours

    @property
    def reasons(self) -> dict[int, str]:
        without = (
            [] if self.variances is None else (self.variances <= 0).nonzero().flatten().tolist()
        )
        width = "half of the first block's images or more are alike, so the kernel has no width"
        return super().reasons | dict.fromkeys(without, width)
