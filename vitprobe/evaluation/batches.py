"""Labelled images as a model wants them, batch after batch, preprocessed as for a comparison."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitprobe.data.blocks import View, resize
from vitprobe.data.parts import Arrays, Files, Part


def pixel_batches(
    part: Part,
    indices: NDArray[np.int64] | None,
    view: View,
    *,
    size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Images in order, (b, channels, height, width) in [0, 1] on `device`.

    The centre square of each, resized to the model's input (bicubic, antialiased); luminance for
    one channel, grey repeated for three. Images that are arrays are resized on the device.

    Args:
        part: the images.
        indices: (m,) which of them; None for all.
        view: the model's input.
        size: b, of all batches but the last.
        workers: threads that decode files ahead.

    Raises:
        DataError: an image cannot be decoded, or has other channels than the model can be given.
    """
    chosen = np.arange(len(part)) if indices is None else indices
    chunks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    if isinstance(part, Arrays):
        for chunk in chunks:
            pixels = torch.from_numpy(np.ascontiguousarray(part.images[chunk]))
            yield resize(_square(pixels.to(device)), view)
        return
    yield from _decoded(part, chunks, view, workers, device)


def _decoded(
    part: Files,
    chunks: list[NDArray[np.int64]],
    view: View,
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    def load(i: int) -> Tensor:
        return resize(_square(part.decode(i)), view)

    with ThreadPoolExecutor(workers) as threads:
        ahead: deque[list[Future[Tensor]]] = deque()
        try:
            for chunk in chunks:
                ahead.append([threads.submit(load, int(i)) for i in chunk])
                if len(ahead) > 2:
                    yield _stacked(ahead.popleft(), device)
            while ahead:
                yield _stacked(ahead.popleft(), device)
        finally:
            threads.shutdown(cancel_futures=True)


def _stacked(images: list[Future[Tensor]], device: torch.device) -> Tensor:
    return torch.stack([image.result() for image in images]).to(device)


def _square(pixels: Tensor) -> Tensor:
    """The centre square as floats in [0, 1]: (…, channels, side, side)."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    return square.float() / 255 if square.dtype == torch.uint8 else square.float()
