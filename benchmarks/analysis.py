"""What an analysis costs beside the forward passes it needs, ours and the peers', in one process.

    pip install 'vitprobe[benchmarks]'
    python benchmarks/analysis.py
    python benchmarks/analysis.py --models 5 --images 256 --turns 1
    python benchmarks/analysis.py --heads 12 --no-peers
    python benchmarks/analysis.py --model vit_base_patch16_224 --heads 12 --device cuda \
        --precision bf16 --no-peers

Timm's ViT-Tiny/16 at 224 pixels with random weights, or another model, on the same noise images in
the same batches: bare forward passes; ours with nothing gathered, with CKA alone, with CKA,
attention distance and entropy; mae-lite's way, its algorithm written anew from its description;
PyTorch-Model-Compare (`torch_cka`) and pytorch-cka (`cka`). Peers compare two models, so of more
they compare every pair, a model with itself among them, as their users do.

Ways take turns and the least CPU time of each is kept, since other work on a machine only adds to
it; wall time beside. Memory is the peak of the process above what it held before. Values of CKA are
checked against mae-lite's way in double precision, on one batch, where the two are equal.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vitprobe as vp
from vitprobe.capture import Recorder

LAYERS = [*(f"blocks.{i}.norm1" for i in range(12)), "norm"]
ATTENTION = ["attention_distance", "attention_entropy"]


@dataclass
class Settings:
    models: int = 2
    images: int = 1024
    heads: int = 3
    model: str = "vit_tiny_patch16_224"
    """Of timm, with 12 blocks and a class token."""
    size: int = 224
    batch: int = 128
    turns: int = 2
    threads: int | None = None
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the bare forward passes and ours; peers take no other than fp32."""
    peers: bool = True
    out: Path | None = None
    """Also write the table here."""


@dataclass
class Cost:
    cpu: float
    wall: float
    memory: float
    """MB above the start."""


class MaeLite:
    """The reference's similarity: hooks on norm1, class token dropped, per-batch unbiased HSIC.

    For every layer of one model, and for every layer of the other, the Gram matrix and both HSICs
    are computed; batches weigh equally.
    """

    def __init__(self, a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.models = (a, b)
        self.dtype = dtype
        self.kept: list[dict[str, Tensor]] = [{}, {}]

    def compare(self, batches: Sequence[Tensor]) -> Tensor:
        sums = torch.zeros(3, len(LAYERS), len(LAYERS), dtype=torch.float64)
        handles = []
        for model, kept in zip(self.models, self.kept, strict=True):
            modules = dict(model.named_modules())
            handles += [
                modules[name].register_forward_hook(
                    lambda module, inputs, output, kept=kept, name=name: kept.update(
                        {name: output[:, 1:]}
                    )
                )
                for name in LAYERS
            ]
        for batch in batches:
            for model in self.models:
                model(batch)
            for i, name in enumerate(LAYERS):
                first = self._gram(self.kept[0][name])
                own = hsic(first, first)
                for j, other in enumerate(LAYERS):
                    second = self._gram(self.kept[1][other])
                    sums[0, i, j] += own
                    sums[1, i, j] += hsic(first, second)
                    sums[2, i, j] += hsic(second, second)
        for handle in handles:
            handle.remove()
        return sums[1] / (sums[0] * sums[2]).sqrt()

    def _gram(self, tokens: Tensor) -> Tensor:
        x = tokens.flatten(1).to(self.dtype)
        return (x @ x.T).fill_diagonal_(0)


def hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of Song et al. (2012), with products of whole matrices."""
    n = len(first)
    ones = torch.ones(n, 1, dtype=first.dtype, device=first.device)
    value = torch.trace(first @ second)
    value += ((ones.T @ first @ ones) @ (ones.T @ second @ ones) / ((n - 1) * (n - 2))).squeeze()
    value -= (ones.T @ first @ second @ ones).squeeze() * 2 / (n - 2)
    return float(value / (n * (n - 3)))


@contextmanager
def measured(device: str) -> Iterator[list[Cost]]:
    """CPU and wall seconds and peak memory of what runs inside, as the one entry of a list."""
    page, peak, stop = os.sysconf("SC_PAGE_SIZE"), [0], threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident())

    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() if cuda else resident()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu, wall = time.process_time(), time.perf_counter()
    found: list[Cost] = []
    yield found
    if cuda:
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stop.set()
    watcher.join()
    most = torch.cuda.max_memory_allocated() if cuda else max(peak[0], resident())
    found.append(Cost(cpu, wall, (most - start) / 2**20))


def build(settings: Settings) -> list[vp.Model]:
    models = []
    for seed in range(settings.models):
        torch.manual_seed(seed)
        module = timm.create_model(settings.model, num_classes=0, num_heads=settings.heads)
        with torch.no_grad():  # Attention of fresh weights is uniform: none would be hard to find.
            for name, parameter in module.named_parameters():
                if "qkv.weight" in name:
                    parameter.mul_(4)
        models.append(vp.wrap(module.requires_grad_(False), name=f"m{seed}", mean=0.5, std=0.5))
    return models


def mixed(settings: Settings) -> AbstractContextManager[object]:
    if settings.precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16)


def ways(
    models: list[vp.Model], images: Tensor, settings: Settings
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    device = torch.device(settings.device)
    modules = [model.module.to(device) for model in models]
    # What the models see after their normalisation, for those that do not normalise.
    batches = [(batch.to(device) - 0.5) / 0.5 for batch in images.split(settings.batch)]
    loader = DataLoader(TensorDataset(torch.cat(batches)), batch_size=settings.batch)
    pairs = list(combinations_with_replacement(range(len(models)), 2))
    if len(models) == 2:
        pairs = [(0, 1)]

    def forwards() -> None:
        with torch.inference_mode(), mixed(settings):
            for batch in batches:
                for module in modules:
                    module(batch)

    def captured(attention: bool) -> None:
        with torch.inference_mode(), mixed(settings):
            for model in models:
                recorder = Recorder(
                    model,
                    on_features=lambda layer, tokens: None,
                    on_attention=(lambda chunk: None) if attention else None,
                )
                with recorder:
                    for batch in images.split(settings.batch):
                        recorder.run(batch.to(device))

    def ours(measures: list[str]) -> vp.Comparison:
        return vp.compare(
            models,
            images,
            measures,
            batch_size=settings.batch,
            device=settings.device,
            precision=settings.precision,
            progress=False,
        )

    def mae_lite(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        with torch.no_grad():
            return [MaeLite(modules[a], modules[b], dtype).compare(batches) for a, b in pairs]

    found: dict[str, Callable[[], object]] = {
        "bare forward passes": forwards,
        "ours, capture of features alone": lambda: captured(False),
        "ours, capture of features and attention alone": lambda: captured(True),
        "ours, CKA": lambda: ours(["cka"]),
        "ours, CKA + distance + entropy": lambda: ours(["cka", *ATTENTION]),
    }
    if not settings.peers:
        return found
    found["mae-lite's way, CKA"] = mae_lite
    try:
        import cka
        import torch_cka
    except ImportError:
        print("torch_cka and cka are not there: pip install 'vitprobe[benchmarks]'")
        return found

    def model_compare() -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for a, b in pairs:
                peer = torch_cka.CKA(
                    modules[a],
                    modules[b],
                    model1_layers=LAYERS,
                    model2_layers=LAYERS,
                    device=settings.device,
                )
                peer.compare(loader)
                for module in (modules[a], modules[b]):  # it never removes its hooks
                    for child in module.modules():
                        child._forward_hooks.clear()

    def pytorch_cka() -> None:
        for a, b in pairs:
            cka.compute_cka(modules[a], modules[b], loader, layers=LAYERS, device=device)

    found["PyTorch-Model-Compare, CKA"] = model_compare
    found["pytorch-cka, CKA"] = pytorch_cka
    return found


def check(models: list[vp.Model], images: Tensor, settings: Settings) -> float:
    """Greatest difference between our CKA and mae-lite's way in double precision."""
    device, few = settings.device, images[: settings.batch]
    result = vp.compare(models, few, ["cka"], device=device, progress=False)
    batches = [(batch.to(device) - 0.5) / 0.5 for batch in few.split(settings.batch)]
    modules = [model.module.to(device) for model in models]
    with torch.no_grad():
        peer = MaeLite(modules[0], modules[1], torch.float64).compare(batches)
    return float(np.abs(result.cka("m0", "m1").values - peer.numpy()).max())


def compared(costs: dict[str, list[Cost]]) -> list[str]:
    """How many times our CPU time with CKA alone each peer takes: the least of all turns on both
    sides, and the two of each turn."""
    ours = [cost.cpu for cost in costs["ours, CKA"]]
    peers = {name: runs for name, runs in costs.items() if name.endswith(", CKA")}
    lines = []
    for name, runs in peers.items():
        theirs = [cost.cpu for cost in runs]
        if name != "ours, CKA":
            turns = " ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs, strict=True))
            lines.append(
                f"{name.removesuffix(', CKA')}: {min(theirs) / min(ours):.2f} times ours "
                f"(turn by turn {turns})."
            )
    return lines


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    models = build(settings)
    images = torch.rand(
        (settings.images, 3, settings.size, settings.size),
        generator=torch.Generator().manual_seed(0),
    )
    timed = ways(models, images, settings)
    costs: dict[str, list[Cost]] = {name: [] for name in timed}
    for _ in range(settings.turns):
        for name, run in timed.items():
            with measured(settings.device) as found:
                run()
            costs[name] += found
            print(f"{name}: {found[0].cpu:.1f} CPU s, {found[0].wall:.1f} s", flush=True)
    bare = min(cost.cpu for cost in costs["bare forward passes"])
    bare_wall = min(cost.wall for cost in costs["bare forward passes"])
    pairs = 1 if settings.models == 2 else settings.models * (settings.models + 1) // 2
    lines = [
        f"{settings.models} x {settings.model}, {settings.size} px, {settings.heads} heads, "
        f"{settings.images} images in batches of {settings.batch}, {settings.device}, "
        f"{settings.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"peers: {pairs} pair{'s' * (pairs > 1)}.",
        "",
        "| way | CPU s | of bare | wall s | of bare | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in costs.items():
        cpu, wall = min(run.cpu for run in runs), min(run.wall for run in runs)
        memory = min(run.memory for run in runs)
        lines.append(
            f"| {name} | {cpu:.1f} | {cpu / bare:.2f} | {wall:.1f} | {wall / bare_wall:.2f} "
            f"| {memory:.0f} |"
        )
    lines += ["", *compared(costs)]
    if settings.peers:
        difference = check(models, images, settings)
        lines += ["", f"CKA differs from mae-lite's way in double precision by {difference:.1e}."]
    text = "\n".join(lines)
    print(f"\n{text}")
    if settings.out:
        settings.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
