"""A class for every pixel, from a linear map of tokens or from a small pyramid."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitprobe.data.semantic import IGNORED
from vitprobe.evaluation.dense.backbone import Backbone
from vitprobe.evaluation.dense.pyramid import SimpleFeaturePyramid
from vitprobe.evaluation.dense.recipe import DenseRecipe
from vitprobe.models import Model
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods.base import Batch, Method


class Segmenter(Method):
    """Logits of classes for every pixel of square images.

    recipe: with the model's encoder in it. model: whose weights it starts from.
    """

    encoder: Any
    config: Any

    def __init__(self, recipe: DenseRecipe, model: Model, classes: int) -> None:
        nn.Module.__init__(self)
        self.config = recipe.method
        assert recipe.segmenter is not None and recipe.encoder is not None  # noqa: S101, PT018
        self.encoder = Backbone(model, recipe.backbone, recipe.encoder)
        self.head: nn.Module
        if recipe.segmenter.head == "linear":
            norm = _final_norm(model, recipe.encoder).requires_grad_(not recipe.backbone.frozen)
            self.head = Linear(norm, recipe.encoder.width, classes)
        else:
            self.head = MultiScale(recipe.encoder.width, recipe.segmenter.channels, classes)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats over the pixels that count; logs their accuracy."""
        (images,) = batch.views
        logits, labels = self.logits(images), batch.labels
        counts = labels != IGNORED
        number = counts.sum().clamp(min=1)
        # A mean of torch's own would be nan for a batch in which nothing counts.
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / number
        right = ((logits.detach().argmax(dim=1) == labels) & counts).sum() / number
        return loss, {"accuracy": right}

    def logits(self, images: Tensor) -> Tensor:
        """(b, c, size, size) normalised → (b, classes, size, size)."""
        coarse = self.head(self.encoder(images)).float()
        return F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)


class Linear(nn.Module):
    """(b, width, g, g) → (b, classes, g, g): a norm and one linear map of each token."""

    def __init__(self, norm: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, last: Tensor) -> Tensor:
        """The logits."""
        return self.classifier(self.norm(last.movedim(1, -1))).movedim(-1, 1)


class MultiScale(nn.Module):
    """(b, width, g, g) → (b, classes, 4 g, 4 g): maps of all scales, added up at the finest."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(width, channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), LayerNorm2d(channels), nn.GELU()
        )
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, last: Tensor) -> Tensor:
        """The logits."""
        maps = self.pyramid(last)
        size = maps[0].shape[2:]
        total = maps[0]
        for level in maps[1:]:
            total = total + F.interpolate(level, size, mode="bilinear", align_corners=False)
        return self.classifier(self.fuse(total))


def _final_norm(model: Model, encoder: EncoderConfig) -> nn.Module:
    """A copy of the checkpoint's final norm, wherever it has it; a fresh one where it has none."""
    module: Any = model.module
    for norm in (module.norm, module.fc_norm):
        if not isinstance(norm, nn.Identity):
            return copy.deepcopy(norm)
    return nn.LayerNorm(encoder.width, eps=1e-6)


def predicted(logits: Tensor, placed: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """The classes of an image's own pixels: (height, width) uint8.

    Args:
        logits: (classes, size, size) of the square that it was placed in.
        placed: its (height, width) there. original: its own.
    """
    part = logits[None, :, : placed[0], : placed[1]]
    whole = F.interpolate(part, original, mode="bilinear", align_corners=False)
    return whole[0].argmax(dim=0).to(torch.uint8)
