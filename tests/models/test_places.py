"""Places found by experiment against those that arithmetic gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitprobe.measures.chunks import grid_positions
from vitprobe.models.places import Ramps, places, snap

SIZE = (3, 64, 64)


def test_noise_is_added_as_it_is_and_growing_down_and_across():
    size = (2, 6, 10)
    images = Ramps(3).images(size).double()
    assert images.shape == (Ramps(3).count, *size) == (10, *size)
    added = (images[1:] - images[0]).unflatten(0, (3, 3))
    down = torch.tensor([-5, -3, -1, 1, 3, 5]).double()[:, None] / 6
    across = torch.linspace(-0.9, 0.9, 10).double()
    for flat, growing_down, growing_across in added:
        assert 0.01 < flat.std() < 0.03
        torch.testing.assert_close(growing_down, flat * down, atol=1e-6, rtol=0)
        torch.testing.assert_close(growing_across, flat * across, atol=1e-6, rtol=0)
    assert not torch.allclose(added[0], added[1])


def test_noise_is_the_same_at_every_call_and_another_under_another_seed():
    assert torch.equal(Ramps().images(SIZE), Ramps().images(SIZE))
    assert not torch.equal(Ramps().images(SIZE), Ramps().images(SIZE, seed=1))


@pytest.mark.parametrize("size", [(3, 32, 40), (3, 24, 40), (1, 28, 45)])
def test_patches_have_the_places_of_their_pixels(size):
    _, height, width = size
    patch = height // 4, width // 5
    ramps = Ramps()
    images = ramps.images(size)
    values = F.unfold(images, patch, stride=patch).mT
    prefix = torch.ones(len(values), 1, values.shape[-1])
    generator = torch.Generator().manual_seed(0)
    blur = torch.randn(images[0].numel(), values.shape[-1], generator=generator)
    spread = (images.flatten(1) @ blur)[:, None]
    tokens = torch.cat([prefix, values, spread], 1)
    found = places(tokens, ramps, size)
    assert found[[0, -1]].isnan().all()
    truth = grid_positions((4, width // patch[1]), patch)
    assert (found[1:-1] - truth).abs().max() < 2
    snapped = snap(found, size)
    assert snapped is not None
    assert snapped.grid == (4, width // patch[1])
    torch.testing.assert_close(snapped.xy[1:-1], truth)
    assert snapped.cells.tolist() == [-1, *range(len(truth)), -1]


@pytest.mark.parametrize("blur", [0.0, 0.2, 0.3])
@pytest.mark.parametrize("grid", [(2, 2), (7, 7), (4, 8), (16, 16)])
def test_blurred_and_shuffled_centres_find_their_cells(grid, blur):
    size = (3, 8 * grid[0], 8 * grid[1])
    truth = grid_positions(grid, 8.0)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(truth), generator=generator)
    # Borders cut receptive fields and draw centres inwards.
    middle = torch.tensor([size[2], size[1]]) / 2
    seen = middle + (truth[order] - middle) * 0.9
    seen += blur * 8 * (torch.rand(len(truth), 2, generator=generator) - 0.5)
    found = snap(seen.float(), size)
    assert found is not None
    assert found.grid == grid
    torch.testing.assert_close(found.xy, truth[order])


def test_a_lattice_may_be_filled_several_times_over():
    truth = grid_positions((4, 4), 16.0)
    found = snap(truth.repeat(3, 1, 1), SIZE)
    assert found is not None
    assert found.grid == (4, 4)
    assert found.cells.tolist() == [list(range(16))] * 3


def test_what_lies_on_no_lattice_is_not_forced_on_one():
    generator = torch.Generator().manual_seed(1)
    scattered = snap(64 * torch.rand(49, 2, generator=generator), SIZE)
    assert scattered is None
    half = grid_positions((8, 8), 8.0)[:32]
    assert snap(half, SIZE) is None
    assert snap(torch.full((5, 2), torch.nan), SIZE) is None
