"""Attention maps, the chunks in which capture would hand them on, and expected values."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from vitprobe.measures.attention import ATTENTION_MEASURES, AttentionChunk, grid_positions

STREAMING = {cls.info.name: cls for cls in ATTENTION_MEASURES}


def maps(images=3, heads=2, prefix=1, grid=(3, 4), seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + grid[0] * grid[1]
    shape = (images, heads, tokens, tokens)
    logits = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


def chunks(attention, prefix, grid, patch=16, *, images=(), rows=(), layer=0):
    """The attention cut at the given images and rows, as capture would hand it on."""
    centres = grid_positions(grid, patch)
    edges = [0, *[i for i in images if 0 < i < attention.shape[0]], attention.shape[0]]
    cuts = [0, *[r for r in rows if 0 < r < attention.shape[2]], attention.shape[2]]
    for first, last in pairwise(edges):
        for top, bottom in pairwise(cuts):
            yield AttentionChunk(
                logits=attention[first:last, :, top:bottom].log(),
                query_prefix=min(max(0, prefix - top), bottom - top),
                key_prefix=prefix,
                query_xy=centres[max(0, top - prefix) : max(0, bottom - prefix)],
                key_xy=centres,
                layer=layer,
                first_image=first,
                first_query=top,
                queries=attention.shape[2],
            )


def stream(name, parts):
    measure = STREAMING[name]()
    for part in parts:
        measure.update(part)
    return measure.compute()[0]


@cache
def golden_attention():
    """Expected values of attention and token measures, with their inputs under `arrays`."""
    folder = Path(__file__).resolve().parent / "golden"
    with np.load(folder / "attention.npz") as arrays:
        return {**json.loads((folder / "attention.json").read_text()), "arrays": dict(arrays)}
