"""Images/s of vitprobe's training against a plain reading of the peers' loops.

    python benchmarks/training.py --size 28
    python benchmarks/training.py --size 224 --batch 32 --methods mae supervised

Both run in this one process, taking turns, on the same images (noise smoothed into something that
compresses like a photograph), with the same encoder (the paper's ViT-Tiny: width 192, depth 12, 12
heads; patch 4 at 28 px, 16 at 224 px). At 28 px the images are arrays, at 224 px JPEG files of
short side 256; "resident" means that ours holds the decoded images on the device. The roofline is
the larger of FLOPs / (this device's matrix-product rate) and bytes / (its copy rate), both measured
here; bytes are the activations kept for the gradient, written and read once, and the weights'
traffic. A peer's DataLoader gets its published number of workers, or --workers. On CUDA ours is
measured with CUDA graphs too, where the method allows them.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import peers
import torch
import tyro
from PIL import Image

from vitprobe.data.labelled import Arrays, Labelled, load_labelled
from vitprobe.errors import RecipeError
from vitprobe.training import load_recipe, plan
from vitprobe.training.encoder import build_encoder
from vitprobe.training.plan import Plan
from vitprobe.training.recipe import Recipe
from vitprobe.training.run import Run

RECIPES = {
    "mae": "mae_tiny",
    "moco_v3": "mocov3_tiny",
    "dino": "dino_tiny",
    "supervised": "supervised_tiny",
}


@dataclass
class Settings:
    """What to measure."""

    size: int = 28
    """Side of the images: 28 or 224."""
    methods: tuple[str, ...] = ("mae", "moco_v3", "dino", "supervised")
    batch: int = 64
    """Images an update."""
    steps: int = 4
    """Timed updates a turn."""
    turns: int = 4
    """Turns each; the best counts, since whatever else the machine does only slows one down."""
    images: int = 1024
    """In the data set."""
    device: str = "auto"
    workers: int | None = None
    """Of the peers' DataLoader and of ours; by default as published, and one a core."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Of ours; the peers' is fp32 on the CPU and float16 with a scaler on CUDA."""
    resident: bool = True
    """Also measure ours at 224 px with the images decoded on the device."""
    out: Path | None = None
    """Also write the figures here, as JSON."""
    results: list[dict[str, Any]] = field(default_factory=list, init=False)


def main(settings: Settings) -> None:
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device == "auto"
        else settings.device
    )
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"# {device.type} ({name}), torch {torch.__version__}")
    print(f"# {settings.size} px, batch {settings.batch}")
    peaks = {p: matmul_rate(device, p) for p in settings.precisions}
    copies = copy_rate(device)
    print("# " + ", ".join(f"{p} {peak / 1e12:.3g} TFLOP/s" for p, peak in peaks.items()), end="")
    print(f", copy {copies / 1e9:.3g} GB/s")
    print("method      ours                 images/s   peer's   ratio   roofline")
    with TemporaryDirectory() as folder:
        arrays, files = make_data(settings, Path(folder))
        for method in settings.methods:
            measure(method, settings, device, arrays, files, peaks, copies)
    if settings.out:
        settings.out.write_text(json.dumps(settings.results, indent=1))


def measure(
    method: str,
    settings: Settings,
    device: torch.device,
    arrays: Labelled,
    files: Labelled | None,
    peaks: dict[str, float],
    copies: float,
) -> None:
    workers = settings.workers
    ours: dict[str, tuple[Callable[[], None], Plan, str]] = {}
    runs = []
    for precision in settings.precisions:
        recipe = recipe_of(method, settings, precision)
        kinds = {"files": files, "resident": arrays if settings.resident or not files else None}
        variants = {"": recipe}
        if device.type == "cuda":
            try:
                variants[" graphs"] = load_recipe(recipe, overrides={"compile": "graphs"})
            except RecipeError as error:
                print(f"# {method}: {error}")
        for (kind, data), (how, variant) in product(kinds.items(), variants.items()):
            if data is None:
                continue
            run = Run(variant, data, device, workers=workers if workers is not None else 2)
            for note in run.engine.notes:
                print(f"# {method}{how}: {note}")
            runs.append(run)
            ours[f"{precision} {kind}{how}"] = (run.advance, plan(recipe), precision)
    published = peers.WORKERS[method] if workers is None else workers
    loop = peer_of(method, settings, device, arrays if files is None else files, published)
    rates: dict[str, list[float]] = {name: [] for name in ["peer", *ours]}
    for turn in range(settings.turns + 1):
        loop.start()
        loop.step()
        rates["peer"].append(rate_of(loop.step, settings, device))
        loop.stop()
        for name, (step, _, _) in ours.items():
            step()
            rates[name].append(rate_of(step, settings, device))
        if not turn:  # the first turn warms up caches and compilers
            rates = {name: [] for name in rates}
    peer = max(rates["peer"])
    for name, (_, planned, precision) in ours.items():
        rate = max(rates[name])
        bound = min(
            peaks[precision] / planned.flops, copies / bytes_per_image(planned, settings.batch)
        )
        print(
            f"{method:11} {name:20} {rate:8.0f} {peer:8.0f} {rate / peer:7.2f} {rate / bound:9.1%}"
        )
        settings.results.append(
            {"method": method, "ours": name, "images_per_s": rate, "peer": peer, "bound": bound}
        )
    for run in runs:
        run.close()


def rate_of(step: Callable[[], None], settings: Settings, device: torch.device) -> float:
    """Images/s of one turn."""
    return settings.batch * settings.steps / timed(step, settings.steps, device)


def timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def recipe_of(method: str, settings: Settings, precision: str) -> Recipe:
    small = settings.size == 28
    changes: dict[str, Any] = {
        "batch_size": settings.batch, "epochs": 1000, "precision": precision,
        "encoder.drop_path": 0.0, "optimizer.warmup_epochs": 0,
    }  # fmt: skip
    if small:
        changes |= {
            "encoder.image_size": 28, "encoder.patch_size": 4, "encoder.channels": 1,
            "encoder.mean": [0.5], "encoder.std": [0.5],
        }  # fmt: skip
    if method == "dino":
        changes["method.prototypes"] = 1024 if small else 65536
        if small:
            views = [dict(view) for view in load_recipe("dino_tiny").views]
            views[-1]["size"] = local_size(settings)
            changes["views"] = views
    if method == "supervised":
        # What the peer below does: crops, flips, smoothed labels.
        changes |= {
            "augment.rand_augment": 0, "augment.erase": 0.0, "method.mixup": 0.0,
            "method.cutmix": 0.0,
        }  # fmt: skip
    return load_recipe(RECIPES[method], data="benchmark", overrides=changes)


def local_size(settings: Settings) -> int:
    return 12 if settings.size == 28 else 96


def peer_of(
    method: str, settings: Settings, device: torch.device, data: Labelled, workers: int
) -> peers.Loop:
    recipe = recipe_of(method, settings, "fp32")
    config: Any = recipe.method
    classes = 10 if method == "supervised" else 0
    encoder = build_encoder(recipe.encoder, classes)
    network: torch.nn.Module
    if method == "mae":
        network = peers.MAE(encoder, config.decoder_width, config.decoder_heads)
    elif method == "moco_v3":
        network = peers.MoCoV3(encoder, config.hidden_width, config.projection_width)
    elif method == "dino":
        # Positions are interpolated for the local views by timm itself.
        encoder.dynamic_img_size = True
        encoder.patch_embed.strict_img_size = False
        encoder.patch_embed.flatten = False
        encoder.patch_embed.output_fmt = "NHWC"
        network = peers.DINO(
            encoder, config.hidden_width, config.bottleneck_width, config.prototypes
        )
    else:
        network = peers.Supervised(encoder)
    channels = recipe.encoder.channels
    views = peers.views_of(method, settings.size, local_size(settings), channels)
    if isinstance(data.train, Arrays):
        stored: Any = data.train.images
        labels = data.train.labels
    else:
        stored = [data.train.read(i) for i in range(len(data.train))]
        labels = np.zeros(len(stored), dtype=np.int64)
    pictures = peers.Pictures(stored, labels, views)
    return peers.Loop(network, pictures, settings.batch, workers, device)


def make_data(settings: Settings, folder: Path) -> tuple[Labelled, Labelled | None]:
    """Arrays of the stored size, and for 224 px the same as JPEG files."""
    small = settings.size == 28
    side, channels = (28, 1) if small else (256, 3)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(settings.images, channels, side // 8, side // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    images = (smooth * 255).byte().numpy()
    labels = np.arange(settings.images, dtype=np.int64) % 10
    arrays = Labelled("benchmark", Arrays(images, labels), None, tuple("0123456789"))
    if small:
        return arrays, None
    for i, image in enumerate(images):
        path = folder / str(labels[i]) / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
    return arrays, load_labelled(folder, channels=channels)


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of square matrix products, the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: torch.mm(a, a), 2, device) / 2 for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy, the best of several."""
    a = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), 1, device) for _ in range(8))


def bytes_per_image(planned: Plan, batch: int) -> float:
    """Activations kept for the gradient, written and read; weights, gradients and moments."""
    # Weights read forward and backward, gradients written and read, weights and moments updated.
    weights = 4 * (10 * planned.trained_parameters + 2 * planned.frozen_parameters)
    return 2 * planned.activations + weights / batch


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
