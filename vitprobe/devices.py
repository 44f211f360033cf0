"""Where and how exactly models are run, and leaving torch and the models as they were."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitprobe.distributed import launched
from vitprobe.errors import VitprobeError


def find_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is CUDA or MPS where there is one, else the CPU.

    Under torchrun CUDA is the GPU of this process, by its number on the machine.

    Raises:
        VitprobeError: nothing can be computed on a device of that name here; under torchrun, one
            GPU named for all processes.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and launched() > 1:
        if name != "cuda":
            raise VitprobeError(
                f"under torchrun each process takes its own GPU: not {name}, but cuda"
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        # Some devices take tensors and hold no numbers.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise VitprobeError(
            f"device '{name}' is not to be had here; use 'cpu' or 'auto'"
        ) from error
    return device


def halved(size: int, model: str, device: torch.device, reason: str) -> int:
    """How many images the next forward passes take after one of `size` found no room; warns of it,
    and frees what the failed pass held.

    Raises:
        VitprobeError: that was a single image.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise VitprobeError(
            f"model '{model}' has no room on {device} for a single image ({reason}); give another "
            "device, or leave the model out"
        )
    warnings.warn(
        f"model '{model}' ran out of memory with {size} images in a forward pass and goes on with "
        f"{size // 2}; give a smaller batch size to begin with",
        stacklevel=2,
    )
    return size // 2


def slow_bf16(device: torch.device) -> str | None:
    """Why bf16 is no use on a device that computes it number by number; None where it is of use."""
    # Undocumented; by it torch's own compiler decides the same. Without oneDNN nobody knows.
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if device.type != "cpu" or known is None or known():
        return None
    return (
        "this CPU has no instructions for bf16, in which it is several times slower than in fp32; "
        "use precision fp32"
    )


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Products that are exact, or under bf16 autocast; warns where that is slow."""
    bf16 = precision == "bf16"
    if bf16 and (reason := slow_bf16(device)):
        warnings.warn(reason, stacklevel=2)
    with exact_products(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Single precision that is not rounded to TF32 or bf16; torch's settings restored afterwards.

    Torch forbids mixing its newer settings (from 2.9 on) with the older ones.
    """
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        holders = [backends.cuda.matmul, backends.cudnn.conv]
        holders += [backends.mkldnn.matmul, backends.mkldnn.conv]
        before = [holder.fp32_precision for holder in holders]
        try:
            for holder in holders:
                holder.fp32_precision = "ieee"
            yield
        finally:
            for holder, value in zip(holders, before, strict=True):
                holder.fp32_precision = value
    else:
        matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = convolution


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on `device` in eval mode; back where and how it was afterwards."""
    home = next((parameter.device for parameter in module.parameters()), device)
    with same_modes(module):
        try:
            module.eval().to(device)
            yield
        finally:
            module.to(home)


@contextmanager
def same_modes(module: nn.Module) -> Iterator[None]:
    """Each part of a module is in the mode afterwards, training or eval, that it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
