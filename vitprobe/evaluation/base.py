"""What every protocol of evaluation shares: its options, its data, and how its rows are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from vitprobe.data.labelled import Labelled, load_labelled
from vitprobe.data.parts import Labels, Part
from vitprobe.devices import computing, halved, placed
from vitprobe.errors import DataError, MeasureError, VitprobeError, is_out_of_memory
from vitprobe.evaluation.intervals import Interval
from vitprobe.scores import Score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vitprobe.models import Model

Precision = Literal["fp32", "bf16"]
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """One way to evaluate a model: a subclass a protocol, its options as fields.

    Fields hold what was asked for and nothing else, so that they can be recorded as they are. A
    protocol that runs long keeps what it needs to go on in the folder of the evaluation, and lists
    in `keeps` what it writes there.

    batch_size: images in one forward pass.
    device: `auto` (CUDA or MPS where there is one), or a torch device.
    precision: `fp32` (TF32 and autocast off) or `bf16` autocast.
    workers: threads or processes that decode images ahead.
    progress: show a progress bar on stderr where that is a terminal.

    Raises:
        VitprobeError: an option that cannot be followed.
    """

    name: ClassVar[str]
    """As in `Score.protocol` and on the command line."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Files and folders that it leaves beside scores.json; () where it makes nothing else."""

    batch_size: int = 128
    device: str = "auto"
    precision: Precision = "fp32"
    workers: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        for what, number in (("batch size", self.batch_size), ("number of workers", self.workers)):
            if number < 1:
                raise DataError(f"a {what} of {number} is none; give 1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise VitprobeError(f"unknown precision '{self.precision}': use 'fp32' or 'bf16'")

    def read(self, data: Any) -> Any:
        """The data to evaluate on, from what the user gave; by default labelled images."""
        return load_labelled(data)

    @abstractmethod
    def run(self, model: Model, data: Any, folder: Path | None) -> Sequence[Score]:
        """The rows of one model.

        Args:
            data: what `read` returned.
            folder: that of the evaluation, where `keeps` names something; else None.
        """

    def score(
        self,
        model: Model,
        dataset: str,
        images: int,
        metric: str,
        value: Interval,
        settings: Mapping[str, Any],
        **more: Any,
    ) -> Score:
        """A row of this protocol; `more` are other fields of `Score`."""
        own = {"protocol": self.name, **more}
        return Score(
            model=model.name,
            spec=model.spec,
            dataset=dataset,
            images=images,
            metric=metric,
            value=value.value,
            low=value.low,
            high=value.high,
            sha256=model.sha256 or "",
            settings=dict(settings),
            **own,
        )


@dataclass(frozen=True, kw_only=True)
class Learning(Protocol):
    """A protocol that learns from labelled training images.

    labels: share of them to use, drawn by `vitprobe.evaluation.subsets.labelled_subset`.
    seed: of all draws.
    """

    labels: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.labels <= 1:
            raise DataError(f"a share of labels of {self.labels:g} is none; give one in (0, 1]")
        if self.seed < 0:
            raise DataError(f"a seed of {self.seed} is none; give 0 or more")

    def score(self, *args: Any, **more: Any) -> Score:
        """A row of this protocol, with its share of labels and seed."""
        return super().score(*args, **{"labels": self.labels, "seed": self.seed, **more})


def labelled_part(data: Labelled, which: Literal["train", "test"]) -> tuple[Part, Labels]:
    """The training or the test images, and their labels (n,).

    Raises:
        DataError: there are none, or they have no labels.
    """
    part = data.train if which == "train" else data.test
    what = "training" if which == "train" else "test"
    if part is None or len(part) == 0:
        raise DataError(
            f"'{data.source}' holds no {what} images; give 'train={data.source},test=…' with a "
            "folder, archive or other source of them"
        )
    if part.labels is None:
        raise DataError(
            f"the {what} images of '{data.source}' have no labels; keep them in one folder a class"
        )
    return part, part.labels


@contextmanager
def running(model: Model, device: torch.device, precision: Precision) -> Iterator[None]:
    """A model on its device, in eval mode, without gradients, in the precision asked for; all is as
    it was afterwards."""
    # A module of the user's own may keep what it computes, and could not train with inference
    # tensors later.
    grad_off = torch.no_grad() if model.spec == "module" else torch.inference_mode()
    with ExitStack() as stack:
        stack.enter_context(computing(device, precision))
        stack.enter_context(placed(model.module, device))
        stack.enter_context(grad_off)
        yield


class Passes(Generic[Found]):
    """Runs batches of images through a model, whole, or in parts that fit the device.

    model: that they run through. run: what gives something for images.
    """

    def __init__(self, model: Model, run: Callable[[Tensor], Found]) -> None:
        self._model, self._run = model, run
        self._most: int | None = None

    def __call__(self, pixels: Tensor) -> Iterator[Found]:
        """What `run` gives for all of them, in order, part by part.

        Where the device has no room for so many images in one forward pass there are half as many
        in each, from then on, and a warning says so.

        Raises:
            VitprobeError: no room for a single image.
        """
        start = 0
        while start < len(pixels):
            part = pixels[start : start + (self._most or len(pixels))]
            try:
                found = self._run(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0] or "out of memory"
            else:
                yield found
                start += len(part)
                continue
            # Only here is what the failed pass held free again.
            self._most = halved(len(part), self._model.name, pixels.device, reason)


def check_finite(model: Model, what: str, values: torch.Tensor, first: int) -> None:
    """Raise MeasureError naming the first image of a batch for which a model gives no numbers.

    Args:
        what: is computed, such as "class token".
        values: (images, …).
        first: index of the first of the images.
    """
    bad = ~torch.isfinite(values).flatten(1).all(dim=1)
    if bad.any():
        image = first + int(bad.int().argmax())
        raise MeasureError(
            f"the {what} of model '{model.name}' is not finite for image {image}; check its "
            "weights with 'vitprobe inspect'"
        )
