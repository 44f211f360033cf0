"""Accuracy of a checkpoint's own classification head: what it was trained to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe.data.blocks import View
from vitprobe.data.parts import Labelled
from vitprobe.devices import find_device
from vitprobe.errors import CheckpointError
from vitprobe.evaluation.base import Passes, Protocol, check_finite, labelled_part, running
from vitprobe.evaluation.batches import pixel_batches
from vitprobe.evaluation.intervals import accuracy_interval
from vitprobe.scores import Score

if TYPE_CHECKING:
    from vitprobe.models import Model


@dataclass(frozen=True, kw_only=True)
class Head(Protocol):
    """Top-1 accuracy of the model's own output on the test images.

    Output j of the model is taken for class j of the data, in the order of its labels.

    Raises:
        CheckpointError: the model has no head, or one of another number of classes.
    """

    name: ClassVar[str] = "head"

    def run(self, model: Model, data: Labelled, folder: Path | None) -> Sequence[Score]:
        part, labels = labelled_part(data, "test")
        check_head(model, data)
        device = find_device(self.device)
        truth = torch.from_numpy(labels).to(device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        first = 0
        passes = Passes(model, lambda pixels: logits_of(model, pixels, len(data.classes)))
        with running(model, device, self.precision):
            batches = pixel_batches(
                part,
                None,
                View(*model.input_size),
                size=self.batch_size,
                workers=self.workers,
                device=device,
            )
            bar = tqdm(total=len(part), unit="image", disable=None if self.progress else True)
            with bar:
                for pixels in batches:
                    for logits in passes(pixels):
                        check_finite(model, "output", logits, first)
                        expected = truth[first : first + len(logits)]
                        hits += (logits.argmax(dim=1) == expected).sum()
                        first += len(logits)
                    bar.update(len(pixels))
        value = accuracy_interval(int(hits), len(part))
        return [self.score(model, data.source, len(part), "top1", value, {})]


def check_head(model: Model, data: Labelled) -> None:
    """Raise CheckpointError where a model says that it has no head for this many classes."""
    classes = getattr(model.module, "num_classes", None)
    if classes == 0:
        raise CheckpointError(
            f"'{model.name}' has no classification head; evaluate its features by knn or linear"
        )
    if isinstance(classes, int) and classes != len(data.classes):
        raise _mismatch(model, classes, len(data.classes))


def logits_of(model: Model, pixels: Tensor, classes: int) -> Tensor:
    """What a model's own head says of images: (n, classes).

    Args:
        model: on the device of `pixels`.
        pixels: (n, channels, height, width) in [0, 1], at its input size.
        classes: how many there have to be.

    Raises:
        CheckpointError: its output is something else.
    """
    inputs = model.normalize(pixels)
    parameter = next(model.module.parameters(), inputs)
    output: Any = model.module(inputs.to(parameter.dtype))
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        output = output.get("logits") if isinstance(output, Mapping) else output.logits
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise CheckpointError(
            f"'{model.name}' has no classification head: its output is not one number for each "
            "class; evaluate its features by knn or linear"
        )
    if output.shape[1] != classes:
        raise _mismatch(model, output.shape[1], classes)
    return output.float()


def _mismatch(model: Model, own: int, classes: int) -> CheckpointError:
    return CheckpointError(
        f"'{model.name}' tells {own} classes apart and the data have {classes}; give data of its "
        "own classes, or evaluate its features by knn or linear"
    )
