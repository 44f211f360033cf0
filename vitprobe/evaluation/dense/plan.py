"""What a run of dense prediction would take."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitprobe.data.coco import load_coco
from vitprobe.data.semantic import load_semantic
from vitprobe.data.shapes import CLASSES, shapes_of
from vitprobe.errors import DataError
from vitprobe.evaluation.dense.detector import Detector
from vitprobe.evaluation.dense.recipe import DenseRecipe
from vitprobe.evaluation.dense.segmenter import Segmenter
from vitprobe.evaluation.evaluate import find_protocol
from vitprobe.models import load
from vitprobe.training.methods import Method


@dataclass(frozen=True)
class Plan:
    """images, tested: how many, None where the data cannot be read, for the reason `problem`.

    backbone, parameters: of the backbone, and of all that is in the predictor; trained: of these.
    flops: of one image, forward and backward (a multiply-add counts two).
    """

    recipe: DenseRecipe
    images: int | None
    tested: int | None
    problem: str
    classes: int
    backbone: int
    parameters: int
    trained: int
    flops: float

    def to_text(self) -> str:
        """The resolved recipe as TOML, and the figures as comments below it."""
        recipe = self.recipe
        if self.images is None:
            images = steps = f"unknown: {self.problem}"
        else:
            each = self.images // recipe.batch_size
            images = f"{self.images:,} to train on, {self.tested:,} to test on"
            steps = f"{recipe.epochs * each:,} ({recipe.epochs} epochs x {each:,})"
        assumed = f", assumed: those of {'VOC' if recipe.detector is None else 'COCO'}"
        figures = {
            "images": images,
            "classes": f"{self.classes}{'' if self.images is not None else assumed}",
            "steps": steps,
            "parameters": f"{self.backbone / 1e6:.2f} M in the backbone, "
            f"{self.parameters / 1e6:.2f} M in all, {self.trained / 1e6:.2f} M of them trained",
            "learning rate": f"{recipe.optimizer.lr * recipe.batch_size / 256:.3g}, as "
            "optimizer.lr is for 256 images",
            "FLOPs per image": f"{self.flops / 1e9:.4g} G, forward and backward",
        }
        return "\n".join(
            [recipe.to_toml(), *(f"# {name}: {value}" for name, value in figures.items())]
        )


def plan(
    protocol: str,
    spec: str,
    data: str,
    recipe: str | Path | DenseRecipe,
    overrides: Mapping[str, Any],
    *,
    name: str | None = None,
) -> Plan:
    """The plan of `vitprobe.evaluate` with these arguments; nothing is written.

    Raises RecipeError for a recipe that cannot be followed, and whatever `load` raises.
    """
    kind: Any = find_protocol(protocol)
    chosen = kind(recipe=recipe, overrides=overrides)
    resolved: DenseRecipe = chosen.resolved()
    model = load(spec, name=name)
    resolved = resolved.for_model(model, data)
    images, tested, problem, classes = None, None, "", 80 if protocol == "detection" else 21
    made = shapes_of(data)
    try:
        if made is not None:
            images, tested = made.train, made.val
            classes = len(CLASSES) + (protocol == "segmentation")  # the background is one
        else:
            reader: Any = load_coco if protocol == "detection" else load_semantic
            found = reader(data)
            images, tested, classes = len(found.train), len(found.test), len(found.classes)
    except DataError as error:
        problem = str(error)
    kind = Detector if protocol == "detection" else Segmenter
    method: Any = kind(resolved, model, classes).train()
    sizes = {p: p.numel() for p in method.parameters()}
    return Plan(
        recipe=resolved,
        images=images,
        tested=tested,
        problem=problem,
        classes=classes,
        backbone=sum(p.numel() for p in method.encoder.parameters()),
        parameters=sum(sizes.values()),
        trained=sum(count for p, count in sizes.items() if p.requires_grad),
        flops=_flops(method, resolved),
    )


def _flops(method: Method, recipe: DenseRecipe) -> float:
    """By shapes alone, without computing anything: of a detector, with as many regions as are
    sampled, a quarter of them objects."""
    assert recipe.encoder is not None  # noqa: S101 - of a recipe for a model
    empty: Any = copy.deepcopy(method).to("meta")
    size = recipe.image_size
    images = torch.empty(1, recipe.encoder.channels, size, size, device="meta")
    # torch counts no products inside its fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcomes = (
            [empty.logits(images)]
            if recipe.detector is None
            else empty.outcomes(images, recipe.detector.regions_sampled)
        )
        torch.stack([outcome.sum() for outcome in outcomes]).sum().backward()
    return float(counter.get_total_flops())
