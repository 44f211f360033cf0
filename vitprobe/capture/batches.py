"""Images as one model wants them, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.data.blocks import View, resize
from vitprobe.data.images import images
from vitprobe.errors import DataError

Batches = Iterator[tuple[Sequence[str], Tensor]]
"""Names, and (images, channels, height, width) float32 in [0, 1]."""


def batches(source: Any, view: View, size: int, workers: int) -> tuple[int | None, Batches]:
    """How many images a source gives at most, where it knows, and the images in batches of `size`.

    An array or tensor keeps its order; any other source is read as `vitprobe.images` does.

    Raises:
        DataError: no images, or none that can be given to the model.
    """
    if isinstance(source, np.ndarray | Tensor):
        tensor = _checked(torch.as_tensor(source), view)
        return len(tensor), _resized(tensor, view, size)
    found = images(source)
    count = None if found.names is None else len(found)

    def decoded() -> Batches:
        for block in found.blocks([view], size, workers=workers):
            for start in range(0, len(block.names), size):
                part = slice(start, start + size)
                yield block.names[part], block.views[view][part]

    return count, decoded()


def _resized(tensor: Tensor, view: View, size: int) -> Batches:
    for start in range(0, len(tensor), size):
        part = tensor[start : start + size].float()
        names = [str(i) for i in range(start, start + len(part))]
        yield names, torch.stack([resize(image, view) for image in part])


def _checked(tensor: Tensor, view: View) -> Tensor:
    """Images (n, channels, height, width) in [0, 1], squares or already of the view's size."""
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise DataError(
            f"images of shape {tuple(tensor.shape)} are none: give (n, channels, height, width)"
        )
    height, width = tensor.shape[2:]
    channels = (1, 3, view.channels)
    if tensor.shape[3] in channels and tensor.shape[1] not in channels:
        raise DataError(
            f"images of shape {tuple(tensor.shape)} have their channels last: give (n, channels, "
            "height, width)"
        )
    if height != width and (height, width) != view[1:]:
        raise DataError(
            f"images of {height} x {width} pixels: crop them to squares, or resize them to the "
            f"model's {view.height} x {view.width}"
        )
    if not tensor.is_floating_point() or not (tensor.min() >= 0 and tensor.max() <= 1):
        raise DataError(
            f"images are {tensor.dtype} from {float(tensor.min()):g} to {float(tensor.max()):g}: "
            "give floats in [0, 1]; to run a model on inputs of your own, use vp.capturing"
        )
    return tensor.detach()
