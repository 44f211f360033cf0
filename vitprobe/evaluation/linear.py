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
from vitprobe.evaluation.logistic import Classifier, Regression
from vitprobe.evaluation.pooled import Banks, FeatureProtocol
from vitprobe.evaluation.subsets import held_out
from vitprobe.models import Model
from vitprobe.scores import Score

HELD_OUT: Final = 0.2
"""Share of the training images of each class that the best classifier is chosen by."""
_ENOUGH: Final = 200
"""Held-out images in all; where one split has fewer, up to `_SPLITS` are made."""
_SPLITS: Final = 5
_CLASS_CHOICES: Final = ("cls", "cls+mean", "cls4", "cls4+mean")


@dataclass(frozen=True, kw_only=True)
class Linear(FeatureProtocol):
    """Top-1 accuracy of a linear classifier on frozen features.

    Of the model's output one row: the best of `features`, by default DINOv2's four (class token,
    class and mean, each of the last block and of the last four). By layer one row each.

    l2: strengths of the penalty to choose from, see `vitprobe.evaluation.logistic`.
    """

    name: ClassVar[str] = "linear"

    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.l2,) if isinstance(self.l2, (int, float)) else tuple(self.l2)
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
        # The stronger ones come first, as a way to this one.
        *_, (_, classifier) = regression.path([other for other in self.l2 if other >= l2])
        hits = _hits(classifier, banks.test[choice], banks.test_labels)
        settings = {"l2": l2, **about}
        if len(choices) > 1:
            settings["chosen_among"] = [str(other) for other in choices]
        value = accuracy_interval(hits, len(banks.test_labels))
        return self.feature_score(banks, choice, "linear", value, settings)


def usual_choices(model: Model) -> list[Choice]:
    """DINOv2's feature choices, as far as the model has them."""
    own = parse_choice(AUTO, model)
    deep = model.anatomy.plain and len(model.anatomy.blocks) >= 4
    if parse_choice("cls", model).pool == "mean":
        return [own, *([parse_choice("mean4", model)] if deep else [])]
    texts = [text for text in _CLASS_CHOICES if deep or "4" not in text]
    return list(dict.fromkeys([own, *(parse_choice(text, model) for text in texts)]))


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
            for l2, classifier in regression.path(strengths):
                logits = classifier.logits(features[chosen])
                hits[choice, l2] += int((logits.argmax(dim=1) == truth).sum())
                losses.append(float(torch.nn.functional.cross_entropy(logits, truth)))
                # Ever weaker penalties take ever longer, and from here on overfit.
                if len(splits) == 1 and len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
                    break
    choice, l2 = max(hits, key=lambda key: hits[key])
    return choice, l2, {"held_out": kept, "splits": len(splits)}


def _hits(classifier: Classifier, features: Tensor, labels: Tensor) -> int:
    hits = torch.zeros((), dtype=torch.int64, device=features.device)
    for rows, truth in zip(features.split(8192), labels.split(8192), strict=True):
        hits += (classifier.logits(rows).argmax(dim=1) == truth).sum()
    return int(hits)
