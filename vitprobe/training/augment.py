"""Augmentation of a whole batch at once, on the device where the images live.

The crop is one `grid_sample` for the batch: no decoding, no workers, no copy to the host. It does
not antialias, so it suits small images whose crops are enlarged, or reduced less than twofold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.randomness import Draws

_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class AugmentConfig:
    """Random resized crop and horizontal flip.

    crop_scale: smallest and largest share of the image's area.
    crop_ratio: smallest and largest width / height.
    flip: probability of a horizontal flip.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise RecipeError(
                f"augment.crop_scale must rise within (0, 1], not {list(self.crop_scale)}."
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise RecipeError(
                f"augment.crop_ratio must be positive and rise, not {list(self.crop_ratio)}."
            )
        if not 0 <= self.flip <= 1:
            raise RecipeError(f"augment.flip must be a probability, not {self.flip}.")


class Augment:
    """Turns stored images into what the encoder reads: (b, c, h, w) in [0, 1] → normalised."""

    def __init__(
        self, config: AugmentConfig, *, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.config = config
        self.size = size
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """One random view of each image: (b, c, h, w) → (b, c, size, size), normalised."""
        height, width = images.shape[-2:]
        boxes = crop_boxes(
            draws, height, width, scale=self.config.crop_scale, ratio=self.config.crop_ratio
        )
        flipped = draws.uniform("flip", 1)[:, 0] < self.config.flip
        return self.normalize(crop(images, boxes, self.size, flipped))

    def plain(self, images: Tensor) -> Tensor:
        """The whole image, resized (bicubic, antialiased) and normalised."""
        shape = (self.size, self.size)
        resized = F.interpolate(
            images, shape, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        return self.normalize(resized)

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std per channel."""
        return (images - self._mean.to(images.device)) / self._std.to(images.device)


def crop_boxes(
    draws: Draws, height: int, width: int, *, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Boxes of a random resized crop (Szegedy et al. 2015), in pixels: (b, 4) top, left, h, w.

    Area is uniform in `scale` of the image, width / height log-uniform in `ratio`, drawn up to ten
    times until the box fits, as in torchvision's RandomResizedCrop but without rounding to whole
    pixels. Where none of the ten fits, the first is cut down to the image at a random place
    (torchvision takes the largest centred box of an allowed ratio).
    """
    area_draw, ratio_draw = draws.uniform("crop size", 2 * _CROP_ATTEMPTS).chunk(2, dim=1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * ratio_draw)
    box_w, box_h = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    fits = (box_w <= width) & (box_h <= height)
    # argmax of an all-False row is 0: the first attempt, cut down to the image.
    first = fits.int().argmax(dim=1, keepdim=True)
    w = box_w.gather(1, first)[:, 0].clamp(max=width)
    h = box_h.gather(1, first)[:, 0].clamp(max=height)
    top, left = draws.uniform("crop position", 2).unbind(dim=1)
    return torch.stack([top * (height - h), left * (width - w), h, w], dim=1)


def crop(images: Tensor, boxes: Tensor, size: int, flipped: Tensor) -> Tensor:
    """Cut and resize boxes (b, 4) top, left, height, width in pixels; flip where `flipped` (b,).

    (b, c, h, w) → (b, c, size, size) by bicubic interpolation, clamped to [0, 1].
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.unbind(dim=1)
    mirror = torch.where(flipped, -1.0, 1.0)
    zero = torch.zeros_like(h)
    # Rows of the affine map from output to input, both in [-1, 1] from edge to edge.
    x_row = torch.stack([mirror * w / width, zero, (2 * left + w) / width - 1], dim=1)
    y_row = torch.stack([zero, h / height, (2 * top + h) / height - 1], dim=1)
    shape = [len(images), images.shape[1], size, size]
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), shape, align_corners=False)
    sampled = F.grid_sample(
        images, grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return sampled.clamp(0, 1)
