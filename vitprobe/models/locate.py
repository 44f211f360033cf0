"""Where the queries and keys of a model's attention lie, as the experiment of `places` shows.

So that deep tokens keep depending on one neighbourhood of the image, attention is made local
meanwhile: each query reads only the key nearest to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from vitprobe.models.anatomy import Site
from vitprobe.models.calls import AttentionCall, AttentionCalls
from vitprobe.models.places import Lattice, Ramps, centres_of, moments_of, snap

_SAME_PLACE: Final = 0.15
"""Most that places may differ along an axis of heads, in spacings of tokens."""
_APART: Final = 0.1
"""Standard deviation of centres, in sides of the image, from which on they are of tokens in
different places: those of a lattice have 0.29."""
_MASKED: Final = -50.0
"""Logits so far below the largest are masks: Swin's are -100."""
_FEWEST_QUERIES: Final = 9
"""Fewer rows of a softmax may seem to lie on a lattice by chance: MobileViTv2's do."""
_PRODUCTS: Final = (
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum
)  # fmt: skip
_PRODUCTS_KEPT: Final = 4
"""Between the product of queries and keys and its softmax lie a few more, of positions."""

Axes = tuple[tuple[Literal["heads", "windows"], int], ...]


@dataclass(frozen=True, eq=False)
class _Side:
    """The queries of one map, or its keys, in all its windows.

    xy: (windows, tokens, 2), approximate centres; nan for what has no place.
    lattice: the one that they lie on; None where there is none.
    size: (width, height) of the image.
    """

    xy: Tensor
    lattice: Lattice | None
    size: tuple[int, int]

    @property
    def placed(self) -> bool:
        """Whether most are tokens with places, of which not all are the same."""
        most = float((~self.xy.isnan().any(-1)).float().mean()) >= 0.5
        return most and (self.lattice is not None or _scatter(self.xy, self.size) > _APART)

    @property
    def prefix(self) -> tuple[int, Tensor | None] | None:
        """How many tokens have no place, and the order that brings them first; None where windows
        differ in them."""
        missing = self.xy.isnan().any(-1)
        if not (missing == missing[:1]).all():
            return None
        count = int(missing[0].sum())
        first = bool(missing[0, :count].all())
        return count, None if first else torch.argsort(~missing[0], stable=True)

    def unknown(self, what: str) -> str:
        """Why their places do not do for distances; "" where they do."""
        if self.lattice is None:
            return f"where its {what} lie in the image is not known"
        if not _distinct(self.lattice):
            return f"several of its {what} have the same place"
        return ""


@dataclass(frozen=True, eq=False)
class _Map:
    """One call as the experiment saw it.

    site: what is known without the places.
    named: whether it is attention wherever its keys lie, as `Locating.sites` says.
    """

    site: Site
    query: _Side
    key: _Side
    named: bool


class Locating(AttentionCalls):
    """The mode under which a model runs on the images of the experiment.

        with Locating(module, ramps, input_size) as locating, torch.no_grad():
            module(ramps.images(input_size))
        sites = locating.sites()

    Each query reads only the key nearest to it, as located from the same call, and nothing where
    either has no place; over channels, each reads itself.
    """

    def __init__(
        self, module: nn.Module, ramps: Ramps | None, input_size: tuple[int, int, int]
    ) -> None:
        super().__init__(module)
        self._ramps = ramps if ramps is not None and ramps.draws else None
        self._input_size = input_size
        self._maps: list[_Map] = []
        self._lattices: list[tuple[Tensor, Lattice]] = []
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if func in _PRODUCTS and not self._handing_on:
            operands = _operands(*args)
            if operands:
                self._products = [*self._products[1 - _PRODUCTS_KEPT :], (output, *operands)]
        return output

    def sites(self) -> tuple[Site, ...]:
        """The attention layers that were seen, in order of execution.

        A softmax is attention where its logits are a product of what the image changes with what
        the image changes, where its keys have places, or where it has the heads that its module
        says it has, and in a module of a kind that computes attention elsewhere; a classifier's, a
        gate's over few entries and one of positions alone are none. What was called by the name of
        attention always is.
        """
        sure = {seen.site.path for seen in self._maps if self._described(seen)}
        kinds = {type(self._module.get_submodule(path)) for path in sure}
        sites = []
        for seen in self._maps:
            path = seen.site.path
            like = path not in sure and type(self._module.get_submodule(path)) in kinds
            site = self._described(replace(seen, named=True) if like else seen)
            if site:
                sites.append(replace(site, calls=self.seen[path]))
        return tuple(sites)

    @property
    def doubtful(self) -> bool:
        """Whether more draws might tell places that these do not, or not for certain."""
        maps = (seen for seen in self._maps if seen.query.placed and seen.key.placed)
        sides = (side for seen in maps for side in (seen.query, seen.key))
        return any(side.unknown("") or (side.lattice and side.lattice.doubtful) for side in sides)

    def on_call(self, call: AttentionCall) -> Tensor | None:
        if self._ramps is None:
            self._maps.append(self._unlocated(call))
            return None
        count = self._ramps.count
        if not call.lead or call.lead[0] % count or call.shape[-1] < 2:
            return None
        if call.query is None:
            call = self._with_operands(call)
        sizes = (call.lead[0] // count, *call.lead[1:])
        by_query, by_key = _of_call(call.split((count, *sizes)), self._ramps)
        axes = self._axes(call.path, sizes, by_query, by_key)
        sizes = tuple(size for _, size in axes)
        split = call.split((count, *sizes))
        by_query, by_key = _by_window(by_query, axes), _by_window(by_key, axes)
        if self._same_tokens(by_query, by_key):
            by_query = by_key = _together(by_query, by_key)
        query, key = self._side(by_query), self._side(by_key)
        windows = len(query.xy)
        if call.query is None and call.shape[-2] < min(_FEWEST_QUERIES, call.shape[-1]):
            query = replace(query, xy=torch.full_like(query.xy, torch.nan), lattice=None)
        site = Site(
            path=call.path,
            call=call.call,
            heads=math.prod(sizes) // windows,
            queries=call.shape[-2],
            keys=call.shape[-1],
            windows=windows,
            axes=axes,
        )
        square = site.queries == site.keys and bool(by_query[0].max() > 0)
        if square and self._over_channels(split, self._ramps, query, axes):
            site = replace(site, over="channels", no_distance="its rows are over channels")
            reads = torch.arange(site.keys).expand(windows, -1)
        else:
            site = replace(site, allowed=_allowed(split, axes))
            reads = _nearest(site, query, key)
        heads = _stated_heads(self._module, call.path)
        named = call.query is not None or (heads == site.heads and len(axes) + heads > 2)
        self._maps.append(_Map(site, query, key, named))
        shape = [size if axis == "windows" else 1 for axis, size in axes]
        reads = reads.reshape(*shape, -1).expand(count, *sizes, -1)
        return reads.reshape(call.shape[:-1]).to(call.device)

    def _with_operands(self, call: AttentionCall) -> AttentionCall:
        """A softmax with the queries and keys of the product that its logits seem to come from.

        They are seen apart there; in the logits every entry is of one query and one key.
        """
        for product, query, key in reversed(self._products):
            found = replace(call, query=query, key=key.mT)
            follow = (bool((each[1:] != each[:1]).any()) for each in (query, key))
            if product.shape == call.shape and min(query.ndim, key.ndim) > 2 and all(follow):
                return found
        return call

    def _unlocated(self, call: AttentionCall) -> _Map:
        """A call of a model that is run on one image alone."""
        stated = _stated_heads(self._module, call.path)
        axes: Axes = tuple(
            ("heads" if stated in (None, size) else "windows", size) for size in call.lead
        )
        windows = math.prod(size for axis, size in axes if axis == "windows")
        site = Site(
            path=call.path,
            call=call.call,
            heads=math.prod(call.lead) // windows,
            queries=call.shape[-2],
            keys=call.shape[-1],
            windows=windows,
            axes=axes,
            no_distance="the model is too large for its tokens to be located",
        )
        nowhere = _Side(torch.full((windows, site.keys, 2), torch.nan), None, (0, 0))
        # A softmax without heads or windows is a classifier's or a gate's.
        return _Map(site, nowhere, nowhere, call.query is not None or len(call.lead) > 1)

    def _side(self, moments: Tensor) -> _Side:
        """Where (5, windows, tokens) lie, on a lattice of their own or on one seen before."""
        xy = centres_of(moments, self._input_size)
        size = self._input_size[2], self._input_size[1]
        lattice = snap(xy, self._input_size)
        if lattice is not None and _distinct(lattice) and not lattice.doubtful:
            self._lattices.append((xy, lattice))
            return _Side(xy, lattice, size)
        # Deep in a model places blur, but tokens that lie near where others of the same number and
        # order lay lie there.
        for before, known in reversed(self._lattices):
            if before.shape == xy.shape and torch.equal(before.isnan(), xy.isnan()):
                height, width = self._input_size[1:]
                spacing = torch.tensor([width / known.grid[1], height / known.grid[0]])
                if ((xy - known.xy) / spacing).square().nanmean().sqrt() < 0.6:
                    return _Side(xy, known, size)
        return _Side(xy, lattice, size)

    def _same_tokens(self, by_query: Tensor, by_key: Tensor) -> bool:
        """Whether the queries are the keys' own tokens: in the same places in the same order."""
        if by_query.shape != by_key.shape:
            return False
        query, key = (centres_of(moments, self._input_size) for moments in (by_query, by_key))
        apart = (query - key).norm(dim=-1)
        _, height, width = self._input_size
        return bool(apart.nanmedian() < 0.5 * math.sqrt(height * width / apart.numel()))

    def _over_channels(self, call: AttentionCall, ramps: Ramps, query: _Side, axes: Axes) -> bool:
        """Whether the entries of a square map are channels: not they have places, but what they
        are made of has."""
        if query.placed and query.lattice is not None:
            return False
        if call.query is not None:
            made_of = _by_window(moments_of(call.query.mT, ramps), axes)
            scatter = _scatter(centres_of(made_of, self._input_size), query.size)
            return scatter > max(_APART, 2 * _scatter(query.xy, query.size))
        # Of a softmax the operands are not seen: are there as many channels as that a head?
        channels = call.shape[-1] * math.prod(size for axis, size in axes if axis == "heads")
        owner = self._module.get_submodule(call.path)
        return any(
            weight.ndim > 1 and channels in weight.shape[:2] for weight in owner.parameters()
        )

    def _axes(self, path: str, sizes: tuple[int, ...], query: Tensor, key: Tensor) -> Axes:
        """Which axes are heads: those along which places are the same."""
        stated = _stated_heads(self._module, path)
        length = min(self._input_size[1:])

        def spread(sizes: tuple[int, ...], axis: int) -> float:
            """How much places differ along an axis, in spacings of the tokens of one map."""
            for seen in (query, key):
                by_axis = seen.reshape(len(seen), *sizes, -1)
                centres = centres_of(by_axis, self._input_size)
                deviation = centres.std(axis, correction=0).norm(dim=-1)
                if not deviation.isnan().all():
                    return float(deviation.nanmedian()) * math.sqrt(centres.shape[-2]) / length
            return 0.0

        if stated is not None and stated > 1:
            splits = [(sizes, axis) for axis, size in enumerate(sizes) if size == stated]
            for axis, size in enumerate(sizes):
                if size % stated == 0 and size > stated:
                    before, after = sizes[:axis], sizes[axis + 1 :]
                    splits.append(((*before, size // stated, stated, *after), axis + 1))
                    splits.append(((*before, stated, size // stated, *after), axis))
            if splits:
                split, heads = min(splits, key=lambda each: spread(*each))
                return tuple(
                    ("heads" if axis == heads else "windows", size)
                    for axis, size in enumerate(split)
                )
        return tuple(
            ("heads" if size > 1 and spread(sizes, axis) < _SAME_PLACE else "windows", size)
            for axis, size in enumerate(sizes)
        )

    def _described(self, seen: _Map) -> Site | None:
        """The site of a call; None where it is no attention."""
        site = replace(seen.site, note=_note(self._module.get_submodule(seen.site.path)))
        if site.over == "channels":
            return site
        if not seen.key.placed:
            why = site.no_distance or "where its keys lie in the image is not known"
            return replace(site, allowed=None, no_distance=why) if seen.named else None
        query, key = seen.query.prefix, seen.key.prefix
        if not seen.query.placed:
            count, order = key or (0, None)
            why = "its queries are no patches"
            if site.queries == site.keys:
                why = "where its queries lie in the image is not known"
            elif site.queries == 1:
                why = f"its only query is {'the class token' if count else 'no patch'}"
            return replace(site, key_prefix=count, key_order=order, allowed=None, no_distance=why)
        if query is None or key is None:
            why = "its windows hold different numbers of tokens that are no patches"
            return replace(site, allowed=None, no_distance=why)
        site = replace(
            site,
            query_prefix=query[0],
            query_order=query[1],
            key_prefix=key[0],
            key_order=key[1],
        )
        why = seen.query.unknown("queries") or seen.key.unknown("keys")
        if why or seen.query.lattice is None or seen.key.lattice is None:
            return replace(site, allowed=None, no_distance=why)
        allowed = site.allowed
        if allowed is not None:
            allowed = _ordered(_ordered(allowed, query).mT, key).mT
            allowed = None if bool(allowed.all()) else allowed
        return replace(
            site,
            query_xy=_ordered(seen.query.lattice.xy, query),
            key_xy=_ordered(seen.key.lattice.xy, key),
            allowed=allowed,
            note=f"{site.note} {_doubt(seen)}".strip(),
        )


def _scatter(xy: Tensor, size: tuple[int, int]) -> float:
    """The smaller of the standard deviations of x and y (..., 2), in sides of the image."""
    found = xy[~xy.isnan().any(-1)]
    if not len(found):
        return 0.0
    return float((found.std(0, correction=0) / torch.tensor(size)).min())


def _of_call(call: AttentionCall, ramps: Ramps) -> tuple[Tensor, Tensor]:
    """Moments of the queries (5, ..., queries) and of the keys (5, ..., keys) of a call."""
    if call.query is None or call.key is None:
        # A softmax whose logits are no product: rows and columns are all there is to see.
        logits = call.logits().nan_to_num(0, 0, 0)
        return moments_of(logits, ramps), moments_of(logits.mT, ramps)
    by_query, by_key = (moments_of(each, ramps) for each in (call.query, call.key))
    if call.value is not None:
        by_key = _together(by_key, moments_of(call.value, ramps))
    return by_query, by_key


def _together(one: Tensor, other: Tensor) -> Tensor:
    """The moments of tokens seen twice, each time on a scale of its own."""
    return one / one[0].mean().clamp_min(1e-30) + other / other[0].mean().clamp_min(1e-30)


def _operands(*args: Any) -> tuple[Tensor, Tensor] | None:
    """The two operands of a product, (..., queries, depth) and (..., depth, keys)."""
    if len(args) == 2 and isinstance(args[1], list | tuple):  # einsum takes them as a list too
        args = (args[0], *args[1])
    if len(args) == 2:
        return args
    if len(args) != 3 or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    equation, left, right = args
    terms, _, result = equation.replace(" ", "").partition("->")
    of_left, _, of_right = terms.partition(",")
    summed = "".join({*of_left} & {*of_right} - {*result})
    query, key = result[:-1] + summed, result[:-2] + summed + result[-1:]
    if sorted(query) != sorted(of_left) or sorted(key) != sorted(of_right) or len(summed) != 1:
        return None
    return (
        left.permute([of_left.index(letter) for letter in query]),
        right.permute([of_right.index(letter) for letter in key]),
    )


def _stated_heads(module: nn.Module, path: str) -> int | None:
    """How many heads the module that computes attention, or one just above it, says it has."""
    while True:
        owner = module.get_submodule(path)
        for name in ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead"):
            if isinstance(count := getattr(owner, name, None), int):
                return count
        if not path:
            return None
        path = path.rpartition(".")[0]


def _by_window(moments: Tensor, axes: Axes) -> Tensor:
    """(5, windows, entries), heads fused, of (5, ..., entries)."""
    moments = moments.reshape(5, *(size for _, size in axes), -1)
    heads = [1 + i for i, (axis, _) in enumerate(axes) if axis == "heads"]
    fused = moments.sum(heads, keepdim=True) if heads else moments
    return fused.reshape(5, -1, moments.shape[-1])


def _nearest(site: Site, query: _Side, key: _Side) -> Tensor:
    """(windows, queries) the key nearest to each query, -1 where either has no place."""
    if not (query.placed and key.placed):
        return torch.full((site.windows, site.queries), -1)
    query_xy, key_xy = (
        (side.xy if side.lattice is None else side.lattice.xy).double() for side in (query, key)
    )
    distance = torch.cdist(query_xy.nan_to_num(0), key_xy.nan_to_num(0))
    if site.queries == site.keys:
        # Of keys in one place, its own.
        distance = distance - 1e-6 * torch.eye(site.keys)
    distance = distance.masked_fill(key_xy.isnan().any(-1)[:, None], torch.inf)
    if site.allowed is not None:
        distance = distance.masked_fill(~site.allowed, torch.inf)
    unknown = query_xy.isnan().any(-1) | distance.amin(-1).isinf()
    return distance.argmin(-1).masked_fill(unknown, -1)


def _allowed(call: AttentionCall, axes: Axes) -> Tensor | None:
    """(windows, queries, keys) of the first image, False where no head may read a key."""
    if call.mask is not None:
        mask = call.mask[0]
        masked = ~mask if mask.dtype == torch.bool else mask < _MASKED
    elif call.given is not None:
        first = call.given[0].float()
        masked = first < first.amax(-1, keepdim=True) + _MASKED
    else:
        return None
    if not masked.any():
        return None
    heads = [i for i, (axis, _) in enumerate(axes) if axis == "heads"]
    masked = masked.all(tuple(heads), keepdim=True) if heads else masked
    return ~masked.reshape(-1, *call.shape[-2:]).cpu()


def _distinct(lattice: Lattice) -> bool:
    """Whether no two tokens of a window have the same place."""
    ordered = lattice.cells.sort(-1).values
    return not ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()


def _ordered(values: Tensor, prefix: tuple[int, Tensor | None]) -> Tensor:
    """Values (windows, tokens, ...) of patches, in the order that brings prefix tokens first."""
    count, order = prefix
    return (values if order is None else values[:, order])[:, count:]


def _doubt(seen: _Map) -> str:
    """How certain the places are, a sentence; "" where they are."""
    lattices = [side.lattice for side in (seen.query, seen.key) if side.lattice is not None]
    worst = max(lattices, key=lambda lattice: lattice.doubtful / lattice.cells.numel())
    if not worst.doubtful:
        return ""
    return (
        f"Where {worst.doubtful} of {worst.cells.numel()} tokens lie is likely and not certain: "
        "they may be a token off."
    )


def _note(module: nn.Module) -> str:
    """What a reader must know of the maps of a module."""
    heads = getattr(module, "num_heads", 0)
    if hasattr(module, "lambda_init"):
        return "Differential attention: this map is one of two that are subtracted."
    if hasattr(module, "gating_param"):
        return "Gated positional attention: the mixture of content and position."
    if isinstance(heads, int) and heads > 1:
        for child in module.children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and weight.shape[:2] == (heads,) * 2:
                return "Talking heads: these are the softmax's own rows, heads not yet mixed."
    return ""
