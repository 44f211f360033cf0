"""What chosen layers compute in one run of a model, whole and with its gradient.

The thin counterpart of the Recorder, for losses on attention maps and hidden states: through the
same hooks, but nothing is cut into chunks or detached, layers that were not chosen cost nothing,
and the sequence may be of any length, such as the visible patches of a masked image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprobe.capture.attention import AttentionWatch
from vitprobe.capture.calls import check_calls
from vitprobe.capture.features import hook_stream
from vitprobe.errors import CaptureError
from vitprobe.models import Model
from vitprobe.models.calls import AttentionCall

_REMEDY = "choose others, and do not compile these"


@dataclass(frozen=True)
class Heard:
    """A tensor for each chosen layer, in the order in which they were chosen.

    attention: (images, heads, queries, keys) float32, scaled, before the softmax.
    hidden: (images, tokens, width), the residual stream.
    """

    output: Tensor
    attention: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


def listen(
    model: Model,
    run: Callable[[], Tensor],
    *,
    attention: Sequence[int] = (),
    hidden: Sequence[int] = (),
) -> Heard:
    """Call `run`, which runs the model's blocks once, and return its output and what was heard.

    attention: blocks, from 0. hidden: `residual` layers, 0 for what block 0 reads and i for what
    block i - 1 writes. The output is bit-identical to that of `run` alone.

    Raises CaptureError where a chosen layer was silent or spoke twice, or, under gradients, gave a
    tensor that has none.
    """
    watch = _Keep(model, attention)
    passed: dict[int, list[Tensor]] = {layer: [] for layer in hidden}

    def passing(layer: int, value: object) -> None:
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"model '{model.name}', layer {layer}: its block handles {type(value).__name__} "
                "and not a tensor, so it cannot be listened to"
            )
        passed[layer].append(value)

    with ExitStack() as stack:
        for handle in hook_stream(model, passed, passing):
            stack.callback(handle.remove)
        if watch.calls:
            stack.enter_context(watch)
        output = run()
    check_calls(model, "attention", watch.calls, _REMEDY)
    check_calls(model, "hidden states", {i: len(kept) for i, kept in passed.items()}, _REMEDY)
    # Only now: what is computed within a block may be forgotten and, unheard, computed again.
    heard = Heard(
        output,
        tuple(watch.heard[layer].logits() for layer in attention),
        tuple(passed[layer][0] for layer in hidden),
    )
    if torch.is_grad_enabled() and not all(
        tensor.requires_grad for tensor in (*heard.attention, *heard.hidden)
    ):
        raise CaptureError(
            f"model '{model.name}' gives a chosen layer without a gradient; neither freeze nor "
            "recompute what it is made of"
        )
    return heard


class _Keep(AttentionWatch):
    """Keeps the calls, which would compute their logits."""

    def __init__(self, model: Model, layers: Sequence[int]) -> None:
        super().__init__(model, layers)
        self.heard: dict[int, AttentionCall] = {}

    def hand_on(self, layer: int, call: AttentionCall) -> None:
        if len(call.shape) != 4:
            raise CaptureError(
                f"model '{self._model.name}', layer {layer}: attention of shape {call.shape} is "
                "not (images, heads, queries, keys), so it cannot be listened to"
            )
        self.heard[layer] = call
