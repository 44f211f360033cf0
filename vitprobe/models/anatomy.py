"""What the probe must know of a live model: layers, how their tokens lie, and its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitprobe.errors import CaptureError


@dataclass(frozen=True)
class Layout:
    """How the tokens of one layer lie, in their tensor and in the image.

    form: "tokens" (images, tokens, width), "grid" (images, rows, columns, width), "maps" (images,
        width, rows, columns) or "sequence" (tokens, images, width).
    width: numbers a token.
    prefix_tokens: class, distillation and register tokens, which come first.
    patches: how many tokens follow them.
    grid: (rows, columns) of the patches, which lie row by row; None where their order in the image
        is not known.
    patch_size: (height, width) of a patch in pixels of the model's input; None as for the grid.
    order: where, among the tokens as the tensor has them, those of an image lie, prefix tokens
        first and patches row by row; None where they lie so already.
    folded: how many entries of the tensor's axis of images are of one image, as where windows are
        folded into it.
    """

    form: Literal["tokens", "sequence", "grid", "maps"]
    width: int
    prefix_tokens: int
    patches: int
    grid: tuple[int, int] | None
    patch_size: tuple[float, float] | None
    order: tuple[int, ...] | None = None
    folded: int = 1

    def read(self, value: Tensor) -> Tensor | None:
        """The tokens (images, tokens, width) of such a tensor; None where it is of another form."""
        if value.ndim < 3:
            return None
        if self.form == "maps":
            value = value.movedim(1, -1)
        elif self.form == "sequence":
            value = value.transpose(0, 1)
        images, tokens = value.shape[0] // self.folded, self.prefix_tokens + self.patches
        if value.shape[-1] != self.width or value.numel() != images * tokens * self.width:
            return None
        value = value.reshape(images, tokens, self.width)
        if self.order is None:
            return value
        return value.index_select(1, torch.tensor(self.order, device=value.device))


@dataclass(frozen=True, eq=False)
class Site:
    """One computation of attention in a forward pass: one attention layer.

    path: the innermost module that runs when it is computed.
    call: which computation of that module in one forward pass this is, from 0.
    calls: how many softmaxes that module computes in one forward pass, whatever they are.
    heads, queries, keys: sizes of one window's map, prefix and padding tokens included.
    windows: how many maps an image has; 1 where attention is global.
    axes: what the axes between images and queries are, in the order in which the model has them,
        with their sizes; empty where there are heads only.
    query_prefix, key_prefix: tokens that are no patches (class, registers, padding), in one window.
    query_order, key_order: indices that bring those tokens first; None where they come first.
    query_xy, key_xy: (windows, patches, 2) float64, centres (x, y) in pixels of the model's input;
        None where places are not known.
    allowed: (windows, patch queries, patch keys), False where the model masks a key; None where it
        masks none.
    over: what a row is a distribution over: "tokens", or "channels".
    no_distance: why its attention has no distance, as the end of a sentence; "" where it has one.
    note: what a reader must know of these maps, a sentence; "" where there is nothing.
    """

    path: str
    call: int
    heads: int
    queries: int
    keys: int
    windows: int = 1
    calls: int = 1
    axes: tuple[tuple[Literal["heads", "windows"], int], ...] = ()
    query_prefix: int = 0
    key_prefix: int = 0
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    query_xy: Tensor | None = None
    key_xy: Tensor | None = None
    allowed: Tensor | None = None
    over: Literal["tokens", "channels"] = "tokens"
    no_distance: str = ""
    note: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is one map of all patches attending to all patches."""
        return (
            self.windows == 1
            and self.over == "tokens"
            and self.query_xy is not None
            and self.key_xy is not None
            and torch.equal(self.query_xy, self.key_xy)
        )


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What capture needs of a live model; module paths are those of `named_modules()`.

    blocks: the L blocks in order, "blocks.0", …
    norms: the pre-norm whose output block i's attention reads; None where there is none.
    final_norm: path of the norm after the last block; None where the model has none.
    final_norm_pooled: whether the model applies it to pooled or to class tokens only.
    class_token: whether the first prefix token is a class token: so where the module does not say
        that it has none, as timm's models of registers alone do.
    pre_norm: whether the blocks normalise before their attention.
    branches: whether a block returns only what is added to the tokens that it reads, so that a
        layer is what the next block, or the final norm, reads.
    residual: of the layers 0 … L of that convention.
    normed: likewise; empty where the model has residual layers only.
    sites: attention layers in the order in which they are computed; in a plain Vision Transformer
        one a block.
    no_attention: why there are none, as the end of a sentence; "" where there are some.
    """

    blocks: tuple[str, ...]
    norms: tuple[str | None, ...]
    final_norm: str | None
    final_norm_pooled: bool
    class_token: bool
    pre_norm: bool
    residual: tuple[Layout, ...]
    normed: tuple[Layout, ...]
    sites: tuple[Site, ...]
    no_attention: str = ""
    branches: bool = False

    @property
    def plain(self) -> bool:
        """Whether all layers have the same tokens, and each block one global attention."""
        return (
            len({*self.residual, *self.normed}) == 1
            and len(self.sites) == len(self.blocks)
            and all(site.whole for site in self.sites)
        )

    @property
    def attentions(self) -> tuple[str, ...]:
        """The module of each attention layer."""
        return tuple(site.path for site in self.sites)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each attention layer."""
        return tuple(site.heads for site in self.sites)

    @property
    def prefix_tokens(self) -> int:
        """Of the first layer."""
        return self.residual[0].prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Of the first layer. Raises CaptureError where its patches have no known order."""
        if self.residual[0].grid is None:
            raise CaptureError("the patches of this model have no known order in the image")
        return self.residual[0].grid

    @property
    def patch_size(self) -> tuple[float, float]:
        """Of the first layer. Raises CaptureError as `grid`."""
        if self.residual[0].patch_size is None:
            raise CaptureError("the patches of this model have no known order in the image")
        return self.residual[0].patch_size

    @property
    def width(self) -> int:
        """Of the first layer."""
        return self.residual[0].width
