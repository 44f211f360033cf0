"""Several processes that work as one; without a process group all of this is the identity.

In training each process holds a contiguous share of the global batch, in rank order, and the
gradients of the processes are averaged. What is computed across samples has to be computed across
processes too, and its gradient has to go back to the process that owns the sample: the functions on
tensors do both.

A comparison shares blocks of images between the processes of a `Team`. They hand one another Python
objects, all in the same order, so that an error of one reaches the others where they next expect
word of it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitprobe.errors import ElsewhereError, VitprobeError

T = TypeVar("T")

PATIENCE: Final = timedelta(hours=12)
"""Longest wait for another process of a team, which may be drawing permutations or reading from a
slow disk; one that has ended is not waited for."""
LOST: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of a process that has ended."""


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the process, of those that torchrun started, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
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
        if not any(words in str(error) for words in LOST):
            raise
        raise VitprobeError("Another process of this run ended; its message says why.") from error
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def from_first(value: T) -> T:
    """The value that process 0 has, a small object, in every process."""
    return gather_objects(value)[0]


def gather_objects(value: T) -> list[T]:
    """A small object of every process, in rank order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


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


@dataclass(frozen=True)
class _Failure:
    message: str


@dataclass(frozen=True)
class Team:
    """Processes that share the blocks of one comparison."""

    rank: int = 0
    size: int = 1
    group: Any = None
    told: list[Exception] = field(default_factory=list, compare=False, repr=False)
    """Errors that the other processes know of."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all and holds the sums at the end."""
        return self.rank == 0

    def exchange(self, value: T) -> list[T]:
        """The value of every process, in rank order.

        Raises:
            ElsewhereError: another process has failed.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        failed = next((other for other in found if isinstance(other, _Failure)), None)
        if failed is not None:
            raise ElsewhereError(failed.message)
        return found

    def to_leader(self, value: T, merge: Callable[[T], None]) -> None:
        """Process 0 merges the values of the others, one after the other in rank order.

        Raises:
            ElsewhereError: another process has failed.
        """
        for other in range(1, self.size):
            packed = _packed(value) if self.rank == other else torch.empty(0, dtype=torch.uint8)
            # Here a leader says that it failed at the one before, and who could not pack its value.
            size = self.exchange(len(packed))[other]
            if self.rank == other:
                dist.send(packed, self._global(0), group=self.group)
            elif self.leads:
                packed = torch.empty(size, dtype=torch.uint8)
                dist.recv(packed, self._global(other), group=self.group)
                merge(pickle.loads(packed.numpy().data))

    def from_leader(self, make: Callable[[], T]) -> T:
        """What process 0 makes, for all.

        Raises:
            ElsewhereError: another process has failed.
        """
        if self.size == 1:
            return make()
        packed = _packed(make()) if self.leads else torch.empty(0, dtype=torch.uint8)
        size = self.exchange(len(packed))[0]
        packed = packed if self.leads else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(packed, self._global(0), group=self.group)
        given: T = pickle.loads(packed.numpy().data)
        return given

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error inside it ends all processes.

        The first that fails raises its own error; the others raise ElsewhereError with its words
        when they next exchange something. All are then at the same place, and may go on.
        """
        try:
            yield
        except Exception as error:
            # Of whatever kind: the others would wait for this process in vain.
            if self.size == 1 or isinstance(error, ElsewhereError) or error in self.told:
                raise
            self.told.append(error)
            known = isinstance(error, VitprobeError)
            failure = _Failure(str(error) if known else f"{type(error).__name__}: {error}")
            found: list[Any] = [None] * self.size
            # Where the others are gone already, there is nobody to tell.
            with suppress(RuntimeError):
                dist.all_gather_object(found, failure, group=self.group)
            first = next(
                (other for other in found[: self.rank] if isinstance(other, _Failure)), None
            )
            if first is not None:
                raise ElsewhereError(first.message) from error
            raise


ALONE: Final = Team()


def _packed(value: Any) -> Tensor:
    """A pickled object, as bytes."""
    return torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)


_teams: list[Team] = []
"""The team of this process while it is in `together`."""


@contextmanager
def together() -> Iterator[Team]:
    """Share the comparisons made inside it with the other processes, all of which must enter it.

    Joins the processes that torchrun started, or takes those of the process group that the caller
    has made. Objects travel by the CPU, in a group of their own.

    Raises:
        ElsewhereError: another process has failed.
    """
    if _teams:
        yield _teams[0]
        return
    with joined(torch.device("cpu")):
        if world_size() == 1:
            yield ALONE
            return
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        _teams.append(Team(rank(), world_size(), group))
        try:
            with _teams[0].failing_together():
                yield _teams[0]
        finally:
            _teams.clear()
            dist.destroy_process_group(group)


@contextmanager
def team() -> Iterator[Team]:
    """The processes that share a comparison: of the `together` around it, or that torchrun started.

    In a process group of the caller's own, such as of a training script that compares in one of its
    processes, only `together` shares.
    """
    if dist.is_initialized() and not _teams:
        yield ALONE
        return
    with together() as processes, processes.failing_together():
        yield processes
