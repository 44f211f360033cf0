"""What the protocols on frozen features share: their options and one forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitprobe.data.parts import Labelled
from vitprobe.devices import find_device
from vitprobe.errors import MeasureError
from vitprobe.evaluation.base import Learning, labelled_part
from vitprobe.evaluation.features import AUTO, Choice, at_layers, extract, parse_choice
from vitprobe.evaluation.intervals import Interval
from vitprobe.evaluation.subsets import labelled_subset
from vitprobe.models import Model
from vitprobe.scores import Score


@dataclass(frozen=True)
class Banks:
    """Features of the labelled training images and of the test images.

    train, test: (n, p) and (m, p) float32 by choice.
    train_labels, test_labels: (n,) and (m,) int64, on the same device.
    classes: how many there are.
    """

    model: Model
    dataset: str
    train: Mapping[Choice, Tensor]
    test: Mapping[Choice, Tensor]
    train_labels: Tensor
    test_labels: Tensor
    classes: int


@dataclass(frozen=True, kw_only=True)
class FeatureProtocol(Learning):
    """A protocol that judges a model by the features it gives, leaving it as it is.

    features: which, see `vitprobe.evaluation.features.parse_choice`; () for the protocol's usual.
    layers: also those of every layer 0 … L under this convention, a row each: of `features`, by
        default the mean of patches, as a class token says nothing at layer 0.
    """

    features: tuple[str, ...] = ()
    layers: Literal["normed", "residual"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.features,) if isinstance(self.features, str) else tuple(self.features)
        object.__setattr__(self, "features", given)
        if self.layers not in (None, "normed", "residual"):
            raise MeasureError(f"unknown layers '{self.layers}': use 'normed' or 'residual'")

    def output_features(self, model: Model) -> list[Choice]:
        """The features of the model's output."""
        return [parse_choice(text, model) for text in self.features or (AUTO,)]

    def features_of(self, model: Model) -> list[Choice]:
        """All features that are looked at, each once."""
        found = self.output_features(model)
        if self.layers is not None:
            for text in self.features or ("mean",):
                found += at_layers(parse_choice(text, model), model, self.layers)
        return list(dict.fromkeys(found))

    @abstractmethod
    def rows(self, banks: Banks) -> Sequence[Score]:
        """The rows of the features."""

    def run(self, model: Model, data: Labelled, folder: Path | None) -> Sequence[Score]:
        """The rows of one model, after one forward pass of every image."""
        train, train_labels = labelled_part(data, "train")
        test, test_labels = labelled_part(data, "test")
        choices = self.features_of(model)
        chosen = labelled_subset(train_labels, self.labels, self.seed)
        device = find_device(self.device)
        known, asked = extract(
            model,
            [(train, chosen), (test, None)],
            choices,
            batch_size=self.batch_size,
            device=device,
            precision=self.precision,
            workers=self.workers,
            progress=self.progress,
        )
        return self.rows(
            Banks(
                model=model,
                dataset=data.source,
                train=known,
                test=asked,
                train_labels=torch.from_numpy(train_labels[chosen]).to(device),
                test_labels=torch.from_numpy(test_labels).to(device),
                classes=len(data.classes),
            )
        )

    def feature_score(
        self,
        banks: Banks,
        choice: Choice,
        protocol: str,
        value: Interval,
        settings: Mapping[str, Any],
    ) -> Score:
        """A row for one feature."""
        about = {"features": str(choice), **settings}
        if choice.layer is not None:
            about["layers"] = choice.convention
        return self.score(
            banks.model,
            banks.dataset,
            len(banks.test_labels),
            "top1",
            value,
            about,
            protocol=protocol,
            layer=choice.layer,
        )
