"""Supervised classification: Touvron et al., "Training data-efficient image transformers &
distillation through attention" (DeiT), ICML 2021.

Table 9: cross-entropy from the class token, against labels that are smoothed (Szegedy et al. 2016)
and mixed with those of another image, as the images are, by mixup (Zhang et al. 2018) or CutMix
(Yun et al. 2019). Stochastic depth is the encoder's `drop_path`, the rest the augmentation's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder
from vitprobe.training.methods.base import Batch, Method, MethodConfig
from vitprobe.training.mixing import mix


@dataclass(frozen=True)
class SupervisedConfig(MethodConfig):
    """label_smoothing: share of the target spread evenly over all classes.

    mixup, cutmix: alpha of the Beta distribution of the mixing ratio, 0 for none.
    """

    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(
                f"method.label_smoothing must lie in [0, 1), not {self.label_smoothing}."
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise RecipeError(f"method.{name} must be at least 0, not {getattr(self, name)}.")


class Supervised(Method):
    """Cross-entropy of the labels under the encoder's own head."""

    Config = SupervisedConfig
    config: SupervisedConfig
    needs_labels = True

    def __init__(self, config: SupervisedConfig, encoder: EncoderConfig, classes: int) -> None:
        super().__init__(config, encoder, classes)
        self.classes = classes
        self.encoder = self.make_encoder(encoder)

    def make_encoder(self, encoder: EncoderConfig) -> VisionTransformer:
        """The encoder to train, with a head for `self.classes`."""
        return build_encoder(encoder, num_classes=self.classes)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats; logs the accuracy against the labels before they were mixed."""
        images, targets = self.inputs(batch)
        logits = self.encoder.forward_head(self.encode(images))
        accuracy = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        return self.loss_of(logits, targets), {"accuracy": accuracy}

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images as the encoder sees them, and targets (b, classes) that sum to 1, both mixed."""
        (images,) = batch.views
        even = self.config.label_smoothing / self.classes
        targets = images.new_full((len(images), self.classes), even)
        own = even + 1 - self.config.label_smoothing
        targets.scatter_(1, batch.labels[:, None], own)
        return mix(images, targets, batch.draws, mixup=self.config.mixup, cutmix=self.config.cutmix)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of logits (b, classes) against such targets."""
        return F.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Top-1 accuracy, a share of 1."""
        hits = torch.cat([self.encoder(images).argmax(1) == labels for images, labels in batches])
        return {"test_accuracy": hits.double().mean().item()}
