"""The context in which a model hands on its features and attention."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from vitprobe.capture.attention import AttentionTap, OnAttention
from vitprobe.capture.calls import check_calls
from vitprobe.capture.features import Convention, OnFeatures, feature_layers, hook_features
from vitprobe.models import Model

_REMEDY = "leave them out (nothing can be seen in TorchScript modules, or in other threads)"


class Recorder:
    """Runs a model and hands on what its layers compute, as they compute it.

        with Recorder(model, on_features=keep, on_attention=add) as recorder:
            output = recorder.run(images)

    The model's output is bit-identical to a run without the recorder. Nothing is stored here.

    Args:
        model: from `load` or `wrap`.
        convention: which tokens a layer stands for, `normed` or `residual`.
        on_features: called with (layer, tokens) for layers 0 … L; tokens (images, tokens, width).
        on_attention: called with an AttentionChunk for every part of every block's attention.
    """

    def __init__(
        self,
        model: Model,
        *,
        convention: Convention = "normed",
        on_features: OnFeatures | None = None,
        on_attention: OnAttention | None = None,
    ) -> None:
        self.model = model
        self._convention: Convention = convention
        self._on_features = on_features
        self._on_attention = on_attention
        self._seen: dict[int, int] = {}
        self._tap: AttentionTap | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._on_features is not None:
                for handle in hook_features(self.model, self._convention, self._feature):
                    stack.callback(handle.remove)
            if self._on_attention is not None:
                self._tap = AttentionTap(self.model, self._on_attention)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(self, images: Tensor, first_image: int = 0) -> Tensor:
        """One forward pass; (n, channels, height, width) in [0, 1], normalised here.

        Args:
            images: at the model's input size, on its device.
            first_image: index, in the whole run, of the first of them.

        Returns:
            What the model returns.

        Raises:
            CaptureError: a layer that was asked for stayed silent, or spoke more than once.
        """
        self._seen = dict.fromkeys(feature_layers(self.model.anatomy), 0)
        inputs = self.model.normalize(images)
        parameter = next(self.model.module.parameters(), inputs)
        if parameter.is_floating_point():
            inputs = inputs.to(parameter.dtype)
        # Code that torch.compile made passes hooks by.
        with torch.compiler.set_stance("force_eager"), self._tap or nullcontext():
            if self._tap is not None:
                self._tap.first_image = first_image
            output = self.model.module(inputs)
        if self._tap is not None:
            check_calls(self.model, "attention", self._tap.calls, _REMEDY)
        if self._on_features is not None:
            check_calls(self.model, "features", self._seen, _REMEDY)
        return output

    def _feature(self, layer: int, tokens: Tensor) -> None:
        self._seen[layer] += 1
        if self._on_features is not None:
            with torch.no_grad():
                self._on_features(layer, tokens.detach())
