"""From annotated images to the batches that dense predictors train on and are tested on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitprobe.data.coco import Instances
from vitprobe.data.semantic import IGNORED, Maps
from vitprobe.errors import DataError
from vitprobe.evaluation.dense.placing import JitterConfig, around, jittered, whole
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.feed import Feed, Pool
from vitprobe.training.methods.base import Batch
from vitprobe.training.randomness import Draws

_CHUNK: Final = 4
"""Images that a worker prepares at a time: few, as they are large."""


@dataclass(frozen=True)
class Annotated(Batch):
    """A batch of images and what is in each.

    views: one view, (b, c, size, size). labels: of segmentation, (b, size, size) int64 classes or
    `IGNORED`; of detection, the number of instances of each image (b,).
    targets: of detection, `boxes` (n, 4), `labels` (n,) and `masks` (n, size, size) of each image.
    """

    targets: tuple[dict[str, Tensor], ...] = ()


class DenseFeed(Feed):
    """Images placed in squares by `workers` processes (0: this one), normalised on the device.

    masks: whether those of instances are wanted.
    """

    labels = None

    def __init__(
        self,
        part: Instances | Maps,
        encoder: EncoderConfig,
        jitter: JitterConfig,
        *,
        seed: int,
        device: torch.device,
        workers: int,
        masks: bool,
    ) -> None:
        self._part, self._seed, self._device = part, seed, device
        self._instances = isinstance(part, Instances)
        self._size = encoder.image_size
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(encoder.mean, device=device).view(shape)
        self._std = torch.tensor(encoder.std, device=device).view(shape)
        trained, tested = (_Placer(part, encoder, how, seed, masks) for how in (jitter, None))
        pin = device.type == "cuda"
        self._training = Pool(trained, workers, pin=pin, chunk=_CHUNK)
        self._testing = Pool(tested, workers, pin=pin, chunk=_CHUNK)
        how = f"{workers} worker processes" if workers else "this process"
        self.path = (
            f"{len(part):,} images placed in squares of {self._size} pixels by {how} and "
            f"normalised on {device}"
        )

    def __len__(self) -> int:
        return len(self._part)

    def epoch(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for index, pieces in self._run(self._training, epoch, batches):
            draws = Draws(self._seed, epoch, index.to(self._device))
            images = self._normalised(torch.cat([piece[0] for piece in pieces]))
            if not self._instances:
                maps = torch.cat([piece[1] for piece in pieces])
                yield Annotated((images,), self._moved(maps).long(), draws)
                continue
            counts = torch.cat([piece[4] for piece in pieces])
            parts = [
                self._moved(torch.cat([piece[i] for piece in pieces])).split(counts.tolist())
                for i in (1, 2, 3)
            ]
            targets = tuple(
                {"boxes": boxes, "labels": labels, "masks": masks}
                for boxes, labels, masks in zip(*parts, strict=True)
            )
            yield Annotated((images,), counts.to(self._device), draws, targets)

    def plain(
        self, indices: Tensor | None = None, batch: int = 16
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images whole in the upper left of the square, normalised, (b, c, s, s), and their
        numbers (b,) on the host; in order."""
        chosen = torch.arange(len(self)) if indices is None else indices
        for index, pieces in self._run(self._testing, 0, chosen.split(batch)):
            yield self._normalised(torch.cat([piece[0] for piece in pieces])), index

    def _run(
        self, pool: Pool, epoch: int, batches: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, ...]]]]:
        tasks = [(epoch, chunk.numpy()) for batch in batches for chunk in batch.split(_CHUNK)]
        chunks = pool.run(tasks, ahead=max((len(batch) for batch in batches), default=0))
        try:
            for batch in batches:
                yield batch, [next(chunks) for _ in batch.split(_CHUNK)]
        finally:
            chunks.close()

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _normalised(self, images: Tensor) -> Tensor:
        return (self._moved(images).float() / 255 - self._mean) / self._std


class _Placer(Dataset[Any]):
    """What a worker does: decode images, and place them and what is in them.

    A task gives images (k, c, s, s) uint8 and, of maps, their classes (k, s, s); of instances,
    those of all images one after another, boxes, labels, masks, and how many each has (k,). jitter:
    None to place images whole, and nothing besides.
    """

    def __init__(
        self,
        part: Instances | Maps,
        encoder: EncoderConfig,
        jitter: JitterConfig | None,
        seed: int,
        masks: bool,
    ) -> None:
        self._part, self._jitter, self._seed, self._masks = part, jitter, seed, masks
        self._size = encoder.image_size
        self._fill = (torch.tensor(encoder.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def __getitem__(self, task: tuple[int, Any]) -> tuple[Tensor, ...] | DataError:
        epoch, index = task
        try:
            samples = [self._sample(epoch, i) for i in index.tolist()]
        except DataError as error:
            # Raised, it would come back with the worker's traceback for a message.
            return DataError(*error.args)
        images, *rest = zip(*samples, strict=True)
        if self._jitter is None or isinstance(self._part, Maps):
            return torch.stack(images), *(torch.stack(values) for values in rest)
        counts = torch.tensor([len(boxes) for boxes in rest[0]])
        return torch.stack(images), *(torch.cat(values) for values in rest), counts

    def _sample(self, epoch: int, i: int) -> tuple[Tensor, ...]:
        part, size = self._part, self._size
        image = part.image(i)
        original = int(image.shape[1]), int(image.shape[2])
        if self._jitter is None:
            return (whole(original, size).pixels(image, size, self._fill),)
        draws = Draws(self._seed, epoch, torch.tensor([i]))
        placing = jittered(original, size, self._jitter, draws)
        placed = placing.pixels(image, size, self._fill)
        if isinstance(part, Maps):
            classes = part.targets(i)
            if tuple(classes.shape) != original:
                raise DataError(
                    f"'{part.files.names[i]}' is {original[1]} x {original[0]} pixels, but its map "
                    f"of classes {classes.shape[1]} x {classes.shape[0]}"
                )
            return placed, placing.masks(classes[None], size, fill=IGNORED)[0]
        found = part.targets(i, masks=self._masks)
        if self._masks:
            masks = placing.masks(found["masks"], size)
            boxes = around(masks)
        else:
            masks = torch.zeros((len(found["boxes"]), 0, 0), dtype=torch.uint8)
            boxes = placing.boxes(found["boxes"], original, size)
        # What has been cut away, and what is too small to be seen, is not looked for.
        seen = (boxes[:, 2:] - boxes[:, :2]).min(dim=1).values >= 1
        return placed, boxes[seen], found["labels"][seen], masks[seen]
