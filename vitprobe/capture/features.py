"""Forward hooks that hand on the tokens of every layer as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprobe.errors import CaptureError
from vitprobe.models import Anatomy, Model

Convention = Literal["normed", "residual"]
OnFeatures = Callable[[int, Tensor], None]


def feature_layers(anatomy: Anatomy) -> range:
    """The layers of a model with L blocks: 0 … L under either convention."""
    return range(len(anatomy.blocks) + 1)


def convention_of(model: Model, asked: Convention) -> Convention:
    """The convention a model's layers follow: the one asked for, where the model has it.

    A model without a norm before its attention has residual layers only.

    Raises:
        CaptureError: no such convention.
    """
    if asked not in ("normed", "residual"):
        raise CaptureError(f"unknown layers '{asked}': use 'normed' or 'residual'")
    anatomy = model.anatomy
    return asked if anatomy.pre_norm and None not in anatomy.norms else "residual"


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
    convention = convention_of(model, convention)
    anatomy = model.anatomy
    if convention == "residual":

        def passing(layer: int, value: object) -> None:
            on_features(layer, _tokens(model, anatomy.blocks[max(0, layer - 1)], value))

        return hook_stream(model, feature_layers(anatomy), passing)

    modules = dict(model.module.named_modules())
    last = len(anatomy.blocks)

    def output(layer: int, path: str, transform: nn.Module | None = None) -> RemovableHandle:
        def hook(module: nn.Module, args: object, result: object) -> None:
            tokens = _tokens(model, path, result)
            if transform is not None:
                # `.forward` and not a call: hooks on the transform must not see this extra use.
                with torch.no_grad():
                    tokens = transform.forward(tokens)
            on_features(layer, tokens)

        return modules[path].register_forward_hook(hook)

    handles = [output(i, path) for i, path in enumerate(anatomy.norms) if path is not None]
    if anatomy.final_norm is None:
        handles.append(output(last, anatomy.blocks[-1]))
    elif anatomy.final_norm_pooled:
        handles.append(output(last, anatomy.blocks[-1], modules[anatomy.final_norm]))
    else:
        handles.append(output(last, anatomy.final_norm))
    return handles


def hook_stream(
    model: Model, layers: Iterable[int], on_value: Callable[[int, object], None]
) -> Sequence[RemovableHandle]:
    """Register hooks that call `on_value` with what passes at chosen `residual` layers, untouched.

    For layer 0 that is what block 0 reads, for layer i what block i - 1 returns.
    """
    modules = dict(model.module.named_modules())
    blocks = [modules[path] for path in model.anatomy.blocks]

    def hook(layer: int) -> RemovableHandle:
        if layer == 0:
            return blocks[0].register_forward_pre_hook(
                lambda block, args: on_value(0, args[0] if args else None)
            )
        return blocks[layer - 1].register_forward_hook(
            lambda block, args, result: on_value(layer, result)
        )

    return [hook(layer) for layer in layers]


def _tokens(model: Model, path: str, value: object) -> Tensor:
    if isinstance(value, tuple) and value:
        value = value[0]
    expected = model.anatomy.prefix_tokens + model.anatomy.grid[0] * model.anatomy.grid[1]
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[1] != expected:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CaptureError(
            f"model '{model.name}': '{path}' handles {shape}, not (images, {expected} tokens, "
            "width), so its layers cannot be captured"
        )
    return value.detach()
