"""Torch or numpy in, the same kind out."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import MeasureError

Array = Tensor | np.ndarray
A = TypeVar("A", Tensor, np.ndarray)


def to_tensor(array: Array) -> Tensor:
    """A floating tensor of at least single precision that shares memory where it can.

    Raises:
        MeasureError: neither a tensor nor an array of numbers.
    """
    if isinstance(array, np.ndarray) and array.dtype.kind in "fiub":
        array = torch.from_numpy(np.ascontiguousarray(array))
    if not isinstance(array, Tensor) or array.is_complex():
        kind = getattr(array, "dtype", type(array).__name__)
        raise MeasureError(f"expected a torch tensor or numpy array of real numbers, got {kind}")
    array = array.detach()
    return array if array.dtype in (torch.float32, torch.float64) else array.float()


def like(result: Tensor, example: A) -> A:
    """`result` as the kind of array that `example` is."""
    return result.cpu().numpy() if isinstance(example, np.ndarray) else result
