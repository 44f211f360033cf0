"""Attention, seen where it is computed and handed on in chunks.

Which computations of a model are attention, and where their queries and keys lie, its anatomy says:
one Site each. The calls themselves are seen by a TorchFunctionMode and left alone, so the model's
output does not change by a bit; measures get a few megabytes of the maps at a time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError
from vitprobe.measures.attention import AttentionChunk
from vitprobe.models import Model
from vitprobe.models.anatomy import Site
from vitprobe.models.calls import AttentionCall, AttentionCalls

OnAttention = Callable[[AttentionChunk], None]

CHUNK_ELEMENTS: Final = 1 << 21
"""Most attention weights in one chunk (8 MB in single precision)."""


class AttentionWatch(AttentionCalls):
    """Sees chosen attention layers of a model while it is active, and hands their calls on.

    Args:
        model: whose sites tell which layer a call belongs to.
        layers: indices into its sites.
    """

    def __init__(self, model: Model, layers: Iterable[int]) -> None:
        self._sites = {layer: model.anatomy.sites[layer] for layer in layers}
        super().__init__(model.module, {site.path for site in self._sites.values()})
        self.calls = dict.fromkeys(self._sites, 0)
        self._model = model
        self._per_pass = {site.path: site.calls for site in self._sites.values()}
        self._layers = {(site.path, site.call): layer for layer, site in self._sites.items()}

    @abstractmethod
    def hand_on(self, layer: int, call: AttentionCall) -> None:
        """Take what one layer computes."""

    def on_call(self, call: AttentionCall) -> None:
        # A call more than the site's module makes in one pass repeats one of them.
        layer = self._layers.get((call.path, call.call % self._per_pass.get(call.path, 1)))
        if layer is not None:
            self.calls[layer] += 1
            self.hand_on(layer, call)

    def __enter__(self) -> Self:
        super().__enter__()
        self.calls = dict.fromkeys(self._sites, 0)
        return self


class AttentionTap(AttentionWatch):
    """Hands on the post-softmax attention of the layers of a model, in chunks.

    It stays active over several forward passes too.

    Args:
        model: as above.
        on_attention: called with every chunk; must not keep it.
        gradients: whether chunks keep the gradient of what they come from.
    """

    def __init__(self, model: Model, on_attention: OnAttention, *, gradients: bool = False) -> None:
        super().__init__(model, range(len(model.anatomy.sites)))
        self.first_image = 0
        self._on_attention = on_attention
        self._gradients = gradients

    def hand_on(self, layer: int, call: AttentionCall) -> None:
        """Hand on the chunks of one call.

        Raises CaptureError for other numbers of queries and keys than the site has.
        """
        site = self._sites[layer]
        maps = site.windows * site.heads
        if call.shape[-2:] != (site.queries, site.keys) or math.prod(call.lead) % maps:
            raise CaptureError(
                f"model '{self._model.name}', attention layer {layer} ('{site.path}'): attention "
                f"of shape {call.shape} does not fit {site.windows} x {site.heads} maps of "
                f"{site.queries} queries and {site.keys} keys, as there were when the model was "
                "described"
            )
        axes = site.axes or (("heads", site.heads),)
        call = call.split((math.prod(call.lead) // maps, *(size for _, size in axes)))
        grad = torch.is_grad_enabled() and self._gradients
        with torch.set_grad_enabled(grad), torch.autocast(call.device.type, enabled=False):
            for images, window, rows in _chunks(call.shape[0], site):
                self._on_attention(self._chunk(layer, site, call, images, window, rows))

    def _chunk(
        self, layer: int, site: Site, call: AttentionCall, images: slice, window: int, rows: slice
    ) -> AttentionChunk:
        queries: slice | Tensor = rows
        if site.query_order is not None:
            queries = site.query_order[rows].to(call.device)
        logits = call.logits((images, *_window(site, window)), queries)
        logits = logits.reshape(len(logits), site.heads, *logits.shape[-2:])
        if site.key_order is not None:
            logits = logits[..., site.key_order.to(call.device)]
        log_p = torch.log_softmax(logits, dim=-1)
        # Where every key is masked there is no attention, and softmax would make nan of it.
        log_p = log_p.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
        prefix = min(max(0, site.query_prefix - rows.start), rows.stop - rows.start)
        patches = slice(
            max(0, rows.start - site.query_prefix), max(0, rows.stop - site.query_prefix)
        )
        return AttentionChunk(
            log_p=log_p,
            query_prefix=prefix,
            key_prefix=site.key_prefix,
            query_xy=None if site.query_xy is None else site.query_xy[window, patches],
            key_xy=None if site.key_xy is None else site.key_xy[window],
            layer=layer,
            first_image=self.first_image + images.start,
            first_query=window * site.queries + rows.start,
            queries=site.windows * site.queries,
            class_token=self._model.anatomy.class_token,
            whole=site.whole,
        )

    def __enter__(self) -> Self:
        super().__enter__()

        def begin(module: nn.Module, args: object) -> None:
            self.calls = dict.fromkeys(self._sites, 0)
            self.seen = {}

        self._hooks.callback(self._module.register_forward_pre_hook(begin).remove)
        return self


def _window(site: Site, window: int) -> tuple[int | slice, ...]:
    """The index of one window among the axes between images and queries, heads whole."""
    index: list[int | slice] = []
    for axis, size in reversed(site.axes or (("heads", site.heads),)):
        if axis == "heads":
            index.append(slice(None))
        else:
            window, place = divmod(window, size)
            index.append(place)
    return tuple(reversed(index))


def _chunks(images: int, site: Site) -> Iterator[tuple[slice, int, slice]]:
    """Images, window and queries of small parts that cover a layer, in order."""
    row = site.heads * site.keys
    per_chunk = max(1, CHUNK_ELEMENTS // (row * site.queries))
    rows = site.queries
    if per_chunk == 1:
        rows = max(1, min(rows, CHUNK_ELEMENTS // row))
    for image in range(0, images, per_chunk):
        for window in range(site.windows):
            for first in range(0, site.queries, rows):
                yield (
                    slice(image, min(image + per_chunk, images)),
                    window,
                    slice(first, min(first + rows, site.queries)),
                )
