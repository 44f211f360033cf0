"""Forward hooks that hand on the tokens of every layer as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprobe.errors import CaptureError
from vitprobe.models import Anatomy, Model
from vitprobe.models.anatomy import Layout
from vitprobe.models.model import Subject
from vitprobe.models.trace import tensors

Convention = Literal["normed", "residual"]
OnFeatures = Callable[[int, Tensor], None]


def feature_layers(anatomy: Anatomy) -> range:
    """The layers of a model with L blocks: 0 … L under either convention."""
    return range(len(anatomy.blocks) + 1)


def convention_of(model: Subject, asked: Convention) -> Convention:
    """The convention a model's layers follow: the one asked for, where the model has it.

    A model without a norm before its attention has residual layers only.

    Raises:
        CaptureError: no such convention.
    """
    if asked not in ("normed", "residual"):
        raise CaptureError(f"unknown layers '{asked}': use 'normed' or 'residual'")
    return asked if model.anatomy.normed else "residual"


def feature_layouts(model: Subject, convention: Convention) -> tuple[Layout, ...]:
    """How the tokens of the layers 0 … L lie, which `hook_features` hands on.

    Raises:
        CaptureError: no such convention.
    """
    anatomy = model.anatomy
    return anatomy.normed if convention_of(model, convention) == "normed" else anatomy.residual


def hook_features(
    model: Model, convention: Convention, on_features: OnFeatures
) -> Sequence[RemovableHandle]:
    """Register hooks that call `on_features(layer, tokens)`; tokens are (images, tokens, width).

    `normed`: layer i < L is what block i's attention reads, layer L the model's final norm, applied
    to every token where the model itself applies it after pooling. `residual`: layer 0 is what
    block 0 reads, layer i what block i - 1 writes. A model without pre-norm is always `residual`;
    without a final norm, layer L of `normed` is what the last block writes.

    Raises:
        CaptureError: no such convention.
    """
    anatomy = model.anatomy
    last = len(anatomy.blocks)
    layouts = feature_layouts(model, convention)

    def hand_on(layer: int, value: object) -> None:
        on_features(layer, _tokens(model, layer, layouts[layer], value))

    def hand_on_last(_: nn.Module, args: object, result: object) -> None:
        # Some apply their final norm a second time, to the class token.
        if _find(layouts[last], result) is not None:
            hand_on(last, result)

    if convention_of(model, convention) == "residual":
        return hook_stream(model, feature_layers(anatomy), hand_on)
    modules = dict(model.module.named_modules())
    handles = [
        modules[path].register_forward_hook(
            lambda _, args, result, layer=layer: hand_on(layer, result)
        )
        for layer, path in enumerate(anatomy.norms)
        if path is not None
    ]
    if anatomy.final_norm is None:
        handles += hook_stream(model, [last], hand_on)
    elif anatomy.final_norm_pooled:
        handles += _hook_pooled(
            model,
            modules[anatomy.final_norm],
            lambda value: _tokens(model, last, layouts[last], value),
            lambda tokens: on_features(last, tokens),
        )
    else:
        handles.append(modules[anatomy.final_norm].register_forward_hook(hand_on_last))
    return handles


def hook_stream(
    model: Model, layers: Iterable[int], on_value: Callable[[int, object], None]
) -> Sequence[RemovableHandle]:
    """Register hooks that call `on_value` with what passes at chosen `residual` layers, untouched.

    For layer 0 that is what block 0 reads, for layer i what block i - 1 returns; of blocks that
    return only what is added to their input, what block i, or the final norm, reads. A single
    argument comes as itself, several as a tuple.
    """
    anatomy = model.anatomy
    modules = dict(model.module.named_modules())

    def read(layer: int, path: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = (*args, *named.values())
            on_value(layer, given[0] if len(given) == 1 else given)

        return modules[path].register_forward_pre_hook(hook, with_kwargs=True)

    def returned(layer: int, path: str) -> RemovableHandle:
        return modules[path].register_forward_hook(lambda _, args, result: on_value(layer, result))

    if anatomy.branches and anatomy.final_norm is not None:
        reading = (*anatomy.blocks, anatomy.final_norm)
        return [read(layer, reading[layer]) for layer in layers]
    return [
        returned(layer, anatomy.blocks[layer - 1]) if layer else read(0, anatomy.blocks[0])
        for layer in layers
    ]


def _hook_pooled(
    model: Model,
    norm: nn.Module,
    tokens_of: Callable[[object], Tensor],
    on_tokens: Callable[[Tensor], None],
) -> Sequence[RemovableHandle]:
    """Hooks that apply a norm of pooled tokens to every token, in the shape that it is used to."""
    kept: list[Tensor] = []

    def keep(_: int, value: object) -> None:
        kept[:] = [tokens_of(value)]

    def apply(_: nn.Module, args: tuple[Any, ...], result: object) -> None:
        if not kept:
            return
        tokens = kept.pop()
        # `.forward` and not a call: hooks on the norm must not see this extra use.
        normed = norm.forward(tokens.reshape(-1, *args[0].shape[1:]))
        on_tokens(normed.reshape(tokens.shape))

    return [
        *hook_stream(model, [len(model.anatomy.blocks)], keep),
        norm.register_forward_hook(apply),
    ]


def _tokens(model: Model, layer: int, layout: Layout, value: object) -> Tensor:
    found = _find(layout, value)
    if found is None:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(value)) or "no tensor"
        raise CaptureError(
            f"model '{model.name}', layer {layer}: {shapes} is not {layout.prefix_tokens} + "
            f"{layout.patches} tokens of width {layout.width} as '{layout.form}', which the layer "
            "was when the model was looked at, so it cannot be captured"
        )
    return found


def _find(layout: Layout, value: object) -> Tensor | None:
    """The tokens of the first tensor that is laid out so."""
    read = (layout.read(tensor) for tensor in tensors(value))
    return next((tokens for tokens in read if tokens is not None), None)
