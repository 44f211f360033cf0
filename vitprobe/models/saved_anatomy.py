"""An anatomy as JSON and tensors, and back: what of a model outlives it in a probe file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final, get_type_hints

import torch
from torch import Tensor

from vitprobe.errors import ResultError
from vitprobe.models.anatomy import Anatomy, Layout, Site

_MOST: Final = 1 << 24
"""Largest size that is believed of a file: beyond it, what is derived from it fills the memory."""
_MOST_MAP: Final = 1 << 28
"""Most entries of an attention map that are believed, since uniform attention is one."""
_TENSORS: Final = {
    "query_order": torch.int64,
    "key_order": torch.int64,
    "query_xy": torch.float64,
    "key_xy": torch.float64,
    "allowed": torch.bool,
}


def save_anatomy(anatomy: Anatomy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON-able values, and tensors by name."""
    tensors = {
        f"{layer}.{name}": tensor.cpu().clone()  # sites share theirs
        for layer, site in enumerate(anatomy.sites)
        for name in _TENSORS
        if (tensor := getattr(site, name)) is not None
    }
    own = {
        part.name: getattr(anatomy, part.name)
        for part in fields(Anatomy)
        if part.name not in ("residual", "normed", "sites")
    }
    plain = [part.name for part in fields(Site) if part.name not in _TENSORS]
    return {
        **own,
        "residual": [asdict(layout) for layout in anatomy.residual],
        "normed": [asdict(layout) for layout in anatomy.normed],
        "sites": [{name: getattr(site, name) for name in plain} for site in anatomy.sites],
    }, tensors


def read_anatomy(saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Anatomy:
    """The anatomy that `save_anatomy` was given.

    Raises:
        ResultError: what was saved is none; the message is the end of a sentence.
        KeyError, TypeError, ValueError: likewise, without words for it.
    """
    layouts: dict[str, Any] = {
        name: tuple(_layout(each) for each in saved[name]) for name in ("residual", "normed")
    }
    sites = tuple(_site(each, layer, tensors) for layer, each in enumerate(saved["sites"]))
    own = {name: _tuples(value) for name, value in saved.items() if name not in (*layouts, "sites")}
    anatomy = Anatomy(**own, **layouts, sites=sites)
    _check_kinds(Anatomy, own)
    depth = len(anatomy.blocks)
    if not depth or len(anatomy.norms) != depth:
        raise ResultError("its model has no blocks")
    if any(len(found) not in (depth + 1, 0) for found in layouts.values()) or not anatomy.residual:
        raise ResultError(f"its model of {depth} blocks has not as many layers")
    return anatomy


def _layout(saved: Mapping[str, Any]) -> Layout:
    layout = Layout(**{name: _tuples(value) for name, value in saved.items()})
    numbers = (layout.width, layout.prefix_tokens, layout.patches, layout.folded)
    if not all(_is_size(number) for number in numbers) or layout.width == 0:
        raise ResultError("the tokens of its model have no size")
    grid = layout.grid
    if grid is not None and (
        not all(_is_size(side) for side in grid) or grid[0] * grid[1] != layout.patches
    ):
        raise ResultError(f"{layout.patches} patches of its model are no grid of {grid}")
    return layout


def _site(saved: Mapping[str, Any], layer: int, tensors: Mapping[str, Tensor]) -> Site:
    own = {name: _tuples(value) for name, value in saved.items()}
    _check_kinds(Site, own)
    found: dict[str, Any] = {name: tensors.get(f"{layer}.{name}") for name in _TENSORS}
    site = Site(**own, **found)
    sizes = (site.heads, site.queries, site.keys, site.windows, site.query_prefix, site.key_prefix)
    where = f"attention layer {layer} of its model"
    if not all(_is_size(size) for size in sizes) or 0 in sizes[:4]:
        raise ResultError(f"{where} has no size")
    if site.queries * site.keys > _MOST_MAP:
        raise ResultError(f"{where} has a map of {site.queries} x {site.keys}, more than there are")
    queries, keys = site.queries - site.query_prefix, site.keys - site.key_prefix
    shapes = {
        "query_order": (site.queries,),
        "key_order": (site.keys,),
        "query_xy": (site.windows, queries, 2),
        "key_xy": (site.windows, keys, 2),
        "allowed": (site.windows, queries, keys),
    }
    for name, tensor in found.items():
        if tensor is None:
            continue
        if tensor.dtype != _TENSORS[name] or tensor.shape != shapes[name]:
            raise ResultError(f"{where} has '{name}' of another shape or kind than its tokens")
        if not torch.isfinite(tensor).all():
            raise ResultError(f"{where} has '{name}' that is not finite")
        if name.endswith("order") and tensor.sort().values.tolist() != list(range(len(tensor))):
            raise ResultError(f"{where} has '{name}' that orders no tokens")
    return site


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _check_kinds(of: type, values: Mapping[str, Any]) -> None:
    """Raise ResultError where a text, number or truth value of a dataclass is something else."""
    hints = get_type_hints(of)
    for name, value in values.items():
        if hints[name] in (str, int, bool) and type(value) is not hints[name]:
            raise ResultError(f"'{name}' of its model is no {hints[name].__name__}")


def _tuples(value: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
