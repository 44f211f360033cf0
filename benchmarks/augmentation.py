"""Views a second: ours against the pipelines of the reference repositories, in one process.

The peers' are PIL and torchvision transforms, one image after another, as MAE, MoCo-v3 and DINO
publish them, on one core; a DataLoader multiplies that by its workers. Ours are batches on --device
(one core where that is the CPU) and, below them, the path through worker processes: cut on one core
as a worker does, finished on the device. All start from decoded uint8 arrays, so that decoding
JPEG, the same for all, is left out. Images a second count all views of an image as one.

    python benchmarks/augmentation.py --device cuda
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tv

from vitprobe.training.augment import Augment, AugmentConfig
from vitprobe.training.randomness import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = tv.InterpolationMode.BICUBIC
COLOUR = AugmentConfig(
    jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2
)
MOCO = (replace(COLOUR, blur=1.0), replace(COLOUR, blur=0.1, solarize=0.2))
DINO = (
    replace(COLOUR, crop_scale=(0.4, 1.0), blur=1.0),
    replace(COLOUR, crop_scale=(0.4, 1.0), blur=0.1, solarize=0.2),
)


@dataclass(frozen=True)
class Case:
    """Images of `stored` pixels and `channels`, views of `size`."""

    size: int
    stored: int
    channels: int
    batch: int

    def views(self, method: str) -> tuple[AugmentConfig, ...]:
        """The views of a method; DINO's local ones in proportion to 96 of 224 pixels."""
        local = round(self.size * 96 / 224 / 4) * 4
        return {
            "MAE": (AugmentConfig(crop_scale=(0.2, 1.0)),),
            "MoCo-v3": MOCO,
            "DINO": (
                *DINO,
                replace(COLOUR, size=local, count=8, crop_scale=(0.05, 0.4), blur=0.5),
            ),
        }[method]


CASES = (Case(28, 28, 1, 512), Case(32, 32, 3, 512), Case(224, 256, 3, 32))


class Blur:
    """PIL's Gaussian blur of a random radius, as MoCo-v3 and DINO use it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(()).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius))


def peer(view: AugmentConfig, case: Case, interpolation: tv.InterpolationMode) -> tv.Compose:
    """The published pipeline of one view."""
    steps: list[Callable] = [
        tv.RandomResizedCrop(view.size or case.size, view.crop_scale, interpolation=interpolation)
    ]
    if view.jitter:
        strengths = view.brightness, view.contrast, view.saturation, view.hue
        steps.append(tv.RandomApply([tv.ColorJitter(*strengths)], view.jitter))
        steps.append(tv.RandomGrayscale(view.grayscale))
    if view.blur:
        steps.append(tv.RandomApply([Blur()], view.blur))
    if view.solarize:
        steps.append(tv.RandomSolarize(128, view.solarize))
    normalize = tv.Normalize(MEAN[: case.channels], STD[: case.channels])
    return tv.Compose([*steps, tv.RandomHorizontalFlip(), tv.ToTensor(), normalize])


def reference(pipelines: Sequence[tv.Compose], arrays: Sequence[np.ndarray]) -> None:
    """The peer's way: one image after the other."""
    for array in arrays:
        image = Image.fromarray(array)
        for pipeline in pipelines:
            pipeline(image)


def batched(augment: Augment, images: Tensor) -> None:
    """Ours: the whole batch on its device."""
    augment(images, Draws(0, 0, torch.arange(len(images), device=images.device)))
    if images.is_cuda:
        torch.cuda.synchronize()


def in_workers(augment: Augment, images: Tensor, device: str) -> None:
    """Ours where images have to be decoded: cut one by one, finished as a batch."""
    crops = [augment.cut(image, Draws(0, 0, torch.tensor([i]))) for i, image in enumerate(images)]
    batches = [torch.stack(crop).to(device) for crop in zip(*crops, strict=True)]
    views = augment.finish(batches, Draws(0, 0, torch.arange(len(images), device=device)))
    if views[0].is_cuda:
        torch.cuda.synchronize()


def seconds_each(
    runs: Sequence[Callable[[], None]], clock: Callable[[], float], seconds: float
) -> list[float]:
    """Median time of each run, taken in turns for about `seconds` each."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    while sum(map(sum, times)) < seconds * len(runs):
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            run()
            taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


def main(device: str = "cpu", seconds: float = 2.0) -> None:
    """Print images a second and their ratios to the peer's on one core.

    Args:
        device: where our batches are augmented.
        seconds: how long each is measured.
    """
    torch.set_num_threads(1)
    cuda = torch.device(device).type == "cuda"
    # A core's own time is not disturbed by whatever else the machine does.
    clock = time.perf_counter if cuda else time.process_time
    print(f"ours on {torch.cuda.get_device_name() if cuda else 'one core'}, peers on one core")
    print(f"{'images':>14} {'method':8} {'peer':>8} {'ours':>10} {'ratio':>7} {'workers':>9} ratio")
    for case in CASES:
        shape = (case.batch, case.channels, case.stored, case.stored)
        stored = torch.randint(256, shape, dtype=torch.uint8)
        batch = stored.repeat(8, 1, 1, 1).to(device) if cuda else stored
        some = stored[: max(8, case.batch // 8)]
        arrays = [image.permute(1, 2, 0).squeeze(-1).numpy() for image in some]
        mean, std = MEAN[: case.channels], STD[: case.channels]
        for method in ("MAE", "MoCo-v3", "DINO"):
            views = case.views(method)
            resize = tv.InterpolationMode.BILINEAR if method == "MoCo-v3" else BICUBIC
            pipelines = [peer(view, case, resize) for view in views for _ in range(view.count)]
            augment = Augment(views, size=case.size, mean=mean, std=std)
            runs = [
                partial(reference, pipelines, arrays),
                partial(batched, augment, batch),
                partial(in_workers, augment, some, device),
            ]
            numbers = (len(some), len(batch), len(some))
            times = seconds_each(runs, clock, seconds)
            old, new, split = (n / taken for n, taken in zip(numbers, times, strict=True))
            what = f"{case.channels} x {case.stored} → {case.size}"
            print(
                f"{what:>14} {method:8} {old:8,.0f} {new:10,.0f} {new / old:7.1f} "
                f"{split:9,.0f} {split / old:5.1f}"
            )


if __name__ == "__main__":
    tyro.cli(main)
