"""Schedules over a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """The rate of the update `step` (0-based) of `steps`.

    Linear from 0 to `peak` over the first `warmup` updates, then half a cosine down to `floor`,
    which the update after the last one would have (Loshchilov & Hutter, "SGDR", 2017, eq. 5; with
    the warm-up of Goyal et al. 2017, section 2.2, counted in updates as MAE does).
    """
    if step < warmup:
        return peak * step / warmup
    return cosine((step - warmup) / max(steps - warmup, 1), peak, floor)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
