"""The similarity arithmetic alone: features given, what CKA of all pairs of layers costs and errs.

    pip install 'vitprobe[benchmarks]'
    python benchmarks/similarity.py
    python benchmarks/similarity.py --specs a.pth,heads=12 b.pth --images photos/

Patch tokens of the 13 layers of two models, in blocks of 128 images: the Gram matrices alone (one
single-precision product a layer and block); ours, which centres first and also keeps the sums that
intervals and the permuted floor come from, with the share of the first direction beside; pytorch-
cka's functions; mae-lite's way. Ways take turns, the least time of each is kept. Errors are the
greatest over all pairs of layers against our own sums in double precision, of the features as they
are and of features scaled to deviation 1 about a mean of 100, where products that are not centred
first lose the deviation's digits.

Without specs the models are two ViT-Tiny/16 with random weights, on crops of scikit-learn's two
photographs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import analysis
import torch
import tyro
from analysis import hsic
from sklearn.datasets import load_sample_images
from torch import Tensor

import vitprobe as vp
from vitprobe.capture import Recorder
from vitprobe.data.blocks import View
from vitprobe.measures.cka import CKA
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.gram import centered_gram

BATCH = 128

Blocks = list[list[Tensor]]
"""For each block the patch tokens (images, patches, width) of every layer of both models."""


@dataclass
class Settings:
    blocks: int = 2
    turns: int = 3
    specs: tuple[str, ...] = ()
    """Two models instead."""
    images: Path | None = None
    """Their images instead."""
    out: Path | None = None
    """Also write the table here."""


def crops(count: int) -> Tensor:
    """(count, 3, 224, 224) squares from two photographs, in [0, 1]."""
    photographs = [
        torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
        for image in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        photograph = photographs[i % 2]
        top, left = (
            int(torch.randint(size - 224, (), generator=generator)) for size in photograph.shape[1:]
        )
        found.append(photograph[:, top : top + 224, left : left + 224])
    return torch.stack(found)


def features(models: list[vp.Model], images: vp.Images, blocks: int) -> Blocks:
    views = {model.name: View(*model.input_size) for model in models}
    found: Blocks = []
    for block in images.blocks(views.values(), BATCH):
        layers: list[Tensor] = []
        for model in models:
            kept: list[Tensor] = []
            recorder = Recorder(
                model, on_features=lambda layer, x, kept=kept: kept.append(x.clone())
            )
            with torch.inference_mode(), recorder:
                recorder.run(block.views[views[model.name]])
            layers += [x[:, model.anatomy.prefix_tokens :] for x in kept]
        found.append(layers)
        if len(found) == blocks:
            break
    return found


def grams(blocks: Blocks) -> None:
    for layers in blocks:
        for x in layers:
            flat = x.flatten(1)
            flat @ flat.T


def ours(blocks: Blocks, *, share: bool = False) -> Tensor:
    total = CKA(len(blocks[0]))
    first = FirstDirectionShare(len(blocks[0]))
    for number, layers in enumerate(blocks):
        found = torch.stack([centered_gram(x) for x in layers])
        total.update_grams(found, number * BATCH)
        if share:
            first.update_grams(found)
    half = len(blocks[0]) // 2
    return total.compute().value[:half, half:]


def pytorch_cka(blocks: Blocks) -> Tensor:
    from cka import hsic as all_hsic

    parts = []
    for layers in blocks:
        flat = [x.flatten(1) for x in layers]
        half = len(flat) // 2
        pair = [torch.stack([x @ x.T for x in part]) for part in (flat[:half], flat[half:])]
        parts.append(all_hsic(*pair))
    cross, first, second = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return (cross / (first[:, None] * second).sqrt()).clamp(0, 1)


def mae_lite(blocks: Blocks) -> Tensor:
    half = len(blocks[0]) // 2
    sums = torch.zeros(3, half, half, dtype=torch.float64)

    def gram(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat @ flat.T).fill_diagonal_(0)

    for layers in blocks:
        for i in range(half):
            one = gram(layers[i])
            own = hsic(one, one)
            for j in range(half):
                other = gram(layers[half + j])
                sums[:, i, j] += torch.tensor([own, hsic(one, other), hsic(other, other)])
    return sums[1] / (sums[0] * sums[2]).sqrt()


def large_mean(blocks: Blocks) -> Blocks:
    return [[(x - x.mean()) / x.std() + 100 for x in layers] for layers in blocks]


def main(settings: Settings) -> None:
    if settings.specs:
        models = [vp.load(spec, name=f"m{i}") for i, spec in enumerate(settings.specs)]
        images = vp.images(settings.images, limit=settings.blocks * BATCH)
    else:
        models = analysis.build(analysis.Settings())
        images = vp.images(crops(settings.blocks * BATCH))
    blocks = features(models, images, settings.blocks)
    ways: dict[str, Callable[[Blocks], Tensor | None]] = {
        "Grams alone": grams,
        "ours, CKA": ours,
        "ours, CKA and first-direction share": lambda blocks: ours(blocks, share=True),
        "pytorch-cka": pytorch_cka,
        "mae-lite's way": mae_lite,
    }
    times = {name: [] for name in ways}
    for _ in range(settings.turns):
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.inference_mode():
                way(blocks)
            times[name].append(time.perf_counter() - start)
    errors: dict[str, list[str]] = {name: [] for name in ways}
    for given in (blocks, large_mean(blocks)):
        exact = ours([[x.double() for x in layers] for layers in given])
        for name, way in ways.items():
            found = way(given)
            errors[name].append("" if found is None else f"{(found - exact).abs().max():.0e}")
    floor = min(times["Grams alone"])
    layers = len(blocks[0])
    lines = [
        f"{layers} layers of {' and '.join(model.spec for model in models)}, {len(blocks)} blocks "
        f"of {BATCH} images, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
        "| way | s | of Grams | error | error, large mean |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {min(found):.2f} | {min(found) / floor:.2f} | {' | '.join(errors[name])} |"
        for name, found in times.items()
    ]
    text = "\n".join(lines)
    print(text)
    if settings.out:
        settings.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
