"""Forward and backward passes replayed as CUDA graphs.

A narrow encoder keeps a GPU waiting for the next kernel to be launched. A CUDA graph launches all
kernels of a pass at once, but does again exactly what was recorded: the same addresses, and every
Python number as it was. Batches are therefore copied to where the recorded one lay, each epoch,
whose number is part of its random numbers, is recorded anew, and nothing is taken on trust: `tried`
holds the replay against the ordinary pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.methods import Batch, Method, Moment
from vitprobe.training.randomness import Draws
from vitprobe.training.recipe import Recipe

Pass = Callable[[Batch], dict[str, Tensor]]
"""Forward and backward pass of a batch: the loss and its terms; gradients are left in `.grad`."""
Recorder = Callable[[Callable[[], dict[str, Tensor]]], tuple[dict[str, Tensor], Callable[[], None]]]
"""Records a function: what it returns, and what fills that and the gradients anew."""

_EPOCHS, _STEPS = 2, 2
# Both ways run the same kernels, so all that may differ is the order of a few sums, which bf16
# rounds to 2^-9; whatever is stale or drawn anew is wrong by its own size.
_TOLERANCE = 1e-2
_JIGGLE = 0.02


class Replayed:
    """A pass that is recorded once an epoch and replayed.

    What it returns and the gradients are overwritten by the next call.

    method: whose gradients they are. ordinary: the pass, run often enough to have warmed up.
    """

    def __init__(self, method: Method, ordinary: Pass, record: Recorder | None = None) -> None:
        self._method, self._ordinary = method, ordinary
        self._record = record or _cuda_graph
        self._recorded: tuple[Any, ...] = ()
        self._inputs: list[Tensor] = []
        self._terms: dict[str, Tensor] = {}
        self._gradients: list[Tensor | None] = []
        self._replay: Callable[[], None] = _nothing

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Raises RecipeError where the batch's epoch cannot be recorded."""
        draws, given = batch.draws, _tensors(batch)
        key = (draws.seed, draws.epoch, *(tensor.shape for tensor in given))
        if key != self._recorded:
            self._start(batch)
            self._recorded = key
        for own, new in zip(self._inputs, given, strict=True):
            own.copy_(new)
        self._replay()
        # The optimiser drops gradients after each update; the graph goes on writing to these.
        for parameter, gradient in zip(self._method.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return self._terms

    def _start(self, batch: Batch) -> None:
        # Before the next recording, for which their memory may be needed.
        self._recorded, self._replay, self._terms, self._gradients = (), _nothing, {}, []
        # A recorded gradient has to be written, not added to one that is there.
        self._method.zero_grad(set_to_none=True)
        self._inputs = [tensor.clone() for tensor in _tensors(batch)]
        *views, labels, index = self._inputs
        own = Batch(tuple(views), labels, Draws(batch.draws.seed, batch.draws.epoch, index))
        try:
            self._terms, self._replay = self._record(lambda: self._ordinary(own))
        except RuntimeError as error:
            raise RecipeError(
                f"Epoch {batch.draws.epoch} could not be recorded as a CUDA graph "
                f"({_line(error)}); resume the run, which tries graphs again and goes on without "
                "them where they fail."
            ) from error
        self._gradients = [parameter.grad for parameter in self._method.parameters()]


def _nothing() -> None:
    """The replay of no recording."""


def _cuda_graph(
    function: Callable[[], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    # By default what a DataLoader's thread does to pin memory would end the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return outputs, graph.replay


def tried(
    method: Method, ordinary: Pass, replayed: Pass, recipe: Recipe, device: torch.device
) -> str:
    """Why replays cannot be trusted; "" where they can.

    Batches of noise in the recipe's shapes, seen by other weights each, go through both, two in an
    epoch, the second of which no recording has seen; compared are the loss and its terms, all
    gradients and all buffers. The method is left as it was.
    """
    before = [tensor.detach().clone() for tensor in _weights(method)]
    generator = torch.Generator().manual_seed(0)
    try:
        with _aside(device):
            for step in range(_EPOCHS * _STEPS):
                batch = _noise(method, recipe, step, device)
                method.before_step(Moment(step, _EPOCHS * _STEPS, _STEPS))
                for parameter in method.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.detach().add_(noise.to(device), alpha=_JIGGLE)
                reason = _difference(method, ordinary, replayed, batch)
                if reason:
                    return reason
    except Exception as error:
        # Whatever a driver, a compiler or the recording raises.
        return _line(error.__cause__ or error)
    finally:
        _put_back(_weights(method), before)
        method.zero_grad(set_to_none=True)
    return ""


def _difference(method: Method, ordinary: Pass, replayed: Pass, batch: Batch) -> str:
    """What of one pass differs, in words; "" for nothing."""
    buffers = dict(method.named_buffers())
    start = [buffer.clone() for buffer in buffers.values()]
    seen = []
    for run in (ordinary, replayed):
        _put_back(list(buffers.values()), start)
        method.zero_grad(set_to_none=True)
        terms = {name: term.detach().clone() for name, term in run(batch).items()}
        gradients = {
            name: parameter.grad.detach().clone()
            for name, parameter in method.named_parameters()
            if parameter.grad is not None
        }
        seen.append((terms, gradients, {name: b.clone() for name, b in buffers.items()}))
    (terms, gradients, after), (their_terms, their_gradients, their_after) = seen
    if terms.keys() != their_terms.keys() or gradients.keys() != their_gradients.keys():
        return "it leaves out a term or a gradient"
    for name, term in terms.items():
        if not _close(term, their_terms[name], 1.0):
            return f"its {name} is {their_terms[name].item():.4g}, not {term.item():.4g}"
    # Gradients that are nothing but rounding, as of a key's bias, need not agree.
    norm = torch.stack([gradient.norm().float() for gradient in gradients.values()]).norm().item()
    for name, gradient in gradients.items():
        if not _close(gradient, their_gradients[name], 1e-2 * norm):
            return f"its gradient of {name} differs"
    for name, buffer in after.items():
        if not _close(buffer, their_after[name], 1e-6):
            return f"its {name} differs"
    return ""


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a stream of its own: what autograd keeps of a pass on the main one cannot be recorded."""
    if device.type != "cuda":
        yield
        return
    main, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(main)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        main.wait_stream(stream)


def _noise(method: Method, recipe: Recipe, step: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(step)
    n, channels = recipe.batch_size, recipe.encoder.channels
    views = tuple(
        torch.randn(n, channels, size, size, generator=generator).to(device)
        for size in recipe.view_sizes
    )
    index = torch.randperm(n, generator=generator).to(device)
    labels = index % max(method.encoder.num_classes, 1)
    return Batch(views, labels, Draws(recipe.seed, step // _STEPS, index))


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.views, batch.labels, batch.draws.index]


def _weights(method: Method) -> list[Tensor]:
    return [*method.parameters(), *method.buffers()]


@torch.no_grad()
def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _close(a: Tensor, b: Tensor, floor: float) -> bool:
    """Whether they agree to _TOLERANCE of the larger of a's norm and `floor`; nan never does."""
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= _TOLERANCE * a.norm().clamp(min=floor))


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no reason given'}"
