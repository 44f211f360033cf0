"""Where the tokens of a model lie in the image, by experiment.

A batch holds one image of noise, and the same image with a little other noise added to it: as it
is, growing from top to bottom, and growing from left to right. How much each changes a token tells
where in the image it looks, as moments tell a centre of mass. No family of models needs to be known
for that; whatever order, windows, shifts or pooling a model has shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitprobe.measures.chunks import grid_positions

_LITTLE: Final = 0.02
"""Noise so small that a model answers it linearly, and so large that rounding does not count."""
_SILENT: Final = 1e-7
"""Of what changes most, the part (of energies) below which nothing changed but by rounding."""
_EVERYWHERE: Final = 0.55
"""Standard deviation from which on a token looks everywhere; the whole image alike has 0.58."""
_MOST_CELLS: Final = 1 << 16
_MOST_DOUBTFUL: Final = 512
"""Tokens past a neighbour that are worth assigning; the time for it grows with their cube."""


@dataclass(frozen=True)
class Ramps:
    """The images of one experiment; `draws` of noise are added, each in three ways."""

    draws: int = 4

    @property
    def count(self) -> int:
        """How many images there are."""
        return 1 + 3 * self.draws

    def images(self, input_size: tuple[int, int, int], seed: int = 0) -> Tensor:
        """(1 + 3 draws, channels, height, width), of standard normal noise."""
        generator = torch.Generator().manual_seed(seed)
        plain, *others = torch.randn(1 + self.draws, *input_size, generator=generator)
        _, height, width = input_size
        y, x = _ramp(height)[:, None], _ramp(width)[None]
        added = [_LITTLE * noise * ramp for noise in others for ramp in (torch.ones(1, 1), y, x)]
        return torch.stack([plain, *(plain + noise for noise in added)])


@dataclass(frozen=True, eq=False)
class Lattice:
    """Tokens on a regular lattice over the whole image.

    grid: (rows, columns).
    cells: (...) row * columns + column of each token; -1 where it has no place.
    xy: (..., 2) float64, exact centres in pixels; nan where it has no place.
    doubtful: of how many tokens the place is the likeliest one and not certain.
    """

    grid: tuple[int, int]
    cells: Tensor
    xy: Tensor
    doubtful: int = 0


def places(values: Tensor, ramps: Ramps, input_size: tuple[int, int, int]) -> Tensor:
    """Approximate centres (x, y) of tokens, in pixels: (..., 2); nan for what has no place.

    values: (images of the experiment, ..., width), what these give the tokens. What they do not
    change (class and register tokens, padding), or what looks at all of the image, has no place.
    """
    return centres_of(moments_of(values, ramps), input_size)


def snap(centres: Tensor, input_size: tuple[int, int, int]) -> Lattice | None:
    """The finest regular lattice over the whole image whose cells approximate centres fill equally.

    centres: (..., 2). Their ranks tell the lattice: convolutions that overlap and borders that cut
    blur and shift them, but seldom past a neighbour. None where there is no such lattice.
    """
    found = ~centres.isnan().any(-1)
    points = centres[found].double()
    _, height, width = input_size
    for grid in _grids(len(points), height, width):
        filled = _fill(points, grid, (height, width))
        if filled is not None:
            cells, doubtful = filled
            break
    else:
        return None
    all_cells = torch.full(found.shape, -1, dtype=torch.long)
    all_cells[found] = cells
    xy = torch.full((*found.shape, 2), torch.nan, dtype=torch.float64)
    xy[found] = grid_positions(grid, (height / grid[0], width / grid[1]))[cells]
    return Lattice(grid, all_cells, xy, doubtful)


def _grids(tokens: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """(rows, columns) that so many tokens could fill equally, the finest first."""
    # One cell holds any tokens: only a single one lies there.
    for cells in range(min(tokens, _MOST_CELLS), 1 if tokens > 1 else 0, -1):
        if tokens % cells:
            continue
        for rows in range(1, min(cells, height) + 1):
            if cells % rows == 0 and 0.5 <= (height / rows) / (width * rows / cells) <= 2:
                yield rows, cells // rows


def _fill(
    points: Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, int] | None:
    """The cell of each point, where a grid is what they fill, and how many are doubtful."""
    ranked, middles, spacings = [], [], []
    for values, count, length in (
        (points[:, 1], grid[0], size[0]),
        (points[:, 0], grid[1], size[1]),
    ):
        found = _ranks(values, count, length)
        if found is None:
            return None
        ranked.append(found[0])
        middles.append(found[1])
        spacings.append(length / count)
    cells = ranked[0] * grid[1] + ranked[1]
    each = len(points) // math.prod(grid)
    filled = cells.bincount(minlength=math.prod(grid))
    wrong = filled != each
    if not wrong.any():
        return cells, 0
    # A few tokens past their neighbour: fill the cells they leave as nearly as can be.
    left = wrong[cells].nonzero().squeeze(1)
    if len(left) > max(4, min(len(points) // 10, _MOST_DOUBTFUL)):
        return None
    free = wrong.nonzero().squeeze(1).repeat_interleave(each)
    offsets = torch.stack(
        [
            (points[left, 1, None] - middles[0][free // grid[1]]) / spacings[0],
            (points[left, 0, None] - middles[1][free % grid[1]]) / spacings[1],
        ]
    )
    cost = offsets.square().sum(0)
    rows, columns = linear_sum_assignment(cost.numpy())
    if cost[rows, columns].max() > 1:
        return None
    cells[left[torch.from_numpy(rows)]] = free[torch.from_numpy(columns)]
    return cells, len(left)


def _ranks(values: Tensor, count: int, length: int) -> tuple[Tensor, Tensor] | None:
    """The group of each value among so many equal groups in order, and their means.

    None where these are no rows of a lattice: their means apart, their members together.
    """
    spacing = length / count
    order = values.argsort(stable=True)
    groups = values[order].reshape(count, -1)
    middles = groups.mean(1)
    apart = count == 1 or bool((middles.diff() > 0.1 * spacing).all())
    together = bool((groups.std(1, correction=0) < 0.35 * spacing).all())
    # Borders that cut receptive fields draw all towards the middle, and not to one side.
    centred = abs(float(middles.mean()) - length / 2) < 0.2 * length
    if not (apart and together and centred):
        return None
    # The nearest mean and not the group: a value past its neighbour would move another one.
    edges = (middles[1:] + middles[:-1]) / 2
    return torch.bucketize(values.contiguous(), edges), middles


def _ramp(length: int) -> Tensor:
    """The middles of so many pixels, from -1 to 1."""
    return (torch.arange(length) + 0.5) * 2 / length - 1


def moments_of(values: Tensor, ramps: Ramps) -> Tensor:
    """(5, ...): by how much noise changes each token, its products with the two ramps, and theirs
    with themselves: moments of where the token looks, which add up over what makes up the token.
    """
    change = values[1:].float() - values[:1].float()
    flat, down, across = change.unflatten(0, (ramps.draws, 3)).unbind(1)
    pairs = ((flat, flat), (flat, down), (flat, across), (down, down), (across, across))
    return torch.stack([(one * other).sum((0, -1)) for one, other in pairs])


def centres_of(moments: Tensor, input_size: tuple[int, int, int]) -> Tensor:
    """Approximate centres (x, y), in pixels: (..., 2), of `moments_of` tokens (5, ...)."""
    mass, *rest = moments.cpu().double()
    y, x, y_square, x_square = (moment / mass for moment in rest)
    spread = torch.maximum(y_square - y.square(), x_square - x.square())
    nowhere = (mass <= _SILENT * mass.max()) | (spread > _EVERYWHERE**2)
    _, height, width = input_size
    centres = torch.stack([(x + 1) / 2 * width, (y + 1) / 2 * height], dim=-1)
    return centres.masked_fill(nowhere[..., None], torch.nan)
