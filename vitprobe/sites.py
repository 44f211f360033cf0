"""What can be asked of each attention layer of a model, why the rest cannot, and uniform attention.

An attention layer is a `Site` of the model's anatomy: one computation of attention in a forward
pass. In a plain Vision Transformer it is a block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vitprobe.measures.attention import AttentionChunk, AttentionMeasure
from vitprobe.measures.registry import ATTENTION
from vitprobe.models import Anatomy
from vitprobe.models.anatomy import Site
from vitprobe.wording import join, layers_in_words

Kind = Literal["global", "windows", "pooled keys", "class token", "channels", "unknown places"]

_REMARKS: dict[str, str] = {
    "channels": "rows are over channels, so their entropy is no entropy over patches",
    "class token": "the only query is the class token, so entropy is of its one row",
}
_NO_PLACES = "where its queries and keys lie in the image is not known"


def kind_of(site: Site) -> Kind:
    """What attends to what in an attention layer."""
    if site.over == "channels":
        return "channels"
    if site.whole:
        return "global"
    if _is_class_attention(site):
        return "class token"
    if not _placed(site):
        return "unknown places"
    return "windows" if site.windows > 1 else "pooled keys"


def _placed(site: Site) -> bool:
    return site.query_xy is not None and site.key_xy is not None


def _is_class_attention(site: Site) -> bool:
    alone = site.windows * site.queries == 1
    return alone and site.query_prefix == 0 < site.key_prefix and site.query_xy is None


def refusal(measure: type[AttentionMeasure], anatomy: Anatomy, layer: int) -> str:
    """Why an attention layer has no such measure, as the end of a sentence; "" where it has one."""
    site = anatomy.sites[layer]
    kind = kind_of(site)
    if measure.asks != "rows" and kind == "channels":
        return "it attends over channels, which lie nowhere in the image"
    if measure.asks in ("patches", "places") and kind == "class token":
        return "its only query is the class token"
    if measure.asks == "places" and (site.no_distance or not _placed(site)):
        return site.no_distance or _NO_PLACES
    if measure.needs == "map" and not site.whole:
        return f"it is not one map of all patches ({kind})"
    if measure.per_block and not anatomy.plain:
        return "not every layer of the model is one map of the same patches"
    return ""


@dataclass(frozen=True)
class Refusal:
    """What some attention layers of a model have no number of."""

    measures: tuple[str, ...]
    layers: tuple[int, ...]
    """All of them; empty where the model has no attention."""
    reason: str
    """The end of a sentence."""


def refusals(anatomy: Anatomy, measures: Sequence[str]) -> list[Refusal]:
    """All that a model refuses of these measures, in the order of its layers."""
    if not anatomy.sites:
        return [Refusal(tuple(measures), (), anatomy.no_attention)] if measures else []
    layers: dict[tuple[str, str], list[int]] = {}
    for name in measures:
        for layer in range(len(anatomy.sites)):
            if reason := refusal(ATTENTION[name], anatomy, layer):
                layers.setdefault((name, reason), []).append(layer)
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (name, reason), found in layers.items():
        together.setdefault((reason, tuple(found)), []).append(name)
    return [
        Refusal(tuple(names), found, reason)
        for (reason, found), names in sorted(together.items(), key=lambda item: item[0][1])
    ]


def open_layers(anatomy: Anatomy, measures: Sequence[str]) -> dict[str, frozenset[int]]:
    """Of each measure, the attention layers that have it."""
    return {
        name: frozenset(
            layer
            for layer in range(len(anatomy.sites))
            if not refusal(ATTENTION[name], anatomy, layer)
        )
        for name in measures
    }


def in_words(found: Sequence[Refusal]) -> str:
    """What a model refuses, as the rest of a sentence that begins with its name."""
    if found and not found[0].layers:
        return f"no attention: {found[0].reason}"
    parts = []
    for part in found:
        where = layers_in_words(part.layers, "attention layer")
        titles = join([ATTENTION[name].info.in_text for name in part.measures])
        parts.append(f"no {titles} in {where}: {part.reason}")
    return "; ".join(parts)


def remarks(anatomy: Anatomy) -> list[str]:
    """What a reader must know of attention layers, each a sentence that begins with "attention"."""
    layers: dict[str, list[int]] = {}
    for layer, site in enumerate(anatomy.sites):
        texts = [site.note.rstrip(".")] if site.note else []
        texts += [_REMARKS[kind] for kind in (kind_of(site),) if kind in _REMARKS]
        for text in texts:
            layers.setdefault(text, []).append(layer)
    return [
        f"{layers_in_words(found, 'attention layer')}: {text[0].lower()}{text[1:]}."
        for text, found in layers.items()
    ]


def described(anatomy: Anatomy) -> list[dict[str, Any]]:
    """What a result records of each attention layer, JSON-able."""
    return [
        {
            "path": site.path,
            "block": _block_of(anatomy, site.path),
            "kind": kind_of(site),
            "heads": site.heads,
            "windows": site.windows,
            "queries": site.queries,
            "keys": site.keys,
            "key_prefix": site.key_prefix,
            "over": site.over,
            "no_distance": site.no_distance,
            "note": site.note,
        }
        for site in anatomy.sites
    ]


def _block_of(anatomy: Anatomy, path: str) -> int | None:
    """The block that a module lies in."""
    inside = [i for i, block in enumerate(anatomy.blocks) if f"{path}.".startswith(f"{block}.")]
    return max(inside, key=lambda i: len(anatomy.blocks[i]), default=None)


def uniform_level(measure: type[AttentionMeasure], site: Site) -> float:
    """The value of a measure under uniform attention, mean over windows; nan where it has none."""
    levels = [(measure.uniform(chunk), count) for chunk, count in _uniform(site)]
    total = sum((level or 0) * count for level, count in levels)
    return total / site.windows if total > 0 else math.nan


def _uniform(site: Site) -> Iterator[tuple[AttentionChunk, int]]:
    """Uniform attention of each window, windows of equal geometry once and with their number."""
    counts: Counter[bytes] = Counter()
    windows: dict[bytes, int] = {}
    for window in range(site.windows):
        key = _geometry(site, window)
        counts[key] += 1
        windows.setdefault(key, window)
    for key, window in windows.items():
        yield _uniform_window(site, window), counts[key]


def _geometry(site: Site, window: int) -> bytes:
    """What the distances and masks of a window depend on."""
    parts = [] if site.allowed is None else [site.allowed[window]]
    if site.query_xy is not None and site.key_xy is not None:
        origin = site.query_xy[window].amin(0)
        parts += [xy[window] - origin for xy in (site.query_xy, site.key_xy)]
    return b"".join(part.contiguous().numpy().tobytes() for part in parts)


def _uniform_window(site: Site, window: int) -> AttentionChunk:
    allowed = torch.ones(site.queries, site.keys, dtype=torch.bool)
    if site.allowed is not None:
        allowed[site.query_prefix :, site.key_prefix :] = site.allowed[window]
    rows = allowed / allowed.sum(-1, keepdim=True, dtype=torch.float64)

    def places(xy: Tensor | None) -> Tensor | None:
        return None if xy is None else xy[window]

    return AttentionChunk(
        logits=rows.log()[None, None],
        query_prefix=site.query_prefix,
        key_prefix=site.key_prefix,
        query_xy=places(site.query_xy),
        key_xy=places(site.key_xy),
        layer=0,
        queries=site.queries * site.windows,
        whole=site.whole,
    )


class UniformLevels:
    """`uniform_level`, computed once for attention layers of equal geometry."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], float] = {}

    def __call__(self, name: str, site: Site) -> float:
        """Of a measure by name."""
        key = (name, *_shape(site))
        if key not in self._known:
            self._known[key] = uniform_level(ATTENTION[name], site)
        return self._known[key]


def _shape(site: Site) -> tuple[Any, ...]:
    places: Mapping[str, Tensor | None] = {
        "query": site.query_xy,
        "key": site.key_xy,
        "allowed": site.allowed,
    }
    return (
        *(site.queries, site.keys, site.windows, site.query_prefix, site.key_prefix),
        *(None if tensor is None else tensor.numpy().tobytes() for tensor in places.values()),
    )
