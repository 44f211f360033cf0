"""The fused kernel against the eager path, on queries and keys as ViT-B/16 and DINOv2-S have them.

    python benchmarks/fused.py
    python benchmarks/fused.py --precision fp32 --batch 32

Attention distance, entropy and sink mass of all rows of one layer, on a CUDA device: from whole
maps, four images at a time, and by the kernel. Median of the turns in milliseconds, beside the time
of scaled dot-product attention, and the peak of memory above queries and keys. The kernel's values
are checked against whole maps in double precision.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from vitprobe.measures import fused
from vitprobe.measures.chunks import grid_positions

SHAPES = {"ViT-B/16@224": (12, 14, 16, 128), "DINOv2-S@518": (6, 37, 14, 32)}
"""Heads, patches a side, pixels of a patch, images."""
DEPTH = 64
PREFIX = 1


@dataclass
class Settings:
    precision: Literal["bf16", "fp32"] = "bf16"
    batch: int | None = None
    """Images; where not given 128 of ViT-B/16 and 32 of DINOv2-S."""
    turns: int = 20
    out: Path | None = None
    """Also write the table here."""


def from_maps(query: Tensor, key: Tensor, xy: Tensor) -> fused.Rows:
    """Every statistic from the whole map, in the precision of queries and keys."""
    logits = (query * DEPTH**-0.5) @ key.mT
    sink = torch.softmax(logits, dim=-1)[..., :PREFIX].sum(-1)
    rows = torch.softmax(logits[..., PREFIX:], dim=-1)
    patches = xy[PREFIX:].to(rows)
    distance = torch.linalg.vector_norm(xy.to(rows)[:, None] - patches, dim=-1)
    entropy = torch.special.entr(rows).sum(-1)
    return fused.Rows(entropy, torch.einsum("...qk,qk->...q", rows, distance), sink)


def milliseconds(run: Callable[[], object], turns: int) -> tuple[float, float]:
    """Median time of a turn, and MB of memory above what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return statistics.median(times), memory


def main(settings: Settings) -> None:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    lines = [
        f"{torch.cuda.get_device_name()}, {settings.precision}, torch {torch.__version__}.",
        "",
        "| layer of | images | way | ms | of attention | kernel is faster by | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (heads, side, patch, images) in SHAPES.items():
        batch = settings.batch or images
        torch.manual_seed(0)
        tokens = PREFIX + side * side
        projected = torch.randn(batch, tokens, 3, heads, DEPTH, device="cuda", dtype=dtype)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        centres = grid_positions((side, side), patch).to("cuda", torch.float32)
        xy = torch.cat([centres.new_zeros(PREFIX, 2), centres])

        def kernel(query: Tensor = query, key: Tensor = key, xy: Tensor = xy) -> fused.Rows:
            return fused.rows(
                query,
                key,
                scale=DEPTH**-0.5,
                key_prefix=PREFIX,
                query_xy=xy,
                key_xy=xy[PREFIX:],
            )

        def eager(query: Tensor = query, key: Tensor = key, xy: Tensor = xy) -> fused.Rows:
            # A few images at a time, as whole maps of a batch would not fit beside each other.
            parts = [
                from_maps(q.float(), k.float(), xy)
                for q, k in zip(query.split(4), key.split(4), strict=True)
            ]
            return fused.Rows(*(torch.cat(part) for part in zip(*parts, strict=True)))

        def attention(query: Tensor = query, key: Tensor = key, value: Tensor = value) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

        with torch.inference_mode():
            found = kernel()
            known = from_maps(query[:2].double(), key[:2].double(), xy)
            for ours, truth in zip(found, known, strict=True):
                torch.testing.assert_close(ours[:2].double(), truth, rtol=1e-5, atol=1e-3)
            ways = {"attention itself": attention, "whole maps": eager, "fused kernel": kernel}
            costs = {way: milliseconds(run, settings.turns) for way, run in ways.items()}
        for way, (time, memory) in costs.items():
            lines.append(
                f"| {name} | {batch} | {way} | {time:.2f} | "
                f"{time / costs['attention itself'][0]:.1f} | "
                f"{time / costs['fused kernel'][0]:.1f} | {memory:.0f} |"
            )
    text = "\n".join(lines)
    print(text)
    if settings.out:
        settings.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
