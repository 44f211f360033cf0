"""Peak memory of a comparison against its number of images: a few numbers an image, and no more.

    python benchmarks/memory.py
    python benchmarks/memory.py --images 256 4096 --measures all --size 224 --width 192 --depth 12

Two ViTs with random weights compare PNG files of a temporary folder, a process of its own for every
number of images, since a process never gives back the peak that it once had. What is kept of an
image is stated beside: for every head and attention measure a sum and two counts (12 bytes), for
every layer and token measure a number (4 bytes), for RankMe a vector a layer, and the image's name
and hash. While the result is made of them they are there about four times over.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

NAME_BYTES = 300
"""Of an image's name, its hash and its place, as Python objects."""


@dataclass
class Settings:
    images: tuple[int, ...] = (256, 1024, 4096)
    measures: tuple[str, ...] = ("cka", "attention_distance", "attention_entropy")
    tokens: str = "patches"
    size: int = 32
    patch: int = 8
    width: int = 48
    depth: int = 2
    heads: int = 3
    block: int = 128
    device: str = "cpu"
    out: Path | None = None
    """Also write the table here."""
    folder: Path | None = None
    """Of one measured process: the images. Not given by hand."""


def main() -> None:
    settings = tyro.cli(Settings)
    if settings.folder is not None:
        _measure(settings)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), max(settings.images), settings.size)
        for count in settings.images:
            command = [sys.executable, __file__, *sys.argv[1:], "--images", str(count)]
            done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append({"images": count, **json.loads(done.stdout.splitlines()[-1])})
    text = _table(rows)
    print(text)
    if settings.out is not None:
        settings.out.write_text(text + "\n")


def _write(folder: Path, count: int, size: int) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.png", compress_level=1)


def _measure(settings: Settings) -> None:
    import timm
    import torch

    import vitprobe as vp

    models = []
    for name in ("a", "b"):
        torch.manual_seed(len(models))
        module = timm.models.vision_transformer.VisionTransformer(
            img_size=settings.size,
            patch_size=settings.patch,
            embed_dim=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            num_classes=0,
        )
        shape = (3, settings.size, settings.size)
        models.append(vp.wrap(module, name=name, input_size=shape, mean=0.5, std=0.5))
    before = _peak()
    result = vp.compare(
        models,
        settings.folder,
        settings.measures,
        tokens=settings.tokens,
        block=settings.block,
        limit=settings.images[0],
        device=settings.device,
        progress=False,
    )
    kept = _kept(result, settings)
    print(json.dumps({"before": before, "peak": _peak(), "kept": kept}))


def _peak() -> float:
    """MB, of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _kept(result: Any, settings: Settings) -> int:
    """Bytes kept of an image, all models together."""
    layers = settings.depth + 1
    each = 0
    for name in result.measures:
        group = result.group_of(name)
        if group == "attention":
            each += 12 * settings.depth * settings.heads
        elif name == "rankme":
            each += 4 * layers * settings.width
        elif group == "tokens":
            each += 4 * layers
    return 2 * each + NAME_BYTES


def _table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| images | peak (MB) | of it compare (MB) | growth (MB) | growth (B/image) | "
        "kept (B/image) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    first = rows[0]
    for row in rows:
        growth, more = row["peak"] - first["peak"], row["images"] - first["images"]
        each = f"{growth * 2**20 / more:,.0f}" if more else ""
        lines.append(
            f"| {row['images']:,} | {row['peak']:,.0f} | {row['peak'] - row['before']:,.0f} | "
            f"{growth:+,.1f} | {each} | {row['kept']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
