"""How the tokens of a layer lie, from the shape of its tensor and from the locating experiment."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor

from vitprobe.measures.chunks import grid_positions
from vitprobe.models.anatomy import Layout, Site
from vitprobe.models.places import Ramps, places, snap

_AGREEMENT: Final = 0.9
"""Least correlation of centres with those of tokens that lie row by row, in either direction.

Tokens in the order of blocks of whatever size disagree more, along one of the two."""
Form = Literal["tokens", "sequence", "grid", "maps"]


def shape_layouts(shape: tuple[int, ...], input_size: tuple[int, int, int]) -> list[Layout]:
    """The layouts that a tensor of this shape, for one image, may have, the likeliest first.

    Four axes, two of which are in the proportion of the image, are rows and columns; then there is
    one layout, with its grid.
    """
    if len(shape) == 3:
        return [_layout("tokens", shape), _layout("maps", shape)]
    if len(shape) > 4:
        return [_layout("grid", shape)]
    maps = _on_grid(_layout("maps", shape), shape[2:], input_size)
    grid = _on_grid(_layout("grid", shape), shape[1:3], input_size)
    certain = [layout for layout in (maps, grid) if layout.grid is not None]
    return certain if len(certain) == 1 else [maps, grid]


def located_layout(
    values: Tensor, shape: tuple[int, ...], ramps: Ramps, input_size: tuple[int, int, int]
) -> Layout:
    """The layout of a tensor, from what the images of the experiment give it.

    shape: what one image gives.
    """
    options = shape_layouts(shape, input_size)
    if shape[1] == 1 and values.shape == (shape[0], ramps.count, *shape[2:]):
        options = [Layout("sequence", shape[2], 0, shape[0], None, None)]
    found = (_placed(option, values, ramps, input_size) for option in options)
    return next((layout for layout in found if layout is not None), options[0])


def layout_of_site(site: Site, layout: Layout, input_size: tuple[int, int, int]) -> Layout | None:
    """The layout of tokens that attention reads as they are; None where these are not its queries.

    layout: of the tokens, without a grid.
    """
    sizes = site.windows, site.query_prefix, site.queries - site.query_prefix
    inside = layout.folded, layout.prefix_tokens, layout.patches // layout.folded
    if site.query_xy is None or site.query_order is not None or sizes != inside:
        return None
    if site.windows > 1 and site.query_prefix:
        return None
    x, y = site.query_xy.reshape(-1, 2).unbind(-1)
    columns, rows = x.unique(), y.unique()
    cells = torch.searchsorted(rows, y) * len(columns) + torch.searchsorted(columns, x)
    if len(cells.unique()) != len(cells) or len(cells) != len(rows) * len(columns):
        return None
    prefix = range(layout.prefix_tokens)
    order = (*prefix, *(layout.prefix_tokens + i for i in cells.argsort().tolist()))
    return replace(
        layout,
        grid=(len(rows), len(columns)),
        patch_size=(input_size[1] / len(rows), input_size[2] / len(columns)),
        order=None if order == tuple(range(len(order))) else order,
    )


def _layout(form: Form, shape: tuple[int, ...]) -> Layout:
    width = shape[1] if form == "maps" else shape[-1]
    return Layout(form, width, 0, math.prod(shape) // width, None, None, folded=shape[0])


def _on_grid(layout: Layout, sides: tuple[int, ...], input_size: tuple[int, int, int]) -> Layout:
    """The layout with these rows and columns, where they have the proportion of the image."""
    rows, columns = sides
    _, height, width = input_size
    if layout.folded > 1 or abs(rows - columns * height / width) >= 1 or rows > height:
        return layout
    return replace(layout, grid=(rows, columns), patch_size=(height / rows, width / columns))


def _placed(
    layout: Layout, values: Tensor, ramps: Ramps, input_size: tuple[int, int, int]
) -> Layout | None:
    """The layout with its prefix tokens, grid and order; None where its tokens have no places."""
    tokens = layout.read(values)
    if tokens is None or len(tokens) != ramps.count:
        return None
    centres = places(tokens, ramps, input_size)
    placed = ~centres.isnan().any(-1)
    if layout.form == "maps" and not bool(placed.all()):
        return None
    natural = _row_by_row(centres[placed], input_size)
    lattice = None if natural else snap(centres, input_size)
    if natural:
        grid = natural
        order = torch.cat([(~placed).nonzero()[:, 0], placed.nonzero()[:, 0]])
    else:
        if lattice is None or math.prod(lattice.grid) != int(placed.sum()):
            return None
        # What looks like rows and columns may be blocks of tokens, but only a clear answer says so.
        if layout.grid is not None and (lattice.doubtful or lattice.grid != layout.grid):
            return None
        grid = lattice.grid
        order = lattice.cells.argsort(stable=True)
    indices = tuple(order.tolist())
    return replace(
        layout,
        prefix_tokens=int((~placed).sum()),
        patches=math.prod(grid),
        grid=grid,
        patch_size=(input_size[1] / grid[0], input_size[2] / grid[1]),
        order=None if indices == tuple(range(len(indices))) else indices,
    )


def _row_by_row(centres: Tensor, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The grid in proportion to the image that tokens fill row by row; None where they do not.

    Approximate as centres are, they would fit another order as well; this one is common.
    """
    _, height, width = input_size
    rows = round(math.sqrt(len(centres) * height / width))
    columns = len(centres) // max(1, rows)
    if rows * columns != len(centres) or min(rows, columns) < 2:
        return None
    lattice = grid_positions((rows, columns), (height / rows, width / columns))
    both = torch.stack([centres.double(), lattice]).permute(2, 0, 1)
    agreement = min(float(torch.corrcoef(axis)[0, 1]) for axis in both)
    return (rows, columns) if agreement > _AGREEMENT else None
