"""Attention statistics as they stream, against storing maps, in one process.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --batch 128 --precision bf16

Attention distance, entropy and sink mass of all blocks and heads of ViT-B/16 at 224 pixels and
ViT-S/14 at 518, of one batch of noise: the plain forward pass; ours, streamed from the fused
kernels' own queries and keys; the same maps kept until the pass has ended; and the usual hook on
`attn_drop` with fused attention off, whose maps are kept as well. All three ways give the same
numbers, which is checked. Least CPU time and wall time of the turns, and the peak of memory above
what the process held before; on a CPU, of a process of its own for each way, since one takes up
what another has freed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from analysis import Cost, measured
from torch import Tensor

import vitprobe as vp
from vitprobe.capture import Recorder
from vitprobe.capture.attention import OnAttention
from vitprobe.measures import attention_distance, attention_entropy, sink_mass
from vitprobe.measures.chunks import AttentionChunk, add
from vitprobe.measures.registry import ATTENTION

MODELS = {"vit_base_patch16_224": 224, "vit_small_patch14_dinov2": 518}
NAMES = ("attention_distance", "attention_entropy", "sink_mass")


@dataclass
class Settings:
    batch: int = 4
    turns: int = 3
    model: Literal["vit_base_patch16_224", "vit_small_patch14_dinov2"] | None = None
    """The only one to look at; both where not given."""
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    out: Path | None = None
    """Also write the table here."""


class Ways:
    """One model on one batch, its statistics come by in different ways."""

    def __init__(self, name: str, size: int, settings: Settings) -> None:
        torch.manual_seed(0)
        module = timm.create_model(name, num_classes=0).to(settings.device)
        self.model = vp.wrap(module.requires_grad_(False), name=name, mean=0.5, std=0.5)
        images = torch.rand(
            settings.batch, 3, size, size, generator=torch.Generator().manual_seed(0)
        )
        self.images = images.to(settings.device)
        self.settings = settings
        self.prefix = self.model.anatomy.prefix_tokens

    def mixed(self) -> Any:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.settings.device).type, dtype=torch.bfloat16)

    def bare(self) -> None:
        with torch.inference_mode(), self.mixed():
            self.model.module(self.model.normalize(self.images))

    def streamed(self) -> list[Tensor]:
        measures = [ATTENTION[name]() for name in NAMES]
        self._run(lambda chunk: add(measures, chunk))
        return [
            torch.stack([torch.from_numpy(part.mean) for part in measure.compute().values()])
            for measure in measures
        ]

    def stored(self) -> list[Tensor]:
        maps: dict[int, Tensor] = {}

        def keep(chunk: AttentionChunk) -> None:
            maps[chunk.layer] = chunk.log_p.exp()

        self._run(keep)
        return self._statistics(list(maps.values()))

    def hooked(self) -> list[Tensor]:
        maps: list[Tensor] = []
        attentions: list[Any] = [block.attn for block in self.model.module.blocks]  # type: ignore[union-attr]
        handles = [
            attention.attn_drop.register_forward_hook(lambda m, i, output: maps.append(output))
            for attention in attentions
        ]
        fused = [attention.fused_attn for attention in attentions]
        for attention in attentions:
            attention.fused_attn = False
        with torch.inference_mode(), self.mixed():
            self.model.module(self.model.normalize(self.images))
        for attention, before, handle in zip(attentions, fused, handles, strict=True):
            attention.fused_attn = before
            handle.remove()
        return self._statistics([map_.float() for map_ in maps])

    def _run(self, on_attention: OnAttention) -> None:
        recorder = Recorder(self.model, on_attention=on_attention)
        with torch.inference_mode(), self.mixed(), recorder:
            recorder.run(self.images)

    def _statistics(self, maps: list[Tensor]) -> list[Tensor]:
        grid, patch = self.model.anatomy.grid, self.model.anatomy.patch_size
        options: dict[str, Any] = {"prefix_tokens": self.prefix}
        with torch.inference_mode():
            return [
                torch.stack(
                    [attention_distance(m, grid=grid, patch_size=patch, **options) for m in maps]
                ).cpu(),
                torch.stack([attention_entropy(m, **options) for m in maps]).cpu(),
                torch.stack([sink_mass(m, **options) for m in maps]).cpu(),
            ]


WAYS: dict[str, Callable[[Ways], Any]] = {
    "bare forward pass": Ways.bare,
    "ours, streamed": Ways.streamed,
    "maps stored": Ways.stored,
    "hook on attn_drop, maps stored": Ways.hooked,
}


def alone(name: str, size: int, settings: Settings, way: str) -> float:
    """Peak MB above the start, of the process it is called in."""
    ways = Ways(name, size, settings)
    with measured(settings.device) as found:
        WAYS[way](ways)
    return found[0].memory


def main(settings: Settings) -> None:
    lines = [
        f"Batch {settings.batch}, {settings.device}, {settings.precision}, "
        f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, torch {torch.__version__}.",
        "",
        "| model | way | CPU s | of bare | wall s | of bare | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in MODELS.items():
        if settings.model not in (None, name):
            continue
        ways = Ways(name, size, settings)
        costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
        values = {}
        for _ in range(settings.turns):
            for way, run in WAYS.items():
                with measured(settings.device) as found:
                    values[way] = run(ways)
                costs[way] += found
        bare = costs["bare forward pass"]
        cpu, wall = min(cost.cpu for cost in bare), min(cost.wall for cost in bare)
        for way, runs in costs.items():
            least = min(run.cpu for run in runs), min(run.wall for run in runs)
            peak = min(run.memory for run in runs)
            if settings.device == "cpu":
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
                    peak = other.submit(alone, name, size, settings, way).result()
            lines.append(
                f"| {name} | {way} | {least[0]:.2f} | {least[0] / cpu:.2f} | {least[1]:.2f} "
                f"| {least[1] / wall:.2f} | {peak:.0f} |"
            )
        for way in ("maps stored", "hook on attn_drop, maps stored"):
            for ours, theirs in zip(values["ours, streamed"], values[way], strict=True):
                close = 1e-4 if settings.precision == "fp32" else 5e-2
                torch.testing.assert_close(ours, theirs.to(ours), rtol=close, atol=close)
    text = "\n".join(lines)
    print(text)
    if settings.out:
        settings.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
