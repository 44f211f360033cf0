"""Attention distance and its quantiles, and sink mass; the list of all measures of attention.

Each is a mean over query rows of a quantity of one row of post-softmax attention. Unless the name
says otherwise, queries and keys are patch tokens only and rows are renormalised over patch keys, so
that what a row sends to prefix tokens (class token, registers) is reported apart, as sink mass.

Sources: Dosovitskiy et al. 2021 ("An Image is Worth 16x16 Words", appendix D.7, mean attention
distance), Raghu et al. 2021 ("Do Vision Transformers See Like Convolutional Neural Networks?",
section 4), Wang et al. 2023 ("A Closer Look at Self-Supervised Lightweight Vision Transformers").

A row without mass on patch keys has no renormalised distance: it is left out of the mean
and counted, and a mean over no rows at all is nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, Array, like, to_tensor
from vitprobe.measures.base import Info
from vitprobe.measures.by_image import OVER_IMAGES
from vitprobe.measures.chunks import (
    NO_PLACE,
    NOT_MOVED,
    ONLY_PATCHES,
    AttentionChunk,
    AttentionMeasure,
    MapMeasure,
    PerImage,
    RowMeasure,
    checked,
    distance_quantile,
    expected_distance,
    grid_positions,
    mass_within,
    mean_of_defined,
    normalized,
    pairwise_distance,
    uniform_distance,
)
from vitprobe.measures.entropy import (
    AllTokensAttentionEntropy,
    AttentionEntropy,
    ClassAttentionEntropy,
    RawAttentionEntropy,
    attention_entropy,
    class_attention_entropy,
)
from vitprobe.measures.heads import AttentionNMI, HeadDivergence, HeadDivergenceKL
from vitprobe.measures.rollout import MaxRolloutDistance, RolloutDistance


def _placed(
    attention: Array,
    grid: tuple[int, int] | None,
    positions: tuple[Array, Array] | None,
    patch_size: float | tuple[float, float],
    prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Rows of patch queries over patch keys, and the distances (queries, keys) they go."""
    tensor = checked(attention, prefix_tokens)
    if grid is not None and positions is None:
        query_xy = key_xy = grid_positions(grid, patch_size)
    elif positions is not None and grid is None:
        query_xy, key_xy = (to_tensor(points).double() for points in positions)
    else:
        raise MeasureError("give either grid=(rows, columns) or positions=(query_xy, key_xy)")
    rows = tensor[..., prefix_tokens:, prefix_tokens:]
    if tuple(rows.shape[-2:]) != (len(query_xy), len(key_xy)):
        raise MeasureError(
            f"attention has {rows.shape[-2]} patch queries and {rows.shape[-1]} patch keys after "
            f"{prefix_tokens} prefix tokens, but the positions given are for {len(query_xy)} and "
            f"{len(key_xy)}"
        )
    return rows, pairwise_distance(query_xy, key_xy)


def attention_distance(
    attention: A,
    *,
    grid: tuple[int, int] | None = None,
    positions: tuple[Array, Array] | None = None,
    patch_size: float | tuple[float, float] = 16,
    prefix_tokens: int = 0,
    renormalize: bool = True,
) -> A:
    """Mean attention distance of each image and head, in pixels.

    The mean over patch queries of the expected distance between the query's and the keys' centres
    (Dosovitskiy et al. 2021, appendix D.7).

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        grid: (rows, columns) of patches when queries and keys are the same row-major grid.
        positions: instead of `grid`, ((queries, 2), (keys, 2)) centres in pixels of patch tokens.
        patch_size: pixels per patch of `grid`: one number or (height, width).
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.
        renormalize: divide each row by its mass on patch keys; otherwise what goes to prefix tokens
            counts as distance 0.

    Returns:
        (batch, heads), the kind of array given; nan where no query has mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    rows, distance = _placed(attention, grid, positions, patch_size, prefix_tokens)
    if renormalize:
        rows = normalized(rows)
    return like(mean_of_defined(expected_distance(rows, distance)), attention)


def attention_distance_quantile(
    attention: A,
    quantile: float,
    *,
    grid: tuple[int, int] | None = None,
    positions: tuple[Array, Array] | None = None,
    patch_size: float | tuple[float, float] = 16,
    prefix_tokens: int = 0,
) -> A:
    """Mean over patch queries of a quantile of attention distance, in pixels.

    The quantile of a query is the smallest distance within which lies at least that share of its
    attention, renormalised over patch keys.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        quantile: between 0 and 1, such as 0.9.
        grid: as in `attention_distance`; so are the other arguments.
        positions: instead of `grid`, centres in pixels of patch tokens.
        patch_size: pixels per patch of `grid`.
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.

    Returns:
        (batch, heads), the kind of array given; nan where no query has mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, values that are no attention, or a quantile outside
            (0, 1).
    """
    if not 0 < quantile < 1:
        raise MeasureError(f"a quantile of {quantile} is none; give one between 0 and 1")
    rows, distance = _placed(attention, grid, positions, patch_size, prefix_tokens)
    within = mass_within(normalized(rows), distance)
    return like(mean_of_defined(distance_quantile(within, quantile)), attention)


def sink_mass(attention: A, *, prefix_tokens: int) -> A:
    """Mean attention mass that patch queries send to prefix tokens, for each image and head.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        prefix_tokens: leading tokens that are no patches.

    Returns:
        (batch, heads), shares between 0 and 1, the kind of array given.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    tensor = checked(attention, prefix_tokens)
    rows = tensor[..., prefix_tokens:, :prefix_tokens].sum(-1)
    return like(rows.mean(-1), attention)


_DISTANCES_ELSEWHERE = (
    "Wang et al.'s mae-lite takes 14 px a token for patches of 16 px (101.9 instead of 116.5 px "
    "under uniform attention on 14 x 14) and averages batches of unequal size alike; cl-vs-mim "
    "renormalises as here, with 1e-32 added to the mass; Dosovitskiy et al., Raghu et al. and the "
    "Keras example do not renormalise (attention_distance_raw)."
)


class AttentionDistance(RowMeasure):
    """Streaming `attention_distance`, renormalised over patch keys."""

    info = Info(
        name="attention_distance",
        title="Attention distance",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a head looks further away from each patch",
        what=(
            "Attention distance is how far, on average, a head looks from the patch that asks: low "
            "means local, high means global."
        ),
        formula="mean over patch queries q of sum_k p(k|q) |x_q - x_k|, p over patch keys only",
        source="Dosovitskiy et al. 2021 (app. D.7); Raghu et al. 2021 (sec. 4); Wang et al. 2023",
        invariances=NOT_MOVED,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=(
            "Uniform attention gives the mean distance between two patches of the grid, which "
            "relative units divide by; untrained models lie near it."
        ),
        caveats=(
            "Pixels of the model's own input, so that models of other input sizes compare in "
            "relative units only. A head that always looks at one far patch and a head that "
            "spreads its attention evenly can share a distance: read the entropy and the quantiles "
            f"with it. {ONLY_PATCHES}"
        ),
        elsewhere=_DISTANCES_ELSEWHERE,
        bounds=(0, math.inf),
    )

    asks = "places"
    relative = True
    mapless = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        if chunk.rows.distance is None:
            raise chunk.unplaced
        return chunk.rows.distance[..., chunk.query_prefix :]


class RawAttentionDistance(RowMeasure):
    """Streaming `attention_distance(renormalize=False)`."""

    info = Info(
        name="attention_distance_raw",
        title="Attention distance (not renormalised)",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a head looks further away from each patch",
        what=(
            "Attention distance where the attention that goes to prefix tokens counts as distance "
            "0, as in the first papers that used it."
        ),
        formula="mean over patch queries q of sum over patch keys k of p(k|q) |x_q - x_k|",
        source="Dosovitskiy et al. 2021 (app. D.7); Raghu et al. 2021 (sec. 4)",
        invariances=NOT_MOVED,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=(
            "Uniform attention over all tokens gives the mean distance between two patches times "
            "the patches' share of the tokens."
        ),
        caveats=(
            "A head that sends its attention to the class token looks local here: with nine tenths "
            "there, uniform attention to patches falls to a tenth of its distance."
        ),
        elsewhere=_DISTANCES_ELSEWHERE,
        bounds=(0, math.inf),
    )

    asks = "places"
    relative = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return expected_distance(chunk.patch_log_p.exp(), chunk.distance)


def _quantile_info(name: str, percent: int) -> Info:
    return Info(
        name=name,
        title=f"Attention distance, {percent} % quantile",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a head looks further away from each patch",
        what=(
            f"The distance from a patch within which {percent} % of its attention lies, which "
            "tells a head that looks near and far apart from one that looks halfway."
        ),
        formula=(
            "mean over patch queries q of the smallest d with sum over |x_q - x_k| <= d of p(k|q) "
            f">= {percent / 100}, p over patch keys only"
        ),
        source="quantiles of the distance of Dosovitskiy et al. 2021 (app. D.7); defined here",
        invariances=NOT_MOVED,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="Its value under uniform attention on the same grid, which relative units divide by.",
        caveats=(
            "Takes only the distances that occur between patches, so that a row moves in steps of "
            "about a patch; a mean over patches of quantiles, not a quantile of all rows together. "
            f"{ONLY_PATCHES}"
        ),
        elsewhere="No other package was found to report it.",
        bounds=(0, math.inf),
    )


class _AttentionDistanceQuantile(RowMeasure):
    asks = "places"
    relative = True
    quantile: ClassVar[float]

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return distance_quantile(chunk.within, self.quantile)


class AttentionDistanceQ10(_AttentionDistanceQuantile):
    """Streaming `attention_distance_quantile(quantile=0.1)`."""

    info = _quantile_info("attention_distance_q10", 10)
    quantile = 0.1


class AttentionDistanceQ50(_AttentionDistanceQuantile):
    """Streaming `attention_distance_quantile(quantile=0.5)`."""

    info = _quantile_info("attention_distance_q50", 50)
    quantile = 0.5


class AttentionDistanceQ90(_AttentionDistanceQuantile):
    """Streaming `attention_distance_quantile(quantile=0.9)`."""

    info = _quantile_info("attention_distance_q90", 90)
    quantile = 0.9


class SinkMass(RowMeasure):
    """Streaming `sink_mass`."""

    info = Info(
        name="sink_mass",
        title="Sink mass",
        unit="share",
        range="0 to 1",
        direction="higher: patches send more of their attention to the class token and registers",
        what=(
            "Sink mass is the share of a patch's attention that goes to prefix tokens (class "
            "token, registers); distance and entropy describe only the rest."
        ),
        formula="mean over patch queries q of sum over prefix keys of p(k|q)",
        source="Darcet et al. 2024; Xiao et al. 2024 on attention sinks",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="Uniform attention gives the prefix tokens' share of all tokens.",
        caveats=(
            "0 by construction in a model without prefix tokens, where patches themselves may "
            "become sinks, which this does not see (see norm_outliers)."
        ),
        elsewhere="Not reported by mae-lite, Raghu et al. or cl-vs-mim, whose distances hide it.",
        bounds=(0, 1),
    )

    asks = "patches"
    mapless = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return chunk.rows.sink[..., chunk.query_prefix :]


ATTENTION_MEASURES: Sequence[type[AttentionMeasure]] = (
    AttentionDistance,
    RawAttentionDistance,
    AttentionDistanceQ10,
    AttentionDistanceQ50,
    AttentionDistanceQ90,
    AttentionEntropy,
    RawAttentionEntropy,
    AllTokensAttentionEntropy,
    ClassAttentionEntropy,
    SinkMass,
    AttentionNMI,
    HeadDivergence,
    HeadDivergenceKL,
    RolloutDistance,
    MaxRolloutDistance,
)

__all__ = [
    "ATTENTION_MEASURES",
    "AllTokensAttentionEntropy",
    "AttentionChunk",
    "AttentionDistance",
    "AttentionDistanceQ10",
    "AttentionDistanceQ50",
    "AttentionDistanceQ90",
    "AttentionEntropy",
    "AttentionMeasure",
    "ClassAttentionEntropy",
    "MapMeasure",
    "PerImage",
    "RawAttentionDistance",
    "RawAttentionEntropy",
    "RowMeasure",
    "SinkMass",
    "attention_distance",
    "attention_distance_quantile",
    "attention_entropy",
    "class_attention_entropy",
    "grid_positions",
    "pairwise_distance",
    "sink_mass",
    "uniform_distance",
]
