"""The protocol `linear`: a linear classifier on frozen features.

DINOv2 (Oquab et al. 2024) trains linear classifiers for a grid of learning rates and feature
choices at once and reports the best. Here features are computed once and every classifier is
brought to its optimum (`vitprobe.evaluation.logistic`), as CLIP (Radford et al. 2021, appendix A.3)
does, so that the grid is one of feature choices and strengths of the L2 penalty. The best is chosen
on images held out from the *training* images, then fitted to all of them; test images choose
nothing. There is no augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.evaluation.features import AUTO, Choice, parse_choice
from vitprobe.evaluation.intervals import accuracy_interval
from vitprobe.evaluation.logistic import ROUGH, Classifier, Regression
from vitprobe.evaluation.pooled import Banks, FeatureProtocol
from vitprobe.evaluation.subsets import held_out
from vitprobe.models import Model
from vitprobe.scores import Score

HELD_OUT: Final = 0.2
"""Share of the training images of each class that the best classifier is chosen by."""
_ENOUGH: Final = 200
"""Held-out images in all; where one split has fewer, up to `_SPLITS` are made."""
_SPLITS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Linear(FeatureProtocol):
    """Top-1 accuracy of a linear classifier on frozen features.

    Of the model's output one row: the best of `features`, by default what the model's own head
    reads, and class token and mean of patches side by side. By layer one row each.

    l2: strengths of the penalty to choose from, see `vitprobe.evaluation.logistic`.
    """

    name: ClassVar[str] = "linear"

    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.l2,) if isinstance(self.l2, (int, float)) else tuple(dict.fromkeys(self.l2))
        object.__setattr__(self, "l2", given)
        if not given or not all(0 < strength < math.inf for strength in given):
            raise MeasureError(
                f"l2 of {', '.join(map(str, given)) or 'nothing'} is no strength of a penalty; "
                "give numbers above 0"
            )

    def output_features(self, model: Model) -> list[Choice]:
        """The features of the model's output among which to choose."""
        if self.features:
            return super().output_features(model)
        return usual_choices(model)

    def rows(self, banks: Banks) -> Sequence[Score]:
        """One row for the output, and one for each feature of each layer."""
        choices = self.features_of(banks.model)
        output = [choice for choice in choices if choice.layer is None]
        groups = [output, *([choice] for choice in choices if choice.layer is not None)]
        return [self._row(banks, group) for group in groups]

    def _row(self, banks: Banks, choices: Sequence[Choice]) -> Score:
        choice, l2, about = _best(banks, choices, self.l2, self.seed)
        regression = Regression(banks.train[choice], banks.train_labels, banks.classes)
        ((_, classifier),) = regression.path([l2])
        hits = _hits(classifier, banks.test[choice], banks.test_labels)
        settings = {"l2": l2, **about}
        if len(choices) > 1:
            settings["chosen_among"] = [str(other) for other in choices]
        value = accuracy_interval(hits, len(banks.test_labels))
        return self.feature_score(banks, choice, "linear", value, settings)


def usual_choices(model: Model) -> list[Choice]:
    """What is chosen among unless the user says otherwise: features of the last block."""
    own, both = (parse_choice(text, model) for text in (AUTO, "cls+mean"))
    return list(dict.fromkeys([own, both]))


def _best(
    banks: Banks, choices: Sequence[Choice], strengths: Sequence[float], seed: int
) -> tuple[Choice, float, dict[str, Any]]:
    """The features and strength with the most hits on held-out training images.

    Of equals the first features, and the strongest penalty, are taken.
    """
    labels = banks.train_labels.cpu().numpy()
    splits = [held_out(labels, HELD_OUT, seed)]
    kept = len(splits[0][1])
    if kept == 0:
        nearest = min(strengths, key=lambda l2: abs(math.log(l2 * len(labels))))
        return choices[0], nearest, {"held_out": 0}
    if len(choices) == len(strengths) == 1:
        return choices[0], strengths[0], {}
    while kept * len(splits) < _ENOUGH and len(splits) < _SPLITS:
        splits.append(held_out(labels, HELD_OUT, seed + len(splits)))
    hits = {(choice, l2): 0 for choice in choices for l2 in sorted(strengths, reverse=True)}
    for split in splits:
        fitted, chosen = (torch.from_numpy(index).to(banks.train_labels.device) for index in split)
        truth = banks.train_labels[chosen]
        for choice in choices:
            features = banks.train[choice]
            regression = Regression(features[fitted], banks.train_labels[fitted], banks.classes)
            losses: list[float] = []
            for l2, classifier in regression.path(strengths, ROUGH):
                logits = classifier.logits(features[chosen])
                hits[choice, l2] += int((logits.argmax(dim=1) == truth).sum())
                losses.append(float(torch.nn.functional.cross_entropy(logits, truth)))
                # Ever weaker penalties take ever longer, and from here on overfit.
                if len(splits) == 1 and losses[-1] > losses[max(-2, -len(losses))]:
                    break
    choice, l2 = max(hits, key=lambda key: hits[key])
    return choice, l2, {"held_out": kept, "splits": len(splits)}


def _hits(classifier: Classifier, features: Tensor, labels: Tensor) -> int:
    hits = torch.zeros((), dtype=torch.int64, device=features.device)
    for rows, truth in zip(features.split(8192), labels.split(8192), strict=True):
        hits += (classifier.logits(rows).argmax(dim=1) == truth).sum()
    return int(hits)
