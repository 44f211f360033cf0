"""Where queries and keys lie in the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitprobe.measures.attention import grid_positions
from vitprobe.models import Anatomy


@dataclass(frozen=True)
class Geometry:
    """Centres of patch tokens in pixels of the model's input, and how many tokens precede them."""

    query_xy: Tensor
    """(patch queries, 2)"""
    key_xy: Tensor
    """(patch keys, 2)"""
    query_prefix: int
    key_prefix: int


def plain(anatomy: Anatomy) -> Geometry:
    """All tokens attend to all tokens: prefix tokens, then one row-major grid of patches."""
    centres = grid_positions(anatomy.grid, anatomy.patch_size)
    return Geometry(centres, centres, anatomy.prefix_tokens, anatomy.prefix_tokens)
