"""Attention, seen where it is computed.

A TorchFunctionMode sees every call of softmax and of scaled dot-product attention while a model
runs, whatever class makes it and whether or not a fused kernel does the work, and leaves the call
itself alone, so the model's output does not change by a bit. What the attention is inside a fused
kernel is computed again from the same queries and keys, in single precision; for measures in
chunks, and never for more than a few megabytes at a time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vitprobe.capture.geometry import Geometry
from vitprobe.errors import CaptureError
from vitprobe.measures.attention import AttentionChunk
from vitprobe.models import Model

OnAttention = Callable[[AttentionChunk], None]
Logits = Callable[[slice, slice], Tensor]
"""What softmax is given, scaled and masked, for some images and queries: (images, heads, queries,
keys) float32, with the gradient of the queries and keys that it comes from."""

CHUNK_ELEMENTS: Final = 1 << 21
"""Most attention weights in one chunk (8 MB in single precision)."""

_SOFTMAX: Final = (torch.softmax, F.softmax, Tensor.softmax)


class AttentionWatch(TorchFunctionMode):
    """Sees the attention of chosen blocks while it is active, and hands it on.

    Args:
        model: whose attention modules tell which layer a call belongs to.
        layers: the blocks, counted from 0.
    """

    def __init__(self, model: Model, layers: Iterable[int]) -> None:
        super().__init__()
        self.calls = dict.fromkeys(layers, 0)
        self._model = model
        self._layer: int | None = None

    @abstractmethod
    def hand_on(
        self, layer: int, shape: tuple[int, ...], device: torch.device, logits: Logits
    ) -> None:
        """Take what one call computes; shape is (images, heads, queries, keys)."""

    def hook(self) -> Sequence[RemovableHandle]:
        """Register the hooks that say which layer is running."""
        modules = dict(self._model.module.named_modules())
        handles: list[RemovableHandle] = []
        for layer in self.calls:
            attention = modules[self._model.anatomy.attentions[layer]]

            def enter(module: nn.Module, args: object, layer: int = layer) -> None:
                self._layer = layer

            def leave(module: nn.Module, args: object, output: object) -> None:
                self._layer = None

            handles.append(attention.register_forward_pre_hook(enter))
            handles.append(attention.register_forward_hook(leave, always_call=True))
        return handles

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._layer is not None:
            if func is F.scaled_dot_product_attention:
                self._fused(self._layer, *args, **kwargs)
            elif func in _SOFTMAX:
                self._plain(self._layer, *args, **kwargs)
        return func(*args, **kwargs)

    def _fused(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if is_causal or enable_gqa or query.ndim != 4 or key.shape[1] != query.shape[1]:
            raise CaptureError(
                f"model '{self._model.name}', layer {layer}: attention of this form (queries "
                f"{tuple(query.shape)}, keys {tuple(key.shape)}, causal {is_causal}) is not "
                "understood; leave attention out of the measures"
            )
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

        def logits(images: slice, queries: slice) -> Tensor:
            # Autocast would take the product in half precision again.
            with torch.autocast(query.device.type, enabled=False):
                product = (query[images, :, queries].float() * scale) @ key[images].float().mT
            if attn_mask is None:
                return product
            mask = attn_mask.expand(*query.shape[:3], key.shape[2])[images, :, queries]
            if mask.dtype == torch.bool:
                return product.masked_fill(~mask, -torch.inf)
            return product + mask

        self._spoke(layer, (*query.shape[:3], key.shape[2]), query.device, logits)

    def _plain(
        self, layer: int, logits: Tensor, dim: int | None = None, *args: object, **kwargs: object
    ) -> None:
        if logits.ndim != 4 or dim not in (-1, 3):
            raise CaptureError(
                f"model '{self._model.name}', layer {layer}: softmax over {tuple(logits.shape)} in "
                f"dimension {dim} is not (images, heads, queries, keys); leave attention out of "
                "the measures"
            )
        self._spoke(layer, tuple(logits.shape), logits.device, lambda i, q: logits[i, :, q].float())

    def _spoke(
        self, layer: int, shape: tuple[int, ...], device: torch.device, logits: Logits
    ) -> None:
        self.calls[layer] += 1
        self.hand_on(layer, shape, device, logits)


class AttentionTap(AttentionWatch):
    """Hands on the post-softmax attention of all blocks of a model, in chunks.

    Args:
        model: as above.
        geometry: where its tokens lie.
        on_attention: called with every chunk; must not keep it.
    """

    def __init__(self, model: Model, geometry: Geometry, on_attention: OnAttention) -> None:
        super().__init__(model, range(len(model.anatomy.blocks)))
        self.first_image = 0
        self._geometry = geometry
        self._on_attention = on_attention

    def hand_on(
        self, layer: int, shape: tuple[int, ...], device: torch.device, logits: Logits
    ) -> None:
        """Hand on the chunks of one call, without gradients.

        Raises CaptureError for other numbers of queries and keys than the geometry has.
        """
        geometry = self._geometry
        _, _, queries, keys = shape
        if (queries, keys) != (
            geometry.query_prefix + len(geometry.query_xy),
            geometry.key_prefix + len(geometry.key_xy),
        ):
            raise CaptureError(
                f"model '{self._model.name}', layer {layer}: attention of {queries} queries and "
                f"{keys} keys does not fit {len(geometry.query_xy)} patches and "
                f"{geometry.query_prefix} prefix tokens"
            )
        query_xy = geometry.query_xy
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for images, rows in _chunks(shape):
                prefix = max(0, geometry.query_prefix - rows.start)
                patches = slice(
                    max(0, rows.start - geometry.query_prefix),
                    max(0, rows.stop - geometry.query_prefix),
                )
                self._on_attention(
                    AttentionChunk(
                        log_p=torch.log_softmax(logits(images, rows), dim=-1),
                        query_prefix=min(prefix, rows.stop - rows.start),
                        key_prefix=geometry.key_prefix,
                        query_xy=query_xy[patches],
                        key_xy=geometry.key_xy,
                        layer=layer,
                        first_image=self.first_image + images.start,
                        first_query=rows.start,
                        queries=queries,
                        class_token=self._model.anatomy.class_token,
                    )
                )


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Slices of images and queries that cover (images, heads, queries, keys) in small parts."""
    images, heads, queries, keys = shape
    per_chunk = max(1, CHUNK_ELEMENTS // (heads * queries * keys))
    rows = queries if per_chunk > 1 else max(1, min(queries, CHUNK_ELEMENTS // (heads * keys)))
    for image in range(0, images, per_chunk):
        for row in range(0, queries, rows):
            yield slice(image, min(image + per_chunk, images)), slice(row, min(row + rows, queries))
