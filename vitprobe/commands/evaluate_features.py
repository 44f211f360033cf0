"""Protocols that leave the model as it is: its own head, k-NN and a linear classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vitprobe.commands.evaluate import EvaluateCommand, LearningCommand


@dataclass
class EvaluateHead(EvaluateCommand):
    """Accuracy of the checkpoint's own classification head on the test images."""

    protocol: ClassVar[str] = "head"


@dataclass
class FeaturesCommand(LearningCommand):
    """Base of the commands of protocols on frozen features."""

    features: tuple[str, ...] = ()
    """What of the model's tokens: auto (what its own head reads), cls, mean, cls+mean, and of the
    last n blocks, such as cls4, mean4, cls4+mean."""
    layers: Literal["normed", "residual"] | None = None
    """Also at every layer, under this convention; of the mean of patches, unless features are
    given."""


@dataclass
class EvaluateKnn(FeaturesCommand):
    """Accuracy by weighted k nearest neighbours among the training images, by cosine."""

    protocol: ClassVar[str] = "knn"

    k: tuple[int, ...] = (20,)
    """Neighbours that vote; a score for each number."""
    temperature: float = 0.07
    """Of the votes' weights exp(cosine / temperature)."""


@dataclass
class EvaluateLinear(FeaturesCommand):
    """Accuracy of a linear classifier on frozen features; the best of a grid of features and
    penalties, chosen on held-out training images."""

    protocol: ClassVar[str] = "linear"

    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Strengths of the L2 penalty to choose from."""


@dataclass
class EvaluateFrozen(EvaluateLinear, EvaluateKnn):
    """knn and linear from one forward pass."""

    protocol: ClassVar[str] = "frozen"
