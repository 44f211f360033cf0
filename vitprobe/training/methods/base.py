"""What the loop asks of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.training.augment import Augment
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.randomness import Draws


@dataclass(frozen=True)
class Batch:
    """Images as stored, before augmentation.

    images: (b, channels, height, width) float32 in [0, 1].
    labels: (b,) int64.
    draws: the random numbers of these samples in this epoch.
    """

    images: Tensor
    labels: Tensor
    draws: Draws


@dataclass(frozen=True)
class MethodConfig:
    """A method's own part of a recipe; `name` says which method."""

    name: str


class Method(nn.Module, ABC):
    """An encoder together with what trains it.

    Building one draws its weights from torch's global generator; after that all randomness comes
    from `Batch.draws`. Its parameters and buffers are the whole of its state: they, the optimiser
    and the step are all that a run saves.
    """

    Config: ClassVar[type[MethodConfig]]
    encoder: VisionTransformer

    def __init__(
        self, config: MethodConfig, encoder: EncoderConfig, augment: Augment, classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.augment = augment

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and further scalars worth logging, by name."""

    def evaluate(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores on held-out images (n, c, h, w) in [0, 1] with labels (n,); none by default."""
        return {}
