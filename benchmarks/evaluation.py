"""What k-NN and linear classification of frozen features cost against bare forward passes.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --spec mae.pth,heads=12 --data fashion-mnist
    python benchmarks/evaluation.py --train 50000 --size 224 --patch 16 --device cuda

`vitprobe evaluate frozen` with its defaults (k-NN and a linear classifier, over DINOv2's four
feature choices and seven penalties) against a loop that runs the same model over the same images in
the same batches and keeps nothing. Data is made: classes of noise around a picture each, so that
classifiers have work to do. CPU seconds are those of this process in all its threads; on a GPU look
at the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from timm.models.vision_transformer import VisionTransformer

import vitprobe as vp
from vitprobe.data.blocks import View
from vitprobe.data.labelled import load_labelled
from vitprobe.data.parts import Arrays, Labelled
from vitprobe.devices import find_device
from vitprobe.evaluation.base import labelled_part, running
from vitprobe.evaluation.batches import pixel_batches
from vitprobe.evaluation.subsets import labelled_subset


@dataclass
class Settings:
    spec: str | None = None
    """A checkpoint; else a ViT with random weights of the sizes below."""
    data: str | None = None
    """Labelled images; else made ones, of the numbers below."""
    labels: float = 1.0
    train: int = 10_000
    test: int = 10_000
    classes: int = 10
    size: int = 28
    channels: int = 1
    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3
    batch_size: int = 256
    device: str = "auto"
    precision: str = "fp32"
    turns: int = 1
    out: Path | None = None
    """Also write the table here."""


def main() -> None:
    settings = tyro.cli(Settings)
    model, data = _model(settings), _data(settings)
    device = find_device(settings.device)
    ways: dict[str, Callable[[], Any]] = {
        "bare forward passes": lambda: _bare(model, data, settings, device),
        "k-NN": lambda: _evaluate("knn", model, data, settings),
        "k-NN and linear": lambda: _evaluate("frozen", model, data, settings),
    }
    _bare(model, _few(data), settings, device)
    best: dict[str, tuple[float, float]] = {}
    for _ in range(settings.turns):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            made = way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            best[name] = min(best.get(name, spent), spent, key=lambda pair: pair[1])
    bare = best["bare forward passes"]
    images = len(labelled_subset(labelled_part(data, "train")[1], settings.labels, 0))
    lines = [
        f"{model!r}, {images:,} training and {len(labelled_part(data, 'test')[1]):,} test images, "
        f"batches of {settings.batch_size}, {device}, {settings.precision}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
        "| way | CPU s | of bare | wall s | of bare |",
        "|---|---|---|---|---|",
    ]
    for name, (cpu, wall) in best.items():
        lines.append(
            f"| {name} | {cpu:.1f} | {cpu / bare[0]:.2f} | {wall:.1f} | {wall / bare[1]:.2f} |"
        )
    lines += ["", made.to_text()]
    print("\n".join(lines))
    if settings.out is not None:
        settings.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _model(settings: Settings) -> vp.Model:
    if settings.spec is not None:
        return vp.load(settings.spec)
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=settings.size,
        patch_size=settings.patch,
        in_chans=settings.channels,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        num_classes=0,
    )
    size = (settings.channels, settings.size, settings.size)
    return vp.wrap(module.requires_grad_(False), name="ViT", input_size=size, mean=0.5, std=0.5)


def _data(settings: Settings) -> Labelled:
    if settings.data is not None:
        return load_labelled(settings.data)
    generator = np.random.default_rng(0)
    shape = (settings.channels, settings.size, settings.size)
    pictures = generator.integers(0, 256, (settings.classes, *shape))
    parts = []
    for count in (settings.train, settings.test):
        labels = np.arange(count) % settings.classes
        images = np.empty((count, *shape), np.uint8)
        for start in range(0, count, 1000):
            chosen = labels[start : start + 1000]
            noise = generator.integers(0, 256, (len(chosen), *shape))
            images[start : start + 1000] = 0.1 * pictures[chosen] + 0.9 * noise
        parts.append(Arrays(images, labels.astype(np.int64)))
    return Labelled("made", *parts, tuple(map(str, range(settings.classes))))


def _few(data: Labelled) -> Labelled:
    """Some images to warm up with."""
    test, labels = labelled_part(data, "test")
    if not isinstance(test, Arrays):
        return data
    few = Arrays(test.images[:512], labels[:512])
    return Labelled(data.source, few, few, data.classes)


def _bare(model: vp.Model, data: Labelled, settings: Settings, device: torch.device) -> None:
    train, labels = labelled_part(data, "train")
    parts = [(train, labelled_subset(labels, settings.labels, 0))]
    parts.append((labelled_part(data, "test")[0], None))
    with running(model, device, settings.precision):
        for part, index in parts:
            for pixels in pixel_batches(
                part,
                index,
                View(*model.input_size),
                size=settings.batch_size,
                workers=2,
                device=device,
            ):
                model.module(model.normalize(pixels))


def _evaluate(protocol: str, model: vp.Model, data: Labelled, settings: Settings) -> vp.Scores:
    return vp.evaluate(
        protocol,
        model,
        data,
        batch_size=settings.batch_size,
        device=settings.device,
        precision=settings.precision,
        labels=settings.labels,
        progress=False,
    )


if __name__ == "__main__":
    main()
