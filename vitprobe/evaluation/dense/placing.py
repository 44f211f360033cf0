"""How images of any size come to lie in a square: at random to train, whole to test.

Large-scale jitter (Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for
Instance Segmentation", CVPR 2021, section 3): the image is resized so that it would just fit the
square, times a factor drawn evenly from a range, then cut to the square at a random place where it
is larger, and filled up where it is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vitprobe.errors import RecipeError
from vitprobe.training.randomness import Draws


@dataclass(frozen=True)
class JitterConfig:
    """A recipe's table [jitter]: scale, from and to, and the chance of a horizontal flip."""

    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise RecipeError(
                f"jitter.scale must be two numbers above 0, the second no less, not "
                f"{list(self.scale)}."
            )
        if not 0 <= self.flip <= 1:
            raise RecipeError(f"jitter.flip must lie in [0, 1], not {self.flip}.")


class Placing(NamedTuple):
    """Where an image goes: resized to (height, width), less its first `top` rows and `left`
    columns, into the upper left of a square."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    flip: bool = False

    def pixels(self, image: Tensor, size: int, fill: Tensor) -> Tensor:
        """(c, h, w) uint8 → (c, size, size), with the colour `fill` (c,) where there is none."""
        resized = transforms.resize(self._turned(image), [self.height, self.width], antialias=True)
        placed = fill[:, None, None].expand(-1, size, size).clone()
        return _into(placed, resized, self.top, self.left)

    def masks(self, masks: Tensor, size: int, fill: int = 0) -> Tensor:
        """(n, h, w) uint8 → (n, size, size) by the nearest pixel."""
        if not len(masks):
            return masks.new_zeros((0, size, size))
        wanted = (self.height, self.width)
        resized = F.interpolate(self._turned(masks)[None], wanted, mode="nearest-exact")[0]
        placed = masks.new_full((len(masks), size, size), fill)
        return _into(placed, resized, self.top, self.left)

    def boxes(self, boxes: Tensor, original: tuple[int, int], size: int) -> Tensor:
        """(n, 4) corners in the original image of (height, width) → in the square, cut off at its
        edges."""
        height, width = original
        x1, y1, x2, y2 = boxes.unbind(1)
        if self.flip:
            x1, x2 = width - x2, width - x1
        columns, rows = self.width / width, self.height / height
        moved = torch.stack([x1 * columns, y1 * rows, x2 * columns, y2 * rows], dim=1)
        corner = torch.tensor([self.left, self.top] * 2, dtype=boxes.dtype)
        return (moved - corner).clamp(0, size)

    def back(self, boxes: Tensor, original: tuple[int, int]) -> Tensor:
        """Corners in the square → in the original image, for one that was placed whole."""
        height, width = original
        scale = boxes.new_tensor([width / self.width, height / self.height] * 2)
        return (boxes * scale).clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))

    def _turned(self, image: Tensor) -> Tensor:
        return image.flip(-1) if self.flip else image


def _into(placed: Tensor, resized: Tensor, top: int, left: int) -> Tensor:
    size = placed.shape[-1]
    part = resized[..., top : top + size, left : left + size]
    placed[..., : part.shape[-2], : part.shape[-1]] = part
    return placed


def whole(original: tuple[int, int], size: int, factor: float = 1.0) -> Placing:
    """The image (height, width) so that it just fits the square, times a factor."""
    scale = factor * size / max(original)
    height, width = (max(1, round(side * scale)) for side in original)
    return Placing(height, width)


def jittered(original: tuple[int, int], size: int, config: JitterConfig, draws: Draws) -> Placing:
    """Large-scale jitter, as the draws of one sample have it."""
    flip, factor, down, right = draws.uniform("jitter", 4)[0].tolist()
    low, high = config.scale
    placing = whole(original, size, low + (high - low) * factor)
    return placing._replace(
        top=int(down * (max(placing.height - size, 0) + 1)),
        left=int(right * (max(placing.width - size, 0) + 1)),
        flip=flip < config.flip,
    )


def around(masks: Tensor) -> Tensor:
    """The boxes of masks (n, h, w): (n, 4) float32 corners; all 0 where a mask is empty."""
    boxes = torch.zeros(len(masks), 4)
    for i, mask in enumerate(masks):
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        if len(rows):
            ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            boxes[i] = torch.stack(ends).float()
    return boxes
