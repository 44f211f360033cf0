"""From labelled images to the batches that a method trains on.

Two paths. `Resident`: small data live on the device and are augmented there, a batch at a time.
`Workers`: processes decode and crop, and the device does the rest. `make_feed` chooses and says
why. Both give a sample the same views whatever the batch it is in, the number of processes, and
where in an epoch a run was resumed: random numbers are keyed by (seed, epoch, sample).
"""

from __future__ import annotations

import os
import signal
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitprobe.data.labelled import Arrays, Files
from vitprobe.errors import DataError
from vitprobe.training.augment import Augment
from vitprobe.training.methods.base import Batch
from vitprobe.training.randomness import Draws

_SMALL: Final = 96
"""Files of images of at most this side are decoded once and kept."""
_CPU_BYTES: Final = 2e9
_PROBED: Final = 16
_CHUNK: Final = 32
"""Images that a worker decodes at a time: parts of a batch come from all of them at once."""
_GRACE: Final = 30
"""Seconds for which a worker outlives SIGTERM."""


class Feed(ABC):
    """Batches of one set of images.

    path: one line that says how batches are made, and why so.
    labels: (n,) int64 on the host; None where there are none.
    """

    path: str
    labels: NDArray[np.int64] | None

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def epoch(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """A batch for each of `batches`, (b,) int64 sample indices on the CPU, in order.

        One epoch at a time: an iterator that is left early has to be closed before the next.

        Raises:
            DataError: an image cannot be decoded.
        """

    @abstractmethod
    def plain(
        self, indices: Tensor | None = None, batch: int = 512
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images whole, resized and normalised, (b, c, s, s), with their labels (b,); in order.

        indices: (m,) int64 on the CPU, all images where it is None.

        Raises:
            DataError: an image cannot be decoded.
        """


class Resident(Feed):
    """Images that live on the device and are augmented there."""

    def __init__(
        self, part: Arrays, augment: Augment, *, seed: int, device: torch.device, path: str
    ) -> None:
        self.path = path
        self.labels = part.labels
        self._augment, self._seed, self._device = augment, seed, device
        self._images = _tensor(part.images).to(device)
        self._labels = _label_tensor(part).to(device)

    def __len__(self) -> int:
        return len(self._images)

    def epoch(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        if not batches:
            return
        # One copy to the device an epoch rather than one a batch.
        order = torch.cat(list(batches)).to(self._device)
        for index in order.split([len(batch) for batch in batches]):
            draws = Draws(self._seed, epoch, index)
            yield Batch(self._augment(self._images[index], draws), self._labels[index], draws)

    def plain(
        self, indices: Tensor | None = None, batch: int = 512
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for index in _all(indices, len(self)).to(self._device).split(batch):
            yield self._augment.plain(self._images[index]), self._labels[index]


class Workers(Feed):
    """Images decoded and cropped by `workers` processes (0: this one), finished on the device.

    The processes are started by the first epoch and stay for the following ones; an epoch that is
    left early ends them, and so does the end of the feed.
    """

    def __init__(
        self,
        part: Arrays | Files,
        augment: Augment,
        *,
        seed: int,
        device: torch.device,
        workers: int,
        path: str,
    ) -> None:
        self.path = path
        self.labels = part.labels
        self._part, self._augment, self._seed, self._device = part, augment, seed, device
        self._labels = _label_tensor(part).to(device)
        self._pool = Pool(_Cutter(part, augment, seed), workers, pin=device.type == "cuda")
        weakref.finalize(self, self._pool.close)

    def __len__(self) -> int:
        return len(self._part)

    def epoch(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        tasks = [(epoch, chunk.numpy()) for batch in batches for chunk in batch.split(_CHUNK)]
        chunks = self._pool.run(tasks, ahead=max((len(batch) for batch in batches), default=0))
        # One copy to the device an epoch rather than one a batch, which would wait for it.
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *batches]).to(self._device)
        try:
            for batch, index in zip(
                batches, indices.split([len(batch) for batch in batches]), strict=True
            ):
                pieces = [self._moved(next(chunks)) for _ in batch.split(_CHUNK)]
                crops = [torch.cat(views) for views in zip(*pieces, strict=True)]
                draws = Draws(self._seed, epoch, index)
                yield Batch(self._augment.finish(crops, draws), self._labels[index], draws)
        finally:
            chunks.close()

    def _moved(self, crops: Sequence[Tensor]) -> list[Tensor]:
        return [crop.to(self._device, non_blocking=True) for crop in crops]

    def plain(
        self, indices: Tensor | None = None, batch: int = 512
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def load(i: int) -> Tensor:
            return self._augment.plain(self._part.decode(i)[None])[0]

        # Threads: decoding and resizing leave Python's lock alone.
        with ThreadPoolExecutor(max(1, self._pool.workers)) as threads:
            ahead: deque[tuple[Tensor, list[Future[Tensor]]]] = deque()
            try:
                for index in _all(indices, len(self)).split(batch):
                    ahead.append((index, [threads.submit(load, i) for i in index.tolist()]))
                    if len(ahead) > 1:
                        yield self._gathered(*ahead.popleft())
                while ahead:
                    yield self._gathered(*ahead.popleft())
            finally:
                threads.shutdown(cancel_futures=True)

    def _gathered(self, index: Tensor, images: list[Future[Tensor]]) -> tuple[Tensor, Tensor]:
        whole = torch.stack([image.result() for image in images])
        return whole.to(self._device), self._labels[index.to(self._device)]


def make_feed(
    part: Arrays | Files, augment: Augment, *, seed: int, device: torch.device, workers: int
) -> Feed:
    """The feed that suits the data: on the device where they fit, through workers otherwise.

    Arrays fit when they take at most a quarter of the device's free memory; on the CPU they are in
    its memory already. Files do when besides they are all of one small size; then they are decoded
    here, once.

    Args:
        part: what to train on or to evaluate.
        augment: its views; `augment.in_workers` can demand workers.
        seed: of the run.
        device: where batches are wanted.
        workers: processes that decode; 0 for none but this one.

    Raises:
        DataError: an image that is looked at cannot be decoded.
    """
    reason = augment.in_workers
    if not reason and isinstance(part, Arrays):
        room = _room(device)
        if device.type == "cpu" or part.images.nbytes <= room:
            return _resident(part, augment, seed, device)
        reason = f"{_size(part.images.nbytes)} is more than the {_size(room)} to be had on {device}"
    elif not reason and isinstance(part, Files):
        decoded = _decoded(part, _room(device), max(1, workers))
        if isinstance(decoded, Arrays):
            return _resident(decoded, augment, seed, device)
        reason = decoded
    how = f"{workers} worker processes" if workers else "this process"
    path = f"{len(part):,} images decoded and cropped by {how} and augmented on {device}: {reason}"
    return Workers(part, augment, seed=seed, device=device, workers=workers, path=path)


def _resident(part: Arrays, augment: Augment, seed: int, device: torch.device) -> Resident:
    n, _, height, width = part.images.shape
    size = _size(part.images.nbytes)
    path = f"{n:,} images of {height} x {width} ({size}) live on {device}: augmented there"
    return Resident(part, augment, seed=seed, device=device, path=path)


def _decoded(part: Files, room: float, threads: int) -> Arrays | str:
    """The files decoded, or why they are better left encoded."""
    spread = np.unique(np.linspace(0, len(part) - 1, _PROBED).astype(int)).tolist()
    shapes = {part.decode(i).shape for i in spread}
    if len(shapes) > 1:
        return "they are of several sizes"
    channels, height, width = shape = shapes.pop()
    if max(height, width) > _SMALL:
        return f"they are larger than {_SMALL} pixels"
    size = len(part) * channels * height * width
    if size > room:
        return f"decoded, {_size(size)} is more than the {_size(room)} to be had"
    images = np.empty((len(part), *shape), dtype=np.uint8)

    def fill(first: int) -> bool:
        for i in range(first, min(first + _CHUNK, len(part))):
            image = part.decode(i)
            if image.shape != shape:
                return False
            images[i] = image.numpy()
        return True

    with ThreadPoolExecutor(threads) as pool:
        try:
            if not all(pool.map(fill, range(0, len(part), _CHUNK))):
                return "they are of several sizes"
        finally:
            pool.shutdown(cancel_futures=True)
    return Arrays(images, part.labels)


def _room(device: torch.device) -> float:
    """Bytes that images may take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 4
    # Also where the device shares the memory of the CPU, as MPS does.
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            known = dict(line.split()[:2] for line in file)
        free = int(known["MemAvailable:"]) * 1024
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, free / 4)


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _tensor(array: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        # Of arrays that cannot be written to, which nobody here does.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def _label_tensor(part: Arrays | Files) -> Tensor:
    return (
        torch.zeros(len(part), dtype=torch.int64) if part.labels is None else _tensor(part.labels)
    )


def _all(indices: Tensor | None, n: int) -> Tensor:
    return torch.arange(n) if indices is None else indices


_Task = tuple[int, NDArray[np.int64]]


class _Cutter(Dataset[Any]):
    """What a worker does: decode and crop the samples of a task."""

    def __init__(self, part: Arrays | Files, augment: Augment, seed: int) -> None:
        self._part, self._augment, self._seed = part, augment, seed

    def __getitem__(self, task: _Task) -> tuple[Tensor, ...] | DataError:
        """Each view of the samples, (b, c, s, s) uint8."""
        epoch, index = task
        views = []
        try:
            for i in index.tolist():
                draws = Draws(self._seed, epoch, torch.tensor([i]))
                views.append(self._augment.cut(self._part.decode(i), draws))
        except DataError as error:
            # Raised, it would come back with the worker's traceback for a message.
            return DataError(*error.args)
        return tuple(torch.stack(view) for view in zip(*views, strict=True))


class Pool:
    """Worker processes that outlive an epoch; none of them when `workers` is 0.

    cutter: what a worker makes of a task, (epoch, sample indices): tensors, or a DataError.
    chunk: samples in a task.
    """

    def __init__(
        self, cutter: Dataset[Any], workers: int, *, pin: bool, chunk: int = _CHUNK
    ) -> None:
        self.workers = workers
        self._cutter, self._pin, self._chunk = cutter, pin, chunk
        self._tasks: list[_Task] = []
        self._loader: DataLoader[Any] | None = None
        self._results: Iterator[Any] = iter(())

    def run(self, tasks: list[_Task], ahead: int) -> Generator[tuple[Tensor, ...]]:
        """The results of the tasks, in order; at least `ahead` samples are being worked on.

        Closed early, or when it raises, it ends the processes.

        Raises:
            DataError: an image cannot be decoded, or a worker died.
        """
        if not tasks:
            return
        self._tasks[:] = tasks
        finished = False
        try:
            self._start(ahead)
            for _ in tasks[1:]:
                yield self._next()
            last = self._next()
            # Only when asked for more than there is does the loader take itself for done.
            finished = next(self._results, None) is None
            yield last
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """End the processes: the loader does when nobody holds it any more."""
        self._results, self._loader = iter(()), None

    def _start(self, ahead: int) -> None:
        if self._loader is None:
            several: dict[str, Any] = {}
            if self.workers:
                each = 2 + ahead // (self._chunk * self.workers)
                several = {"prefetch_factor": each, "persistent_workers": True}
            self._loader = DataLoader(
                self._cutter,
                batch_size=None,
                sampler=self._tasks,
                num_workers=self.workers,
                pin_memory=self._pin,
                worker_init_fn=_outlive_sigterm,
                # Or it would draw from the global one.
                generator=torch.Generator(),
                **several,
            )
        # Held back in the workers too, until they know how to outlive it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # Python warns of forking beside threads; torch's workers do not need their locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._results = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _next(self) -> tuple[Tensor, ...]:
        try:
            result = next(self._results)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a worker process died while decoding images ({str(error).splitlines()[0]}); "
                "it may have run out of memory: use fewer workers"
            ) from error
        if isinstance(result, DataError):
            raise result
        return tuple(result)


def _outlive_sigterm(_worker: int) -> None:
    """Let a worker go on for a while when a whole group of processes is told to end.

    The main process then finishes its step and saves; it ends the workers itself.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
