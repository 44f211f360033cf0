"""Attention rollout: how attention adds up over blocks.

Source: Abnar & Zuidema 2020 ("Quantifying Attention Flow in Transformers").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, like
from vitprobe.measures.base import Info
from vitprobe.measures.by_image import OVER_IMAGES
from vitprobe.measures.chunks import (
    NOT_MOVED,
    ONLY_PATCHES,
    AttentionChunk,
    MapMeasure,
    PerImage,
    checked,
    expected_distance,
    mean_of_defined,
    normalized,
    pairwise_distance,
)

Fusion = Literal["mean", "max"]


def attention_rollout(
    attentions: Sequence[A], *, fusion: Fusion = "mean", discard: float = 0.0
) -> A:
    """Attention of every block's output to the input tokens, through all blocks below it.

    R_l = W_l ... W_1, where W = (A + I) with rows divided by their sums, A the attention of a block
    with its heads fused and I the residual connection.

    Args:
        attentions: post-softmax attention of the blocks in order, each (batch, heads, tokens,
            tokens); torch or numpy.
        fusion: over heads, `mean` (Abnar & Zuidema 2020) or `max`.
        discard: share of the weights of each image's fused map, the smallest, that is set to 0; the
            first token's attention to itself is kept.

    Returns:
        (blocks, batch, tokens, tokens), rows sum to 1; the kind of array given.

    Raises:
        MeasureError: no block, unknown fusion, a share outside [0, 1), blocks that do not fit each
            other, or values that are no attention.
    """
    if len(attentions) == 0:
        raise MeasureError("no attention given: rollout needs the attention of every block")
    if fusion not in ("mean", "max"):
        raise MeasureError(f"unknown fusion '{fusion}': use 'mean' or 'max'")
    if not 0 <= discard < 1:
        raise MeasureError(f"a share of {discard} cannot be discarded; give 0 to below 1")
    maps: list[Tensor] = []
    for block, attention in enumerate(attentions):
        fused = _fused(checked(attention, 0), fusion)
        shape = maps[0].shape if maps else (len(fused), fused.shape[-1], fused.shape[-1])
        if fused.shape != shape:
            raise MeasureError(
                f"the attention of block {block} has {len(fused)} images, {fused.shape[1]} queries "
                f"and {fused.shape[2]} keys: rollout needs as many tokens in every block"
            )
        weights = _weights(_without_smallest(fused, discard))
        maps.append(weights @ maps[-1] if maps else weights)
    return like(torch.stack(maps), attentions[0])


def _fused(attention: Tensor, fusion: Fusion) -> Tensor:
    """(batch, queries, keys)"""
    return attention.mean(1) if fusion == "mean" else attention.amax(1)


def _without_smallest(fused: Tensor, discard: float) -> Tensor:
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * discard), largest=False).indices
    flat = flat.scatter(1, smallest, 0)
    flat[:, 0] = fused[:, 0, 0]
    return flat.view_as(fused)


def _weights(fused: Tensor) -> Tensor:
    """Fused attention with the residual connection, rows summing to 1."""
    return normalized(fused + torch.eye(fused.shape[-1]).to(fused))


_CAVEATS = (
    "Takes the residual connection to weigh as much as attention and leaves value vectors and MLPs "
    "out, so it is a picture of the attention maps and no measure of what flows. Under uniform "
    "attention it is below the uniform distance, since each block keeps half of every token: after "
    "l blocks without prefix tokens it is 1 - 2^-l of it. It tends to grow with depth whatever the "
    f"model does. {ONLY_PATCHES}"
)
_NULL = (
    "Relative units divide by the mean distance between two patches of the grid, which deep "
    "rollout tends to under any broad attention; an untrained twin says how fast."
)


class RolloutDistance(MapMeasure):
    """Streaming attention distance over patches of `attention_rollout`, after every block.

    The blocks of an image come in ascending order, from 0. The state in between is one map (tokens
    x tokens) for every image of the forward pass at hand.
    """

    info = Info(
        name="rollout_distance",
        title="Rollout distance",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a patch's representation draws on patches further away",
        what=(
            "How far away the patches lie that a patch's representation draws on, when attention "
            "is followed through all blocks down to the input."
        ),
        formula=(
            "attention distance of R_l = W_l R_(l-1), W = (mean over heads of A + I) with rows "
            "divided by their sums; R over patch keys only"
        ),
        source="Abnar & Zuidema 2020; distance as Dosovitskiy et al. 2021 (app. D.7)",
        invariances=NOT_MOVED,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=_NULL,
        caveats=_CAVEATS,
        elsewhere=(
            "vit-explain draws the class token's row of the same product; its distance by block "
            "was found nowhere else."
        ),
        bounds=(0, math.inf),
    )
    asks = "places"
    relative = True
    per_block = True
    fusion: Fusion = "mean"

    def __init__(self) -> None:
        super().__init__()
        self._products: dict[int, tuple[int, Tensor]] = {}

    @classmethod
    def uniform(cls, chunk: AttentionChunk) -> float | None:
        return float(chunk.distance.mean()) or None

    def part(self, chunk: AttentionChunk) -> tuple[Tensor, ...]:
        return (_fused(chunk.log_p.exp(), self.fusion),)

    def join(self, before: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([*before, *part], dim=1),)

    def finish(self, chunk: AttentionChunk, content: tuple[Tensor, ...]) -> PerImage:
        (fused,) = content
        if fused.shape[1] != fused.shape[2]:
            raise MeasureError(
                f"{self.info.name}: layer {chunk.layer} has {fused.shape[1]} queries and "
                f"{fused.shape[2]} keys; rollout needs blocks in which all tokens attend to all"
            )
        product = self._multiplied(chunk, _weights(fused))
        patches = normalized(product[:, chunk.key_prefix :, chunk.key_prefix :])
        if chunk.key_xy is None:
            raise MeasureError(
                f"{self.info.name}: where the patches of attention layer {chunk.layer} lie is not "
                "known"
            )
        distance = pairwise_distance(chunk.key_xy, chunk.key_xy)
        rows = expected_distance(patches, distance)[:, None]
        value = mean_of_defined(rows).cpu().numpy()
        return PerImage(value, rows.isnan().sum(-1).cpu().numpy().astype(np.int32))

    def _multiplied(self, chunk: AttentionChunk, weights: Tensor) -> Tensor:
        """The rollout up to this block, kept for the next."""
        images = range(chunk.first_image, chunk.first_image + len(weights))
        if chunk.layer == 0:
            # Block 0 begins a forward pass; what the last one carried through its blocks is done.
            self._products = {i: kept for i, kept in self._products.items() if kept[0] == 0}
            product = weights
        else:
            below = [self._products.get(image, (None, weights[0])) for image in images]
            for image, (layer, kept) in zip(images, below, strict=True):
                if layer != chunk.layer - 1 or kept.shape != weights.shape[1:]:
                    raise MeasureError(
                        f"{self.info.name}: block {chunk.layer} of image {image} does not follow "
                        f"block {chunk.layer - 1} of as many tokens; give every block in order"
                    )
            product = weights @ torch.stack([kept for _, kept in below])
        for image, rollout in zip(images, product.unbind(), strict=True):
            self._products[image] = chunk.layer, rollout
        return product

    def compute(self) -> dict[int, PerImage]:
        layers = super().compute()
        for layer in layers:
            if not np.array_equal(self._sums.images(layer), self._sums.images(0)):
                raise MeasureError(
                    f"{self.info.name}: block {layer} has not seen the images that block 0 has; "
                    "give every block of every image"
                )
        return layers


class MaxRolloutDistance(RolloutDistance):
    """`RolloutDistance` with the maximum over heads."""

    info = Info(
        name="rollout_distance_max",
        title="Rollout distance (maximum over heads)",
        unit="px",
        range="0 to the image's diagonal",
        direction="higher: a patch's representation draws on patches further away",
        what=(
            "Rollout distance where a block's heads are fused by their maximum, which lets a "
            "single head with a sharp view speak for its block."
        ),
        formula=(
            "attention distance of R_l = W_l R_(l-1), W = (max over heads of A + I) with rows "
            "divided by their sums; R over patch keys only"
        ),
        source="Abnar & Zuidema 2020, with the maximum of Gildenblat's vit-explain",
        invariances=NOT_MOVED,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=_NULL,
        caveats=(
            "The maximum sums to more than 1, so that attention outweighs the residual connection "
            f"the more the heads differ. {_CAVEATS}"
        ),
        elsewhere=(
            "vit-explain divides column j by the sum of row j (a missing keepdim), so that for the "
            "maximum, or weights discarded, its rows do not sum to 1."
        ),
        bounds=(0, math.inf),
    )
    fusion = "max"
