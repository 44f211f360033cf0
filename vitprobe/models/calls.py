"""The calls in which a running model computes attention, whatever class makes them.

A TorchFunctionMode sees every softmax, scaled dot-product attention and multi-head attention, fused
or not, and leaves them alone. What a fused kernel computes is computed again from the same queries
and keys, in single precision, and only as much of it as is asked for.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitprobe.measures.rows import masked_

Index = tuple[int | slice, ...]

_SOFTMAX: Final = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)
_MULTI_HEAD: Final = inspect.signature(F.multi_head_attention_forward)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One computation of attention: rows over keys, the last axis of `shape`.

    path: the innermost module that runs; call: which of its computations since the pass began.
    shape: (..., queries, keys); the leading axes hold images, windows and heads as the model has
        them.
    query, key, value: (..., queries, depth), (..., keys, depth) and (..., keys, width), which
        broadcast to the leading axes; None for a softmax, of which only `given` is seen.
    mask: True where a key may be read, or what is added to the logits; it broadcasts to `shape`.
    scale: what the product of queries and keys is multiplied by.
    given: what a softmax is given, its axis last; None where there are queries and keys.
    """

    path: str
    call: int
    shape: tuple[int, ...]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    scale: float = 1.0
    given: Tensor | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.shape[:-2]

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return next(t.device for t in (self.query, self.given) if t is not None)

    def split(self, lead: tuple[int, ...]) -> AttentionCall:
        """The same call with its leading axes read, row by row, as of these sizes."""

        def read(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tail = tensor.shape[-2:]
            return tensor.expand(*self.lead, *tail).reshape(*lead, *tail)

        mask = None if self.mask is None else self.mask.expand(self.shape)
        return replace(
            self,
            shape=(*lead, *self.shape[-2:]),
            query=read(self.query),
            key=read(self.key),
            value=read(self.value),
            mask=read(mask),
            given=read(self.given),
        )

    def logits(self, index: Index = (), queries: slice | Tensor = slice(None)) -> Tensor:
        """What the softmax is given, scaled and masked, in single precision.

        index: which entries of the leading axes; queries: which queries. The result has the
        gradient of what it comes from.
        """
        if self.given is not None:
            return self.given[index][..., queries, :].float()
        if self.query is None or self.key is None:
            raise ValueError("an AttentionCall has queries and keys, or what a softmax is given")
        query = self.query.expand(*self.lead, *self.query.shape[-2:])
        key = self.key.expand(*self.lead, *self.key.shape[-2:])
        # Autocast would take the product in half precision again.
        with torch.autocast(query.device.type, enabled=False):
            rows = query[index][..., queries, :].float() * self.scale
            product = rows @ key[index].float().mT
        mask = None if self.mask is None else self.mask.expand(self.shape)[index][..., queries, :]
        return masked_(product, mask)


class _Seen(NamedTuple):
    """A call, and what its function returns if each query reads one key only."""

    call: AttentionCall
    result: Callable[[Tensor], Any]


class AttentionCalls(TorchFunctionMode):
    """Sees the attention that a module computes while it is active, and hands it on.

    Args:
        module: the model.
        paths: of the modules to look at, with everything in them; all where not given.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str] = ("",)) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self._module = module
        self._paths = tuple(paths)
        self._running: list[str] = []
        self._handing_on = False
        self._hooks = ExitStack()

    @abstractmethod
    def on_call(self, call: AttentionCall) -> Tensor | None:
        """Take one call; `seen` counts those of each module.

        Returns None to leave it alone, or (..., queries) the one key that each query is to read
        instead, -1 for none.
        """

    def __enter__(self) -> Self:
        self.seen, self._running = {}, []
        with ExitStack() as stack:
            for path, module in self._module.named_modules():
                # A softmax that is a module of its own belongs to the module that holds it.
                if not isinstance(module, nn.Softmax) and _within(path, self._paths):
                    self._watch(path, module, stack)
            self._hooks = stack.pop_all()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._hooks.close()

    def _watch(self, path: str, module: nn.Module, stack: ExitStack) -> None:
        mixes = _mixes(self._module, path)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
            self._running.append(path)
            return self._mixture(path, *args) if mixes else None

        def leave(*_: object) -> None:
            self._running.pop()

        handles = (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        )
        for handle in handles:
            stack.callback(handle.remove)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._running or self._handing_on:
            return func(*args, **kwargs)
        path = self._running[-1]
        if func is F.scaled_dot_product_attention:
            seen: _Seen | None = self._fused(path, *args, **kwargs)
        elif func is F.multi_head_attention_forward:
            seen = self._multi_head(path, _MULTI_HEAD.bind(*args, **kwargs))
        elif func in _SOFTMAX and not _mixes(self._module, f"{path}.attn_drop"):
            seen = self._softmax(path, *args, **kwargs)
        else:
            return func(*args, **kwargs)
        reads = self._hand_on(seen.call) if seen else None
        return func(*args, **kwargs) if seen is None or reads is None else seen.result(reads)

    def _hand_on(self, call: AttentionCall) -> Tensor | None:
        self.seen[call.path] = call.call + 1
        self._handing_on = True
        try:
            return self.on_call(call)
        finally:
            self._handing_on = False

    def _call(self, path: str, shape: tuple[int, ...], **tensors: Any) -> AttentionCall:
        return AttentionCall(path, self.seen.get(path, 0), shape, **tensors)

    def _fused(
        self,
        path: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> _Seen:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        if is_causal:
            causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            attn_mask = causal.to(query.device)
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        call = self._call(
            path,
            (*lead, query.shape[-2], key.shape[-2]),
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        )
        return _Seen(call, lambda reads: _read(value, reads))

    def _softmax(
        self,
        path: str,
        input: Tensor,  # noqa: A002 (torch's own name)
        dim: int | None = None,
        *args: object,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> _Seen | None:
        if input.ndim < 2 or dim is None:
            return None
        given = input.movedim(dim, -1)

        def rows(reads: Tensor) -> Tensor:
            rows = torch.zeros_like(given, dtype=dtype)
            rows.scatter_(-1, reads.clamp_min(0)[..., None], (reads >= 0)[..., None].to(rows))
            return rows.movedim(-1, dim)

        return _Seen(self._call(path, tuple(given.shape), given=given), rows)

    def _mixture(self, path: str, mixed: Tensor) -> tuple[Tensor] | None:
        """ConViT mixes a softmax of content with one of position: only `attn_drop` reads both."""
        path = path.rpartition(".")[0]
        call = self._call(path, tuple(mixed.shape), given=mixed.log())
        reads = self._hand_on(call)
        if reads is None:
            return None
        rows = torch.zeros_like(mixed)
        return (rows.scatter_(-1, reads.clamp_min(0)[..., None], (reads >= 0)[..., None].to(rows)),)

    def _multi_head(self, path: str, bound: inspect.BoundArguments) -> _Seen | None:
        bound.apply_defaults()
        given = bound.arguments
        if given["static_k"] is not None or given["static_v"] is not None:
            return None
        batched = given["query"].ndim == 3
        heads = given["num_heads"]
        tokens = [given[name] for name in ("query", "key", "value")]
        if not batched:
            tokens = [tensor[:, None] for tensor in tokens]
        if given["use_separate_proj_weight"]:
            weights = [given[f"{name}_proj_weight"] for name in "qkv"]
        else:
            weights = given["in_proj_weight"].chunk(3)
        bias = given["in_proj_bias"]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        parts = [F.linear(*all_of) for all_of in zip(tokens, weights, biases, strict=True)]
        mask = _joined_mask(given["attn_mask"], given["key_padding_mask"], heads, parts)
        more = 0
        for i, name in ((1, "bias_k"), (2, "bias_v")):
            if given[name] is not None:
                parts[i] = torch.cat([parts[i], given[name].expand(-1, parts[i].shape[1], -1)])
                more = 1
        if given["add_zero_attn"]:
            parts[1:] = [F.pad(part, (0, 0, 0, 0, 0, 1)) for part in parts[1:]]
            more += 1
        if mask is not None:
            mask = F.pad(mask, (0, more))
        # (tokens, images, heads * depth) to (images, heads, tokens, depth)
        query, key, value = (part.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in parts)
        call = self._call(
            path,
            (*query.shape[:3], key.shape[2]),
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=1 / math.sqrt(query.shape[-1]),
        )

        def result(reads: Tensor) -> tuple[Tensor, None]:
            mixed = _read(value, reads).permute(2, 0, 1, 3).flatten(-2)
            mixed = F.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
            return (mixed if batched else mixed[:, 0]), None

        return _Seen(call, result)


def _within(path: str, paths: tuple[str, ...]) -> bool:
    return any(at in ("", path) or path.startswith(f"{at}.") for at in paths)


def _mixes(module: nn.Module, path: str) -> bool:
    """Whether the module is the `attn_drop` of a gated positional self-attention."""
    owner, _, name = path.rpartition(".")
    if name != "attn_drop":
        return False
    return hasattr(module.get_submodule(owner), "gating_param")


def _read(value: Tensor, reads: Tensor) -> Tensor:
    """(..., queries, width) of values (..., keys, width), one key a query, 0 where that is -1."""
    value = value.expand(*reads.shape[:-1], *value.shape[-2:])
    taken = torch.take_along_dim(value, reads.clamp_min(0)[..., None], dim=-2)
    return taken * (reads >= 0)[..., None]


def _joined_mask(
    mask: Tensor | None, padding: Tensor | None, heads: int, parts: list[Tensor]
) -> Tensor | None:
    """(images, heads, queries, keys), to be added to the logits, of multi-head attention's masks.

    True in them means masked, contrary to scaled dot-product attention.
    """
    joined: Tensor | None = None
    for one in (mask, None if padding is None else padding[..., None, None, :]):
        if one is None:
            continue
        if one.dtype == torch.bool:
            one = torch.zeros_like(one, dtype=parts[0].dtype).masked_fill(one, -torch.inf)
        if one is not None and one.ndim == 3:
            one = one.unflatten(0, (-1, heads))
        joined = one if joined is None else joined + one
    return joined
