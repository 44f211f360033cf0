"""Crops against exact slices and torchvision's, flips, normalisation."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from vitprobe.errors import RecipeError
from vitprobe.training.augment import Augment, AugmentConfig, crop, crop_boxes
from vitprobe.training.randomness import Draws


def _images(n: int = 3, channels: int = 2, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_a_box_of_whole_pixels_at_its_own_size_is_a_slice() -> None:
    images = _images()
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 3, 4, 4], [4, 4, 4, 4]])
    cut = crop(images, boxes, 4, torch.tensor([False, False, True]))
    torch.testing.assert_close(cut[0], images[0, :, :4, :4])
    torch.testing.assert_close(cut[1], images[1, :, 2:6, 3:7])
    torch.testing.assert_close(cut[2], images[2, :, 4:, 4:].flip(-1))


def test_an_enlarged_crop_matches_torchvision_away_from_its_edge() -> None:
    images = _images(1, size=16)
    ours = crop(images, torch.tensor([[2.0, 5, 8, 8]]), 16, torch.tensor([False]))
    theirs = resized_crop(images, 2, 5, 8, 8, [16, 16], interpolation=3, antialias=True)
    # torchvision cuts before it interpolates, so near the edge it cannot see beyond the box.
    # Its bicubic kernel has a = -0.5 when antialiasing, grid_sample's a = -0.75.
    torch.testing.assert_close(
        ours[..., 4:-4, 4:-4], theirs[..., 4:-4, 4:-4].clamp(0, 1), atol=0.08, rtol=0
    )


def test_boxes_are_distributed_as_torchvisions() -> None:
    scale, ratio, n = (0.2, 1.0), (3 / 4, 4 / 3), 4000
    boxes = crop_boxes(Draws(0, 0, torch.arange(n)), 100, 100, scale=scale, ratio=ratio)
    torch.manual_seed(0)
    reference = RandomResizedCrop(1, scale=scale, ratio=ratio)
    image = torch.empty(1, 100, 100)
    theirs = torch.tensor(
        [
            [p["top"], p["left"], p["height"], p["width"]]
            for p in (reference.make_params([image]) for _ in range(n))
        ]
    ).float()
    # Four standard errors of the difference, and half a pixel for torchvision's rounding.
    error = 4 * (boxes.var(dim=0) / n + theirs.var(dim=0) / n).sqrt()
    assert ((boxes.mean(dim=0) - theirs.mean(dim=0)).abs() < error + 0.5).all()
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    difference = boxes.quantile(quantiles, dim=0) - theirs.quantile(quantiles, dim=0)
    assert difference.abs().max() < 3


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 64), (64, 8)])
def test_boxes_stay_inside_the_image(height: int, width: int) -> None:
    draws = Draws(0, 0, torch.arange(500))
    boxes = crop_boxes(draws, height, width, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
    top, left, h, w = boxes.unbind(dim=1)
    assert (boxes >= 0).all()
    assert (top + h <= height + 1e-4).all()
    assert (left + w <= width + 1e-4).all()


def test_views_are_keyed_by_sample_and_normalised() -> None:
    config = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.5)
    augment = Augment(config, size=12, mean=(0.5, 0.25), std=(0.5, 2.0))
    images = _images(6)
    whole = augment(images, Draws(0, 0, torch.arange(6)))
    part = augment(images[4:], Draws(0, 0, torch.tensor([4, 5])))
    torch.testing.assert_close(whole[4:], part)
    assert whole.shape == (6, 2, 12, 12)
    flat = augment.plain(torch.ones(1, 2, 8, 8))
    torch.testing.assert_close(flat[0, :, 0, 0], torch.tensor([1.0, 0.375]))


def test_flip_has_its_probability() -> None:
    ramp = torch.linspace(0, 1, 8).expand(4000, 1, 8, 8)
    config = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.25)
    views = Augment(config, size=8, mean=(0.0,), std=(1.0,))(ramp, Draws(0, 0, torch.arange(4000)))
    flipped = views[:, 0, 0, 0] > views[:, 0, 0, -1]
    assert flipped.float().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"flip": 2},
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"augment.{next(iter(options))}"):
        AugmentConfig(**options)
