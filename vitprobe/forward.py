"""A live model over one block of images after another, in forward passes that fit its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from vitprobe.capture import Recorder
from vitprobe.data.blocks import Block, View
from vitprobe.devices import computing, halved, placed
from vitprobe.errors import MeasureError, NoRoomError, VitprobeError, is_out_of_memory
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.models import Model
from vitprobe.samples import SAMPLES, thumbnails
from vitprobe.settings import Settings


@contextmanager
def running(models: Iterable[Model], settings: Settings, device: torch.device) -> Iterator[None]:
    """Models on their device, in the precision asked for; all is as it was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(computing(device, settings.precision))
        for model in models:
            stack.enter_context(placed(model.module, device))
        yield


class Forward:
    """Runs a model that is on `device` already."""

    def __init__(self, model: Model, settings: Settings, device: torch.device) -> None:
        self.model = model
        self.wanted = Wanted.of(model, settings)
        self._settings = settings
        self.device = device
        self._step = settings.batch_size
        self._halved: tuple[int, int] | None = None

    def part(self, block: Block) -> ModelBlock:
        """What the model gives for a block; raises as `block`."""
        return self.block(block.first, block.views[View(*self.model.input_size)])

    def block(self, first: int, pixels: Tensor) -> ModelBlock:
        """What the model gives for images `first` … of the run.

        Where the device has no room for so many images in one forward pass, the block is run again
        in passes of half as many, from then on.

        Args:
            first: index, in the whole run, of the first of them.
            pixels: (images, channels, height, width) in [0, 1], at the model's input size.

        Raises:
            VitprobeError: no room for a single image.
            MeasureError: features or attention that are not finite.
            CaptureError: a layer that was asked for stayed silent, or spoke more than once.
        """
        while True:
            step = min(self._step or len(pixels), len(pixels))
            try:
                return self._run(first, pixels, step)
            except MeasureError as error:
                raise MeasureError(
                    f"model '{self.model.name}', block {first // self._settings.block} of the "
                    f"images: {error}; check its weights with 'vitprobe inspect'"
                ) from error
            except NoRoomError as error:
                raise VitprobeError(
                    f"model '{self.model.name}' has no room on {self.device} for the {error}; give "
                    "a smaller block, or another device"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                where = str(error).partition("\n")[0] or "out of memory"
            # Only here is what the failed pass held free again.
            self._step = halved(step, self.model.name, self.device, where)
            self._halved = (self._halved[0] if self._halved else step, self._step)

    def _run(self, first: int, pixels: Tensor, step: int) -> ModelBlock:
        made = ModelBlock(self.wanted, first, len(pixels))
        made.halved = self._halved
        if first < SAMPLES:
            made.thumbnails = thumbnails(pixels[: SAMPLES - first])
        if not (self.wanted.features or self.wanted.attention):
            return made
        start = 0

        def on_features(layer: int, tokens: Tensor) -> None:
            # Under a caller's autocast matrix products alone would fall to half precision.
            with torch.autocast(self.device.type, enabled=False):
                made.add_features(layer, first + start, tokens)

        recorder = Recorder(
            self.model,
            convention=self._settings.layers,
            on_features=on_features if self.wanted.features else None,
            on_attention=made.add_attention if self.wanted.attention else None,
        )
        # A module of the user's own may keep what it computes, and could not train with inference
        # tensors later.
        grad_off = torch.no_grad() if self.model.spec == "module" else torch.inference_mode()
        with grad_off, recorder:
            for start in range(0, len(pixels), step):
                recorder.run(self._on_device(pixels[start : start + step]), first + start)
            made.finish()
        return made

    def _on_device(self, pixels: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return pixels.to(self.device)
        # From pinned memory the copy goes on while the host queues the pass that waits for it.
        return pixels.pin_memory().to(self.device, non_blocking=True)
