"""Mixed images with mixed labels, as the supervised recipe of DeiT trains on.

Mixup (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018) blends two images;
CutMix (Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features", ICCV 2019) pastes a box of one into the other. Here neighbours in the batch are mixed
with each other, so that a batch split into even shares over processes makes the same pairs.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.randomness import Draws

_QUANTILES = 4096


def mix(
    images: Tensor, targets: Tensor, draws: Draws, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix samples 2i and 2i + 1 of a batch with each other; the last of an odd batch stays.

    images: (b, c, h, w); targets: (b, classes), one-hot or soft. mixup, cutmix: alpha of the
    Beta(alpha, alpha) that a pair's share is drawn from, 0 for never; where both are positive,
    either is taken with probability one half. The targets' share under CutMix is that of the pixels
    kept. A pair is keyed by its first member. Raises RecipeError for a negative alpha.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= alpha < float("inf"):
            raise RecipeError(f"{name} must be 0 or a positive alpha, not {alpha}.")
    pairs = len(images) // 2
    if not pairs or not (mixup or cutmix):
        return images, targets
    own = replace(draws, index=draws.index[: 2 * pairs : 2])
    choice, share, top, left = own.uniform("mix", 4).unbind(dim=1)
    kept = []
    if mixup:
        kept.append(beta(share, mixup)[:, None, None].expand(-1, *images.shape[-2:]))
    if cutmix:
        kept.append(_outside(beta(share, cutmix), top, left, *images.shape[-2:]))
    keep = torch.where((choice < 0.5)[:, None, None], kept[0], kept[-1])
    mixed = _swap(images, keep[:, None, None])
    return mixed, _swap(targets, keep.mean(dim=(1, 2))[:, None, None])


def beta(uniform: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) samples from uniform numbers in [0, 1), of any shape.

    The inverse of the distribution function, exact at 4,097 of its values and linear between, so
    the samples' distribution function is nowhere off by more than 1/4096.
    """
    table = _quantiles(alpha, uniform.device)
    place = uniform * _QUANTILES
    cell = place.long()
    return torch.lerp(table[cell], table[cell + 1], place - cell)


@functools.lru_cache(maxsize=8)
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    values = betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1))
    return torch.from_numpy(values).to(device, torch.float32)


def _outside(share: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """(n, height, width): 0 in a box of 1 - share of the area, 1 outside.

    The box's centre is uniform over the image, whose edges cut it off.
    """
    half = (1 - share).sqrt()[:, None] / 2

    def within(centre: Tensor, n: int) -> Tensor:
        pixel = (torch.arange(n, device=share.device) + 0.5) / n
        return (pixel - centre[:, None]).abs() < half

    box = within(top, height)[:, :, None] & within(left, width)[:, None, :]
    return 1 - box.float()


def _swap(batch: Tensor, keep: Tensor) -> Tensor:
    """keep x (n, 1, ...) of each, and 1 - keep of its neighbour; the last of an odd batch stays."""
    even = 2 * len(keep)
    pairs = batch[:even].unflatten(0, (-1, 2))
    mixed = torch.lerp(pairs.flip(1), pairs, keep.to(batch.dtype))
    return torch.cat([mixed.flatten(0, 1), batch[even:]])
