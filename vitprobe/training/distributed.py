"""Several processes that train as one; without a process group all of this is the identity.

Each process holds a contiguous share of the global batch, in rank order, and the gradients of the
processes are averaged. What is computed across samples has to be computed across processes too,
and its gradient has to go back to the process that owns the sample: these functions do both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitprobe.errors import VitprobeError


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, over NCCL on CUDA and gloo elsewhere.

    Yields the device of this process. Without torchrun, or where the caller has made a process
    group, nothing is joined and nothing left.
    """
    if launched() == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        raise VitprobeError("Another process of this run ended; its message says why.") from error
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def mean(tensor: Tensor) -> Tensor:
    """The mean over the processes of a tensor of any shape; its gradient flows through."""
    if world_size() == 1:
        return tensor
    total: Tensor = _Sum.apply(tensor)
    return total / world_size()


class _Sum(torch.autograd.Function):
    """The sum over the processes, of which every process takes a loss of its own.

    An input therefore gets the sum of the gradients that the processes have for the output. torch's
    own differentiable sum is deprecated, and what is to replace it has no gradient in torch 2.6.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def gather(tensor: Tensor) -> Tensor:
    """(b, ...) of every process, in rank order: (processes x b, ...), without a gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm (Ioffe & Szegedy 2015) over the samples of all processes: (b, d) → (b, d).

    torch's SyncBatchNorm exists for CUDA only; this one runs wherever a process group does. The
    statistics are taken in single precision whatever the samples'.
    """

    def forward(self, samples: Tensor) -> Tensor:
        """Normalise by the global batch in training and by the running statistics otherwise."""
        if not self.training or world_size() == 1:
            return super().forward(samples)
        x = samples.float()
        average = mean(x.mean(dim=0))
        variance = mean((x - average).square().mean(dim=0))
        if self.running_mean is not None and self.running_var is not None:
            n = len(x) * world_size()
            with torch.no_grad():
                self.running_mean.lerp_(average, self.momentum or 0.0)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum or 0.0)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        normal = (x - average) * torch.rsqrt(variance + self.eps)
        if self.affine:
            normal = normal * self.weight + self.bias
        return normal.to(samples.dtype)
