"""A training method: rotation prediction, Gidaris et al., ICLR 2018.

"Unsupervised Representation Learning by Predicting Image Rotations": every image is turned by 0,
90, 180 or 270 degrees (section 2.2), and the class token has to say by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder
from vitprobe.training.methods import Batch, Method, MethodConfig

TURNS = 4


# [config]
@dataclass(frozen=True)
class RotationConfig(MethodConfig):
    """turns: how many of the four rotations are asked for, 2 (0 and 180 degrees) or 4."""

    turns: int = TURNS

    def __post_init__(self) -> None:
        if self.turns not in (2, 4):
            raise RecipeError(f"method.turns must be 2 or 4, not {self.turns}.")


# [method]
class Rotation(Method):
    """The encoder, and a linear layer on its class token."""

    Config = RotationConfig
    config: RotationConfig

    def __init__(self, config: RotationConfig, encoder: EncoderConfig, classes: int) -> None:
        super().__init__(config, encoder, classes)
        self.encoder = build_encoder(encoder)
        self.head = nn.Linear(encoder.width, config.turns)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy in nats; logs the share of rotations that were named."""
        (images,) = batch.views
        turns = self.config.turns
        # From the batch's own numbers, so that a run resumes to the last bit.
        target = (batch.draws.uniform("rotation", 1)[:, 0] * turns).long()
        turned = torch.stack([images.rot90(i * TURNS // turns, (2, 3)) for i in range(turns)])
        chosen = turned[target, torch.arange(len(images), device=images.device)]
        logits = self.head(self.encode(chosen)[:, 0])
        accuracy = (logits.detach().argmax(1) == target).float().mean()
        return F.cross_entropy(logits.float(), target), {"accuracy": accuracy}
