"""Ranks that need no threshold: of the tokens of an image, and of the images of a layer.

Sources: Roy & Vetterli 2007 ("The Effective Rank: A Measure of Effective Dimensionality"); Garrido
et al. 2023 ("RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
Representations by Their Rank").
"""

from __future__ import annotations

import math
from typing import ClassVar, Final, Self

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, Array, like, to_tensor
from vitprobe.measures.base import Info, Measure
from vitprobe.measures.by_image import ByImage

GROUPS: Final = 10
"""Of images, each left out once by the jackknife."""
_EPSILON: Final = 1e-7
"""Garrido et al. 2023, equation 1."""


def singular_values(rows: Tensor, *, center: bool = False) -> Tensor:
    """(..., k) float64 singular values of (..., n, width), k the smaller; rounding is exactly 0.

    By way of the smaller Gram matrix, in double precision: several times as fast as a singular
    value decomposition in single precision, and no less accurate for features in single precision.
    """
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
    power = rows.square().sum((-2, -1))
    if center:
        rows = rows - rows.mean(-2, keepdim=True)
    gram = rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows
    squares = torch.linalg.eigvalsh(gram)
    epsilon = torch.finfo(torch.float64).eps
    rounding = max(rows.shape[-2:]) * epsilon * (squares[..., -1] + epsilon * power)
    return torch.where(squares > rounding[..., None], squares, 0).sqrt()


def effective_rank(tokens: A, *, center: bool = False) -> A:
    """Effective rank of the tokens of each image.

    The exponential of the entropy of the singular values of the (tokens, width) matrix, divided by
    their sum (Roy & Vetterli 2007).

    Args:
        tokens: (batch, tokens, width), torch or numpy.
        center: take the mean token of the image off first.

    Returns:
        (batch,) float64, between 1 and the smaller of tokens and width; nan where all (centred)
        tokens are 0; the kind of array given.

    Raises:
        MeasureError: another shape.
    """
    values = singular_values(checked_tokens(tokens), center=center)
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, torch.nan)
    return like(torch.special.entr(shares).sum(-1).exp(), tokens)


def checked_tokens(tokens: Array) -> Tensor:
    """The tokens as a tensor of (batch, tokens, width).

    Raises:
        MeasureError: another shape, or none of one of them; features that are not finite.
    """
    tensor = to_tensor(tokens)
    if tensor.ndim != 3 or 0 in tensor.shape[1:]:
        raise MeasureError(f"tokens have shape {tuple(tensor.shape)}: give (batch, tokens, width)")
    if not torch.isfinite(tensor).all():
        raise MeasureError("tokens hold NaN or infinite features")
    return tensor


def rankme(embeddings: Array) -> float:
    """RankMe of the embeddings of many images (Garrido et al. 2023, equation 1).

    exp(-sum_k p_k ln p_k), p_k = s_k / sum(s) + 1e-7, s the singular values of the matrix of
    embeddings, which is not centred. The 1e-7 is part of the definition; it is added to shares, so
    that scale does not matter.

    Args:
        embeddings: (n, width), torch or numpy.

    Returns:
        About 1 to the smaller of n and width.

    Raises:
        MeasureError: another shape, or embeddings that are all 0 or not finite.
    """
    tensor = to_tensor(embeddings)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise MeasureError(f"embeddings have shape {tuple(tensor.shape)}: give (images, width)")
    if not torch.isfinite(tensor).all():
        raise MeasureError("embeddings hold NaN or infinite features")
    if not tensor.any():
        raise MeasureError("the embeddings are all 0, so their RankMe is not defined")
    values = singular_values(tensor)
    return float(torch.special.entr(values / values.sum() + _EPSILON).sum().exp())


class RankMe(Measure):
    """Streaming `rankme`: one vector an image, kept until compute.

    The state is 4 bytes an image, layer and dimension. Images are keyed by their index in the run,
    so merging is a union and exact.

    Args:
        layers: how many, counted from 0.
    """

    info = Info(
        name="rankme",
        title="RankMe",
        unit="dimensions",
        range="1 to the smaller of images and width",
        direction="higher: images differ in more directions of the layer; low: it has collapsed",
        what=(
            "RankMe is how many directions a layer uses to tell images apart: a smooth count of "
            "the dimensions of its image vectors."
        ),
        formula=(
            "exp(-sum_k p_k ln p_k), p_k = s_k / sum(s) + 1e-7, s the singular values of (images, "
            "width), not centred"
        ),
        source="Garrido et al. 2023 (eq. 1); Roy & Vetterli 2007",
        invariances=("orthogonal transformation", "isotropic scaling", "order of images"),
        streams="exact",
        group="tokens",
        interval=(
            "jackknife that leaves out each of 10 groups of images (index modulo 10), t with 9 "
            "degrees of freedom; of the RankMe that as many images have on average; somewhat too "
            "wide with fewer images than dimensions; none below 20 images"
        ),
        null="An untrained twin; independent features of equal variance come near the upper end.",
        caveats=(
            "Grows with the number of images until that is many times the width, so compare values "
            "of the same images only, and with the width in mind. Not centred: a large mean vector "
            "lowers it. A high rank is no proof of a good representation; noise has it."
        ),
        elsewhere=(
            "Garrido et al. take the projector's output over 25,600 images; here it is a layer of "
            "the encoder (mean of patches, or the class token) over the images of the run."
        ),
        bounds=(1, math.inf),
        alike=("width",),
    )
    degrees: ClassVar[float] = GROUPS - 1
    """Of freedom of the t quantile for its interval."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._vectors = ByImage(self.info.name, np.float32)

    def update(self, layer: int, first_image: int, vectors: Tensor) -> None:
        """Add (n, width) vectors of images `first_image` … of one layer.

        Raises:
            MeasureError: vectors that are not finite, or an image that has come before.
        """
        if not torch.isfinite(vectors).all():
            raise MeasureError(f"features are NaN or infinite in layer {layer}")
        self.put(layer, first_image, vectors.detach().float().cpu().numpy())

    def kept(self) -> dict[int, np.ndarray]:
        """layer -> (images, width) float32 vectors, for `put`."""
        return self._vectors.layers()

    def put(self, layer: int, first_image: int, vectors: np.ndarray) -> None:
        """Add images `first_image` … as another instance kept them.

        Raises:
            MeasureError: an image that has come before.
        """
        self._vectors.put(layer, first_image, vectors)

    def merge(self, other: Self) -> None:
        """Add the images of another instance.

        Raises:
            MeasureError: an image that both have seen.
        """
        self._vectors.merge(other._vectors)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Value and standard error, each (layers,) float64.

        The value is nan where all vectors are 0 or there is but one, the error below two images a
        group.
        """
        results = torch.full((2, self._layers), torch.nan, dtype=torch.float64)
        for layer, vectors in self._vectors.layers().items():
            # One image spans one direction whatever the layer.
            if len(vectors) > 1 and vectors.any():
                images = self._vectors.images(layer)
                results[0, layer] = rankme(vectors)
                results[1, layer] = _jackknife_error(vectors, images % GROUPS)
        return results[0], results[1]


def _jackknife_error(vectors: np.ndarray, groups: np.ndarray) -> float:
    if np.bincount(groups, minlength=GROUPS).min() < 2:
        return math.nan
    without = [vectors[groups != group] for group in range(GROUPS)]
    if not all(kept.any() for kept in without):
        return math.nan
    values = np.array([rankme(kept) for kept in without])
    return float(np.sqrt((GROUPS - 1) * values.var()))
