"""Attention, seen where it is computed and handed on in chunks.

Which computations of a model are attention, and where their queries and keys lie, its anatomy says:
one Site each. The calls themselves are seen by a TorchFunctionMode and left alone, so the model's
output does not change by a bit. What is handed on is still queries and keys: a map is made only
where somebody asks for one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError
from vitprobe.measures.attention import AttentionChunk
from vitprobe.measures.rows import Logits, Products
from vitprobe.models import Model
from vitprobe.models.anatomy import Site
from vitprobe.models.calls import AttentionCall, AttentionCalls

OnAttention = Callable[[AttentionChunk], None]


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
    """Hands on the post-softmax attention of the layers of a model, a chunk a window.

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
            for window in range(site.windows):
                self._on_attention(self._chunk(layer, site, call, window))

    def _chunk(self, layer: int, site: Site, call: AttentionCall, window: int) -> AttentionChunk:
        logits = _logits(site, call, window)
        return AttentionChunk(
            logits=logits if self._gradients else logits.detach(),
            query_prefix=site.query_prefix,
            key_prefix=site.key_prefix,
            query_xy=None if site.query_xy is None else site.query_xy[window],
            key_xy=None if site.key_xy is None else site.key_xy[window],
            layer=layer,
            first_image=self.first_image,
            first_query=window * site.queries,
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


def _logits(site: Site, call: AttentionCall, window: int) -> Logits:
    """(images, heads, queries, keys) of one window, prefix tokens first."""
    index = (slice(None), *_window(site, window))

    def read(tensor: Tensor, *orders: tuple[int, Tensor | None]) -> Tensor:
        tensor = tensor[index]
        tensor = tensor.reshape(len(tensor), site.heads, *tensor.shape[-2:])
        for axis, order in orders:
            if order is not None:
                tensor = tensor.index_select(axis, order.to(tensor.device))
        return tensor

    queries, keys = (-2, site.query_order), (-1, site.key_order)
    if call.given is not None:
        return read(call.given, queries, keys).to(
            torch.promote_types(call.given.dtype, torch.float32)
        )
    if call.query is None or call.key is None:
        raise ValueError("an AttentionCall has queries and keys, or what a softmax is given")
    mask = None if call.mask is None else read(call.mask, queries, keys)
    return Products(
        read(call.query, queries), read(call.key, (-2, site.key_order)), call.scale, mask
    )


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
