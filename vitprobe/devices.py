"""Devices by name."""

from __future__ import annotations

import torch

from vitprobe.errors import VitprobeError


def find_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is CUDA or MPS where there is one, else the CPU.

    Raises:
        VitprobeError: nothing can be computed on a device of that name here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        # Some devices take tensors and hold no numbers.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise VitprobeError(
            f"device '{name}' is not to be had here; use 'cpu' or 'auto'"
        ) from error
    return device
