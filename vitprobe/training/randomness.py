"""Random numbers that depend on what they are for, not on when they are drawn.

Every number is a hash of (seed, epoch, stream, sample index, position). A run that is killed and
resumed, a batch that is split over several processes, and a CPU and a GPU therefore all see the
same crops and masks, and no generator state has to be saved.

The hash is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): its finaliser absorbs the parts of the key one after the other, and the result seeds
the ordinary SplitMix64 sequence. It was chosen because it is some ten integer operations on a whole
batch at once, in int64 arithmetic that every torch device has; torch's own Philox generators give
different numbers on different devices and cannot be keyed by sample without a loop.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def _mix(z: int) -> int:
    """`mix` of one word in 0 .. 2^64 - 1."""
    z = (z ^ (z >> 30)) * _MULTIPLIERS[0] & _WORD
    z = (z ^ (z >> 27)) * _MULTIPLIERS[1] & _WORD
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; int64 of any shape, wrapping."""
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def sequence(state: Tensor, n: int) -> Tensor:
    """The first n outputs of SplitMix64 from each of `state` (b,): (b, n) int64."""
    counter = torch.arange(1, n + 1, device=state.device) * _signed(_GAMMA)
    return mix(state[:, None] + counter)


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples `index` (b,) int64 in one epoch of one run.

    `stream` names the purpose ("crop", "mask", ...): different streams are independent, and asking
    twice for the same stream gives the same numbers.
    """

    seed: int
    epoch: int
    index: Tensor

    def bits(self, stream: str, n: int) -> Tensor:
        """(b, n) int64, every 64-bit word equally likely."""
        # The key stays a Python number: a tensor copied to the device would make the host wait.
        key = 0
        for part in (self.seed, self.epoch, zlib.crc32(stream.encode())):
            key = _mix((key + part + _GAMMA) & _WORD)
        return sequence(mix(self.index + _signed(key)), n)

    def uniform(self, stream: str, n: int) -> Tensor:
        """(b, n) float32 uniform on [0, 1), multiples of 2^-24."""
        return _shift_right(self.bits(stream, n), 40).float() * 2.0**-24

    def normal(self, stream: str, n: int) -> Tensor:
        """(b, n) float32 standard normal, two from each word (Box & Muller 1958)."""
        words = self.bits(stream, (n + 1) // 2)
        # In (0, 1]: the logarithm of 0 is never taken.
        high = (_shift_right(words, 32) + 1).float() * 2.0**-32
        angle = (words & 0xFFFFFFFF).float() * (math.tau * 2.0**-32)
        radius = (-2 * high.log()).sqrt()
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]

    def permutation(self, stream: str, n: int) -> Tensor:
        """(b, n) int64: a uniformly random permutation of 0 .. n - 1 for each sample."""
        # Sorting whole words rather than floats leaves no ties for a device to break its own way.
        return self.bits(stream, n).argsort(dim=1)


def epoch_order(seed: int, epoch: int, n: int, device: torch.device) -> Tensor:
    """(n,) int64: the order in which one epoch visits n samples."""
    samples = torch.arange(n, device=device)
    return Draws(seed, epoch, samples).bits("order", 1)[:, 0].argsort()
