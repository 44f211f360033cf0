"""Which tokens of a layer stand for an image, and what the patch tokens of an image are like.

Token measures take the patch tokens of a layer, (images, patches, width), and give one number an
image. Sources are with each measure.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Final, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, like, to_tensor
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.by_image import OVER_IMAGES, ByImage
from vitprobe.measures.chunks import mean_of_defined
from vitprobe.measures.ranks import RankMe, checked_tokens, effective_rank, rankme

TokenPolicy = Literal["patches", "cls", "mean", "all"]


def select_tokens(tokens: Tensor, prefix_tokens: int, policy: TokenPolicy = "patches") -> Tensor:
    """Reduce a layer's tokens to one representation per image.

    Args:
        tokens: (n, tokens, width), prefix tokens first.
        prefix_tokens: leading tokens that are no patches.
        policy: `patches` (patch tokens), `cls` (the first prefix token), `mean` (mean of patch
            tokens) or `all`.

    Returns:
        (n, kept tokens, width), or (n, width) for `cls` and `mean`.

    Raises:
        MeasureError: unknown policy, or `cls` where there is no prefix token.
    """
    if policy not in get_args(TokenPolicy):
        raise MeasureError(
            f"unknown tokens '{policy}': use one of {', '.join(get_args(TokenPolicy))}"
        )
    if policy == "cls":
        if prefix_tokens == 0:
            raise MeasureError("tokens 'cls' asked of a model without a class token; use 'mean'")
        return tokens[:, 0]
    if policy == "all":
        return tokens
    patches = tokens[:, prefix_tokens:]
    return patches.mean(1) if policy == "mean" else patches


def token_cosine(tokens: A, *, center: bool = False) -> A:
    """Mean cosine similarity of the pairs of tokens of each image.

    Args:
        tokens: (batch, tokens, width), torch or numpy.
        center: take the mean token of the image off first.

    Returns:
        (batch,) between -1/(tokens - 1) and 1, over ordered pairs of different tokens that are not
        0; nan where there is no such pair; the kind of array given.

    Raises:
        MeasureError: another shape, or features that are not finite.
    """
    tensor = checked_tokens(tokens)
    # Norms of very large and very small features would leave the range of the numbers.
    largest = tensor.abs().amax((-2, -1), keepdim=True)
    tensor = tensor / torch.where(largest > 0, largest, 1)
    size = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    # A token that is the mean up to rounding has no direction from it.
    rounding = 0 * size
    if center:
        tensor = tensor - tensor.mean(-2, keepdim=True)
        rounding = 4 * torch.finfo(tensor.dtype).eps * size.amax(-2, keepdim=True)
        size = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    directed = size > rounding
    units = torch.where(directed, tensor / torch.where(directed, size, 1), 0)
    count = directed.sum((-2, -1))
    pairs = count * (count - 1)
    total = units.sum(-2).square().sum(-1) - count
    return like(total / torch.where(pairs > 0, pairs, torch.nan), tokens)


def feature_variance(tokens: A) -> A:
    """Variance of features over the tokens of each image, mean over dimensions.

    Args:
        tokens: (batch, tokens, width), torch or numpy.

    Returns:
        (batch,) unbiased variances, features squared; nan with one token; the kind of array given.

    Raises:
        MeasureError: another shape, or features that are not finite.
    """
    tensor = checked_tokens(tokens)
    count = tensor.shape[-2]
    squares = (tensor - tensor.mean(-2, keepdim=True)).square().sum(-2)
    return like((squares / (count - 1 if count > 1 else math.nan)).mean(-1), tokens)


def norm_outliers(tokens: A, *, cutoff: float = 3.5) -> A:
    """Share of the tokens of each image whose norm is an outlier to the high side.

    A norm is one where 0.6745 (norm - median) / MAD, the median and the median absolute deviation
    over the tokens of the image, exceeds `cutoff` (the modified z-score of Iglewicz & Hoaglin 1993,
    who recommend 3.5).

    Args:
        tokens: (batch, tokens, width), torch or numpy.
        cutoff: of the modified z-score.

    Returns:
        (batch,) shares between 0 and 1/2; nan where more than half of the norms are the same; the
        kind of array given.

    Raises:
        MeasureError: another shape, features that are not finite, or a cutoff not above 0.
    """
    tensor = checked_tokens(tokens)
    if not cutoff > 0:
        raise MeasureError(f"a cutoff of {cutoff} is none; give one above 0")
    norms = torch.linalg.vector_norm(tensor, dim=-1)
    median = norms.quantile(0.5, dim=-1, keepdim=True)
    above = norms - median
    spread = above.abs().quantile(0.5, dim=-1, keepdim=True)
    # Normalised tokens differ in norm by rounding alone.
    rounding = tensor.shape[-1] ** 0.5 * torch.finfo(tensor.dtype).eps * median
    outliers = (0.6745 * above > cutoff * spread).to(norms.dtype).mean(-1)
    return like(outliers.masked_fill((spread <= rounding).squeeze(-1), torch.nan), tokens)


def fourier_log_amplitude(tokens: A, *, grid: tuple[int, int], epsilon: float = 0.0) -> tuple[A, A]:
    """Log-amplitude along the diagonal of the Fourier transform of each image's grid of tokens.

    Relative to frequency 0, mean over dimensions (Park & Kim 2022, figure 2; Park et al. 2023).
    Entry k is of the frequency 2 pi k / side in both directions, for every one below pi. At pi
    itself, which only even sides have, the coefficient is real, and the logarithm of its amplitude
    lower by ln(2) / 2 for white noise: it does not continue the curve.

    Args:
        tokens: patch tokens (batch, tokens, width) of a row-major grid, torch or numpy.
        grid: (rows, columns), equal and at least 3.
        epsilon: added to amplitudes before the logarithm. Code of the papers adds 1e-6, which
            makes the curve depend on the scale of features; 0 leaves dimensions out whose
            amplitude is 0 up to rounding.

    Returns:
        Frequencies (k,) in units of pi radians a patch, and curves (batch, k) in nats, 0 at
        frequency 0; nan where every dimension is left out; the kind of array given.

    Raises:
        MeasureError: a grid that does not fit the tokens, is not square or has no such frequency;
            features that are not finite.
    """
    tensor = checked_tokens(tokens)
    if grid[0] * grid[1] != tensor.shape[1]:
        raise MeasureError(f"{tensor.shape[1]} tokens are no grid of {grid[0]} x {grid[1]}")
    reason = _no_diagonal(grid)
    if reason:
        raise MeasureError(reason)
    frequencies = torch.arange((grid[0] + 1) // 2, dtype=torch.float64) * 2 / grid[0]
    return like(frequencies, tokens), like(_fourier_curves(tensor, grid[0], epsilon), tokens)


def _no_diagonal(grid: tuple[int, int]) -> str | None:
    """Why a grid has no curve, or None."""
    if grid[0] != grid[1]:
        return (
            f"a grid of {grid[0]} x {grid[1]} patches has no diagonal of equal frequencies: "
            "Fourier amplitudes are for square grids"
        )
    if grid[0] < 3:
        return f"a grid of {grid[0]} x {grid[1]} patches has no frequency between 0 and pi"
    return None


def _fourier_curves(tokens: Tensor, side: int, epsilon: float = 0.0) -> Tensor:
    place = torch.arange(side)
    steps = torch.arange((side + 1) // 2)[:, None, None] * (place[:, None] + place) % side
    angles = steps.flatten(1).double() * (2 * math.pi / side)
    waves = torch.stack([angles.cos(), angles.sin()]).to(tokens)  # (2, k, tokens)
    real, imaginary = torch.einsum("pkt,ntw->pnkw", waves, tokens)
    amplitude = torch.hypot(real, imaginary)
    if epsilon == 0:
        rounding = torch.finfo(tokens.dtype).eps * tokens.abs().sum(-2, keepdim=True)
        amplitude = torch.where(amplitude > rounding, amplitude, torch.nan)
    logs = (amplitude + epsilon).log()
    return mean_of_defined(logs - logs[:, :1])


class TokenMeasure(Measure):
    """One number an image and layer, from the patch tokens of the layer.

    Per-image numbers are what paired comparisons between models need. The state is 5 bytes an image
    and layer; images are keyed by their index in the run, so merging is a union and exact.
    """

    info: ClassVar[Info]

    def __init__(self) -> None:
        self._kept = ByImage(self.info.name, np.float32)

    @abstractmethod
    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """The number of each image: (n, patches, width) → (n,), nan where it is undefined."""

    def update(
        self, layer: int, first_image: int, tokens: Tensor, grid: tuple[int, int] | None
    ) -> None:
        """Add images `first_image` … of one layer.

        Args:
            layer: counted from 0.
            first_image: index, in the whole run, of the first of them.
            tokens: patch tokens (n, patches, width), prefix tokens dropped, row-major.
            grid: (rows, columns) of patches; None where their order in the image is not known.

        Raises:
            MeasureError: tokens that do not fit the grid or are not finite, or an image that has
                come before.
        """
        if tokens.ndim != 3 or (grid is not None and tokens.shape[1] != grid[0] * grid[1]):
            place = "" if grid is None else f" for a grid of {grid[0]} x {grid[1]} patches"
            raise MeasureError(
                f"layer {layer} gives tokens of shape {tuple(tokens.shape)}{place}; give (images, "
                "patches, width), without prefix tokens"
            )
        if not torch.isfinite(tokens).all():
            raise MeasureError(f"features are NaN or infinite in layer {layer}")
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            rows = self._rows(to_tensor(tokens), grid)
        self.put(layer, first_image, rows.float().cpu().numpy(), grid)

    def columns(self, grid: tuple[int, int] | None) -> int:
        """Numbers kept of an image."""
        return 1

    def kept(self) -> dict[int, np.ndarray]:
        """layer -> (images, columns) float32, for `put`."""
        return self._kept.layers()

    def put(
        self, layer: int, first_image: int, rows: np.ndarray, grid: tuple[int, int] | None
    ) -> None:
        """Add images `first_image` … of one layer as another instance kept them.

        Raises:
            MeasureError: an image that has come before.
        """
        self._kept.put(layer, first_image, rows)

    def _rows(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """What is kept of each image, (n, k), its number last."""
        return self.images(tokens, grid)[:, None]

    def merge(self, other: Self) -> None:
        """Add the images of another instance.

        Raises:
            MeasureError: an image that both have seen.
        """
        self._kept.merge(other._kept)

    def compute(self) -> dict[int, np.ndarray]:
        """layer -> (images,) float32 in order of the run, nan where undefined."""
        return {layer: rows[:, -1] for layer, rows in self._kept.layers().items()}


class TokenCosine(TokenMeasure):
    """Streaming `token_cosine`."""

    info = Info(
        name="token_cosine",
        title="Token cosine similarity",
        unit="cosine",
        range="-1/(patches - 1) to 1",
        direction="higher: the patches of an image are more alike (over-smoothing)",
        what=(
            "How alike the patches of an image are: 1 when all point the same way, about 0 when "
            "they have nothing in common."
        ),
        formula="mean over ordered pairs of patches i != j of cos(x_i, x_j)",
        source="Gong et al. 2021; P. Wang et al. 2022 (over-smoothing)",
        invariances=(
            "orthogonal transformation",
            "isotropic scaling",
            "order of images",
            "order of tokens",
        ),
        streams="exact",
        group="tokens",
        interval=OVER_IMAGES,
        null="0 for independent tokens without a common mean; an untrained twin shares its mean.",
        caveats=(
            "A mean vector that all tokens share, or one massive dimension, makes all cosines near "
            "1 without any smoothing: read the first-direction share with it. Tokens that are 0 "
            "have no direction and are left out; undefined with fewer than two others."
        ),
        elsewhere=(
            "Some average over all pairs, each token with itself included, which adds about "
            "1/patches; some take the absolute cosine."
        ),
        bounds=(-1, 1),
    )

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return token_cosine(tokens)


class EffectiveRank(TokenMeasure):
    """Streaming `effective_rank`."""

    info = Info(
        name="effective_rank",
        title="Effective rank",
        unit="dimensions",
        range="1 to the smaller of patches and width",
        direction="higher: the patches of an image differ in more directions",
        what=(
            "In how many directions the patches of an image lie: a smooth count that is 1 when all "
            "are multiples of one vector."
        ),
        formula=(
            "exp(-sum_k p_k ln p_k), p_k = s_k / sum(s), s the singular values of (patches, "
            "width), not centred"
        ),
        source="Roy & Vetterli 2007",
        invariances=(
            "orthogonal transformation",
            "isotropic scaling",
            "order of images",
            "order of tokens",
        ),
        streams="exact",
        group="tokens",
        interval=OVER_IMAGES,
        null=(
            "Independent tokens of equal variance come near the upper end (about 156 of 192 for "
            "196 patches)."
        ),
        caveats=(
            "Bounded by patches and by width, so models differ in their upper end. Not centred: a "
            "vector that all patches share lowers it. Undefined where all tokens are 0."
        ),
        elsewhere=(
            "The name also stands for sum(s^2) / max(s^2) (stable rank) and for counts of singular "
            "values above a threshold, which are other numbers; RankMe is over images and adds "
            "1e-7."
        ),
        bounds=(1, math.inf),
        alike=("grid", "width"),
    )

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return effective_rank(tokens)


class FeatureVariance(TokenMeasure):
    """Streaming `feature_variance`."""

    info = Info(
        name="feature_variance",
        title="Feature variance",
        unit="features squared",
        range="0 and up",
        direction="higher: the patches of an image lie further apart",
        what="How far the patches of an image lie from their mean, in the features' own units.",
        formula="sum over patches of (x - mean)^2 / (patches - 1), mean over dimensions",
        source="Park & Kim 2022 (feature map variance)",
        invariances=("orthogonal transformation", "shift", "order of images", "order of tokens"),
        streams="exact",
        group="tokens",
        interval=OVER_IMAGES,
        null="None: the scale of features is a model's own.",
        caveats=(
            "Scales with the square of the features, and so hardly compares between models, or "
            "between layers where a norm sets the scale; one massive dimension can own it. "
            "Undefined with one patch."
        ),
        elsewhere=(
            "how-do-vits-work averages over the images of a batch before anything else, which is "
            "the mean over images here."
        ),
        bounds=(0, math.inf),
        alike=("grid", "width"),
    )

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return feature_variance(tokens)


class NormOutliers(TokenMeasure):
    """Streaming `norm_outliers`."""

    info = Info(
        name="norm_outliers",
        title="Norm outliers",
        unit="share",
        range="0 to 1/2",
        direction="higher: more patches carry a norm far above their image's others (artifacts)",
        what=(
            "The share of patches whose norm stands far out from the other patches of the image, "
            "as those do that a model without registers uses to store what is not local."
        ),
        formula="share of patches with 0.6745 (|x| - median) / MAD > 3.5 within their image",
        source="Darcet et al. 2024 (the phenomenon); Iglewicz & Hoaglin 1993 (the rule)",
        invariances=(
            "orthogonal transformation",
            "isotropic scaling",
            "order of images",
            "order of tokens",
        ),
        streams="exact",
        group="tokens",
        interval=OVER_IMAGES,
        null="0.0002 for norms with a normal distribution.",
        caveats=(
            "A skewed distribution of norms gives a share of some hundredths without any artifact; "
            "artifacts have norms several times the median and appear from one layer on. Layers "
            "read after their norm (layers 'normed') hide most of it: use layers 'residual'. "
            "Undefined where more than half of the norms are the same up to rounding."
        ),
        elsewhere=(
            "Darcet et al. cut at a norm of 150 in the last layer of DINOv2, a scale that other "
            "models do not share; here each image sets its own."
        ),
        bounds=(0, 0.5),
    )

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return norm_outliers(tokens)


class FourierAmplitude(TokenMeasure):
    """Streaming `fourier_log_amplitude` at its highest frequency; keeps the whole curve."""

    info = Info(
        name="fourier_amplitude",
        title="Relative log-amplitude",
        unit="nats",
        range="unbounded",
        direction="higher: patches hold more fine detail; lower: the layer smooths",
        what=(
            "How strong the fastest change between neighbouring patches is, beside their mean: a "
            "layer that smooths its patches loses it, one that sharpens them gains it."
        ),
        formula=(
            "mean over dimensions of ln|F(f, f)| - ln|F(0, 0)|, F the Fourier transform over the "
            "grid, f the highest frequency below pi"
        ),
        source="Park & Kim 2022 (fig. 2); Park et al. 2023",
        invariances=("isotropic scaling", "order of images"),
        streams="exact",
        group="tokens",
        interval=OVER_IMAGES,
        null=(
            "ln(2) / 2 = 0.35 for white noise, because the coefficient at frequency 0 is real; "
            "features with a mean of their own lie far below 0."
        ),
        caveats=(
            "The highest frequency depends on the grid, 2 pi floor((side - 1) / 2) / side (0.857 "
            "pi on 14 x 14), so compare models of the same grid. A mean vector lowers the whole "
            "curve. Undefined on grids that are not square or smaller than 3 x 3; dimensions whose "
            "amplitude is 0 up to rounding are left out."
        ),
        elsewhere=(
            "cl-vs-mim and how-do-vits-work add 1e-6 to amplitudes before the logarithm, which "
            "ties the number to the scale of features (epsilon=1e-6 of the function), and label "
            "the last frequency of an even grid pi, which it is not."
        ),
        alike=("grid",),
    )

    def __init__(self) -> None:
        super().__init__()
        self._sides: dict[int, int] = {}

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        return self._rows(tokens, grid)[:, -1]

    def columns(self, grid: tuple[int, int] | None) -> int:
        return 1 if grid is None or _no_diagonal(grid) is not None else (grid[0] + 1) // 2

    def put(
        self, layer: int, first_image: int, rows: np.ndarray, grid: tuple[int, int] | None
    ) -> None:
        super().put(layer, first_image, rows, grid)
        if grid is not None and _no_diagonal(grid) is None:
            self._sides[layer] = grid[0]

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._sides |= other._sides

    def _rows(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if grid is None or _no_diagonal(grid) is not None:
            return tokens.new_full((len(tokens), 1), torch.nan)
        return _fourier_curves(tokens, grid[0])

    def curves(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """layer -> frequencies, mean and standard error over images, each (k,).

        Frequencies are in units of pi radians a patch. A layer whose grid has no curve is left out;
        an image that is undefined at a frequency counts nothing there; the error of fewer than two
        images is nan.
        """
        found = {}
        for layer, rows in self._kept.layers().items():
            if layer in self._sides:
                frequencies = 2 * np.arange(rows.shape[1]) / self._sides[layer]
                found[layer] = (frequencies, *_mean_and_error(rows.astype(np.float64)))
        return found


def _mean_and_error(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of what is not nan of each column, and its standard error."""
    defined = ~np.isnan(rows)
    count = np.where(defined.any(0), defined.sum(0), np.nan)
    mean = np.where(defined, rows, 0).sum(0) / count
    squares = np.where(defined, rows - mean, 0) ** 2
    spread = squares.sum(0) / np.where(count > 1, count - 1, np.nan)
    return mean, np.sqrt(spread / count)


TOKEN_MEASURES: Final[tuple[type[TokenMeasure], ...]] = (
    TokenCosine,
    EffectiveRank,
    FeatureVariance,
    NormOutliers,
    FourierAmplitude,
)

__all__ = [
    "TOKEN_MEASURES",
    "EffectiveRank",
    "FeatureVariance",
    "FourierAmplitude",
    "NormOutliers",
    "RankMe",
    "TokenCosine",
    "TokenMeasure",
    "TokenPolicy",
    "effective_rank",
    "feature_variance",
    "fourier_log_amplitude",
    "norm_outliers",
    "rankme",
    "select_tokens",
    "token_cosine",
]
