"""Forward hooks that hand on the tokens of every layer as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def check_convention(model: Model, convention: Convention) -> None:
    """Raise CaptureError where a model has no layers under a convention."""
    if convention not in ("normed", "residual"):
        raise CaptureError(f"unknown layers '{convention}': use 'normed' or 'residual'")
    anatomy = model.anatomy
    if convention == "normed" and (not anatomy.pre_norm or None in anatomy.norms):
        raise CaptureError(
            f"model '{model.name}' has no norm before its attention, so its layers are 'residual' "
            "only; ask for residual layers for all models"
        )


def hook_features(
    model: Model, convention: Convention, on_features: OnFeatures
) -> Sequence[RemovableHandle]:
    """Register hooks that call `on_features(layer, tokens)`; tokens are (images, tokens, width).

    `normed`: layer i < L is what block i's attention reads, layer L the model's final norm, applied
    to every token where the model itself applies it after pooling. `residual`: layer 0 is what
    block 0 reads, layer i what block i - 1 writes.

    Raises:
        CaptureError: the model has no such layers.
    """
    check_convention(model, convention)
    anatomy = model.anatomy
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

    if convention == "residual":
        first = anatomy.blocks[0]

        def entering(module: nn.Module, args: tuple[object, ...]) -> None:
            on_features(0, _tokens(model, first, args[0] if args else None))

        return [
            modules[first].register_forward_pre_hook(entering),
            *(output(i + 1, path) for i, path in enumerate(anatomy.blocks)),
        ]
    handles = [output(i, path) for i, path in enumerate(anatomy.norms) if path is not None]
    if anatomy.final_norm is None:
        handles.append(output(last, anatomy.blocks[-1]))
    elif anatomy.final_norm_pooled:
        handles.append(output(last, anatomy.blocks[-1], modules[anatomy.final_norm]))
    else:
        handles.append(output(last, anatomy.final_norm))
    return handles


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
