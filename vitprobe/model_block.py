"""What one model gives for one block of images: all that a comparison needs of both.

It is small, it belongs to no run, and it comes from a live model or from a probe file alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vitprobe.capture.features import feature_layouts
from vitprobe.errors import MeasureError, NoRoomError
from vitprobe.measures.attention import AttentionChunk, AttentionMeasure
from vitprobe.measures.chunks import add
from vitprobe.measures.gram import centered_gram
from vitprobe.measures.registry import ATTENTION, SUBSET, TOKENS
from vitprobe.measures.tokens import RankMe, TokenMeasure, TokenPolicy, select_tokens
from vitprobe.models import Anatomy
from vitprobe.models.anatomy import Layout
from vitprobe.models.model import Subject
from vitprobe.samples import SAMPLES, THUMBNAIL, SampleMaps
from vitprobe.settings import Settings
from vitprobe.sites import open_layers
from vitprobe.wording import layers_in_words

POOLED: Final = ("cls", "mean")
"""Policies under which an image is one vector, so that CKA can be exact over all images."""


def check_finite(numbers: Tensor, layer: int) -> None:
    """Raise MeasureError for features of a layer, or a Gram matrix of them, that are not finite."""
    if not torch.isfinite(numbers).all():
        raise MeasureError(f"layer {layer} gives NaN or infinite features")


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is gathered of one model.

    layouts: of its layers.
    policy: which tokens of a layer are compared.
    grams: whether Gram matrices of the layers are wanted.
    subset: of how many of the first images the features are wanted; 0: of none.
    tokens: per-image measures of a layer's tokens.
    rankme: whether one vector an image is wanted of each layer.
    attention: the attention layers that have each measure, where there are any.
    """

    anatomy: Anatomy
    layouts: tuple[Layout, ...]
    policy: TokenPolicy
    grams: bool
    subset: int
    tokens: tuple[str, ...]
    rankme: bool
    attention: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, model: Subject, settings: Settings) -> Wanted:
        """What a run with these settings takes of a model.

        Raises:
            MeasureError: class tokens are to be compared, and the model has none.
        """
        layouts = feature_layouts(model, settings.layers)
        if settings.features and settings.tokens == "cls":
            _check_class_token(model, layouts)
        similarity = settings.similarity
        layers = open_layers(model.anatomy, settings.attention)
        return cls(
            anatomy=model.anatomy,
            layouts=layouts,
            policy=settings.tokens,
            grams=any(name not in SUBSET for name in similarity),
            subset=settings.max_images if any(name in SUBSET for name in similarity) else 0,
            tokens=tuple(name for name in settings.layer_tokens if name in TOKENS),
            rankme="rankme" in settings.layer_tokens,
            attention={name: found for name, found in layers.items() if found},
        )

    @property
    def vectors(self) -> bool:
        """Whether the vectors that Grams are made of are wanted too, for exact CKA."""
        return self.grams and self.policy in POOLED

    @property
    def features(self) -> bool:
        """Whether anything is wanted of layers."""
        return bool(self.grams or self.subset or self.tokens or self.rankme)

    @property
    def rankme_policy(self) -> TokenPolicy:
        """Which vector of an image RankMe takes."""
        return "cls" if self.policy == "cls" else "mean"


def _check_class_token(model: Subject, layouts: Sequence[Layout]) -> None:
    without = [i for i, layout in enumerate(layouts) if layout.prefix_tokens == 0]
    if not model.anatomy.class_token or without:
        where = f" in {layers_in_words(without)}" if 0 < len(without) < len(layouts) else ""
        raise MeasureError(
            f"model '{model.name}' has no class token{where}; use tokens 'patches' or 'mean'"
        )


class ModelBlock:
    """What one model gives for the images `first` … of a run, `count` of them."""

    def __init__(self, wanted: Wanted, first: int, count: int) -> None:
        layers = len(wanted.layouts)
        self.wanted = wanted
        self.first = first
        self.count = count
        self.grams = torch.empty(0)
        """(layers, count, count), symmetric to the last bit, on the model's device."""
        self.vectors: list[Tensor] = []
        """Of each layer (count, width)."""
        self.subset: list[Tensor] = []
        """Of each layer the features (images, numbers) of those of the first `wanted.subset`."""
        self.tokens: dict[str, TokenMeasure] = {name: TOKENS[name]() for name in wanted.tokens}
        self.rankme = RankMe(layers) if wanted.rankme else None
        self.attention: dict[str, AttentionMeasure] = {n: ATTENTION[n]() for n in wanted.attention}
        shown = bool(wanted.attention) and first < SAMPLES
        self.maps = SampleMaps(wanted.anatomy) if shown else None
        self.thumbnails = np.empty((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)
        """Of those of the first `SAMPLES` images."""
        self.halved: tuple[int, int] | None = None
        """Images in a forward pass at first, and in the end, where the device had no more room."""
        self._whole: dict[int, Tensor] = {}
        self._kept: list[list[Tensor]] = [[] for _ in range(layers)]
        self._grams: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}

    def add_features(self, layer: int, first_image: int, tokens: Tensor) -> None:
        """Add a layer's tokens (n, tokens, width) of images `first_image` … of the run.

        Raises:
            MeasureError: features that are not finite, or that a measure is not defined on.
        """
        wanted, layout = self.wanted, self.wanted.layouts[layer]
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        if wanted.subset or wanted.tokens or wanted.rankme:  # a Gram is smaller, and checked later
            check_finite(tokens, layer)
        if wanted.grams or wanted.subset:
            kept = select_tokens(tokens, layout.prefix_tokens, wanted.policy)
            if wanted.grams:
                self._add_compared(layer, first_image, kept)
            if first_image < wanted.subset:
                chosen = kept[: wanted.subset - first_image].flatten(1)
                self._kept[layer].append(chosen.to("cpu", copy=True))
        for measure in self.tokens.values():
            measure.update(layer, first_image, tokens[:, layout.prefix_tokens :], layout.grid)
        if self.rankme is not None:
            vectors = select_tokens(tokens, layout.prefix_tokens, wanted.rankme_policy)
            self.rankme.update(layer, first_image, vectors)

    def _add_compared(self, layer: int, first_image: int, kept: Tensor) -> None:
        """Features that similarity compares; a Gram as soon as those of all images are there."""
        whole = kept
        if len(kept) < self.count:
            begun = self._whole.pop(layer, None)
            whole = self._room(kept) if begun is None else begun
            start = first_image - self.first
            whole[start : start + len(kept)] = kept
            if start + len(kept) < self.count:
                self._whole[layer] = whole
                return
        self._grams[layer] = centered_gram(whole)
        if self.wanted.vectors:
            self._vectors[layer] = whole.clone()

    def _room(self, kept: Tensor) -> Tensor:
        """For a layer of all images, taken as the first of them come: a run that has no room for
        it says so after its first forward pass, and not after its last."""
        try:
            return kept.new_empty((self.count, *kept.shape[1:]))
        except (RuntimeError, MemoryError) as error:
            raise NoRoomError(
                f"features of the {self.count} images of a block, which have to be kept where a "
                f"forward pass takes fewer, here {len(kept)}"
            ) from error

    def add_attention(self, chunk: AttentionChunk) -> None:
        """Add some rows of one attention layer.

        Raises:
            MeasureError: attention that is NaN, or that comes otherwise than a measure needs it.
        """
        layers = self.wanted.attention
        add((m for name, m in self.attention.items() if chunk.layer in layers[name]), chunk)
        if self.maps is not None:
            self.maps.update(chunk)

    def finish(self) -> None:
        """All images have come.

        Raises:
            MeasureError: a layer whose Gram matrix is not finite, or whose attention is NaN.
        """
        for measure in self.attention.values():
            measure.settle()
        if self._grams:
            self.grams = torch.stack([gram for _, gram in sorted(self._grams.items())])
            self._grams.clear()
            finite = torch.isfinite(self.grams).flatten(1).all(1)
            for layer in (~finite).nonzero().flatten().tolist():
                check_finite(self.grams[layer], layer)
        self.vectors = [vectors for _, vectors in sorted(self._vectors.items())]
        self._vectors.clear()
        self.subset = [torch.cat(parts) for parts in self._kept if parts]
        self._kept.clear()
