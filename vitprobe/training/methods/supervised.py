"""Supervised classification from the class token, as ViT (Dosovitskiy et al. 2021) and DeiT do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.augment import Augment
from vitprobe.training.encoder import EncoderConfig, build_encoder
from vitprobe.training.methods.base import Batch, Method, MethodConfig

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class SupervisedConfig(MethodConfig):
    """label_smoothing: share of the target spread evenly over all classes."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(
                f"method.label_smoothing must lie in [0, 1), not {self.label_smoothing}."
            )


class Supervised(Method):
    """Cross-entropy of the labels under the encoder's own head."""

    Config = SupervisedConfig
    config: SupervisedConfig

    def __init__(
        self, config: SupervisedConfig, encoder: EncoderConfig, augment: Augment, classes: int
    ) -> None:
        super().__init__(config, encoder, augment, classes)
        self.encoder = build_encoder(encoder, num_classes=classes)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Label-smoothed cross-entropy in nats; logs the accuracy on the augmented batch."""
        logits = self.encoder(self.augment(batch.images, batch.draws))
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        return loss, {"accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 accuracy, a share of 1."""
        hits = sum(
            int((self.encoder(self.augment.plain(x)).argmax(dim=1) == y).sum())
            for x, y in zip(
                images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True
            )
        )
        return {"test_accuracy": hits / len(labels)}
