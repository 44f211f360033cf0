"""What a recipe would do, found out by running two images through it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import CheckpointError, DataError, SourceError
from vitprobe.training.methods import Batch, Method
from vitprobe.training.randomness import Draws
from vitprobe.training.recipe import Recipe, load_recipe, remarks
from vitprobe.training.run import build_method, check_data

# AdamW in single precision: the weight, its gradient and two moments.
_BYTES_TRAINED, _BYTES_FROZEN = 16, 4


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    images: for training; None where the data cannot be read, for the reason `problem`.
    encoder_parameters: of what is left in the end.
    trained_parameters: with decoders, heads and adapters.
    frozen_parameters: of momentum encoders and teachers.
    flops: of one image, forward and backward and of all its views (a multiply-add counts two).
    activations: bytes an image kept for the gradient.
    notes: what the figures leave out, and what of the recipe is seldom meant.
    memory: bytes for weights, optimiser and activations of one process; an estimate.
    """

    recipe: Recipe
    images: int | None
    problem: str
    encoder_parameters: int
    trained_parameters: int
    frozen_parameters: int
    flops: float
    activations: float
    memory: int
    notes: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> int | None:
        """Updates in one epoch."""
        return None if self.images is None else self.images // self.recipe.batch_size

    def to_text(self) -> str:
        """The resolved recipe as TOML, and the figures as comments below it."""
        per_epoch = self.steps_per_epoch
        steps = (
            f"unknown: {self.problem}"
            if per_epoch is None
            else f"{self.recipe.epochs * per_epoch:,} ({self.recipe.epochs} epochs x {per_epoch:,})"
        )
        figures = {
            "images": "unknown" if self.images is None else f"{self.images:,}",
            "steps": steps,
            "parameters": f"{self.encoder_parameters / 1e6:.2f} M in the encoder, "
            f"{self.trained_parameters / 1e6:.2f} M trained, "
            f"{self.frozen_parameters / 1e6:.2f} M frozen",
            "learning rate": f"{self.recipe.optimizer.lr * self.recipe.batch_size / 256:.3g}, as "
            "optimizer.lr is for 256 images",
            "FLOPs per image": f"{self.flops / 1e9:.3g} G, forward and backward",
            "memory": f"about {self.memory / 2**30:.2f} GiB for one process that computes "
            f"{self.recipe.batch_size // self.recipe.accumulate} images at a time"
            + (", less as blocks are recomputed" if self.recipe.recompute else ""),
        }
        figures |= {f"note {i + 1}": note for i, note in enumerate(self.notes)}
        return "\n".join(
            [self.recipe.to_toml(), *(f"# {name}: {value}" for name, value in figures.items())]
        )


def plan(
    recipe: str | Path | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a run with these arguments of `pretrain`; nothing is written.

    Raises RecipeError for a recipe that cannot be followed.
    """
    resolved = load_recipe(recipe, data=data, overrides=overrides)
    images, classes, problem = None, 1000, ""
    notes = list(remarks(resolved))
    try:
        labelled = load_labelled(resolved.data, channels=resolved.encoder.channels)
        images, classes = len(labelled.train), len(labelled.classes)
        check_data(resolved, labelled)
    except DataError as error:
        problem = str(error)
    try:
        method = build_method(resolved, classes).train()
    except (CheckpointError, SourceError) as error:
        notes.append(f"the teacher is left out of the figures: {error}")
        method = build_method(replace(resolved, distill=None), classes).train()
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = _frozen(method)
    parts = resolved.batch_size // resolved.accumulate
    activations = (_activations(method, resolved, 4) - _activations(method, resolved, 2)) / 2
    return Plan(
        recipe=resolved,
        images=images,
        problem=problem,
        encoder_parameters=sum(p.numel() for p in method.encoder.parameters()),
        trained_parameters=trained,
        frozen_parameters=frozen,
        flops=_flops(method, resolved),
        activations=activations,
        notes=tuple(notes),
        memory=int(_BYTES_TRAINED * trained + _BYTES_FROZEN * frozen + activations * parts),
    )


def _frozen(method: Method) -> int:
    own = {p for p in method.parameters() if not p.requires_grad}
    teacher = getattr(method, "teacher", None)
    if teacher is not None:
        own |= set(teacher.module.parameters())
    return sum(p.numel() for p in own)


def _batch(recipe: Recipe, count: int) -> Batch:
    shape = (count, recipe.encoder.channels)
    views = tuple(torch.randn(*shape, size, size) for size in recipe.view_sizes)
    draws = Draws(recipe.seed, 0, torch.arange(count))
    return Batch(views, torch.zeros(count, dtype=torch.int64), draws)


def _flops(method: Method, recipe: Recipe) -> float:
    modules = [part for part in method.modules() if isinstance(part, Attention)]
    fused = [part.fused_attn for part in modules]
    try:
        for part in modules:
            # torch counts no products inside its fused attention on the CPU.
            part.fused_attn = False  # type: ignore[misc]
        with FlopCounterMode(display=False) as counter:
            loss, _ = method.loss(_batch(recipe, 2))
            loss.backward()
    finally:
        for part, value in zip(modules, fused, strict=True):
            part.fused_attn = value  # type: ignore[misc]
        method.zero_grad()
    return counter.get_total_flops() / 2


def _activations(method: Method, recipe: Recipe, count: int) -> int:
    """Bytes kept for the gradient of a batch of `count`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = recipe.precision == "bf16" or (recipe.precision == "auto" and torch.cuda.is_available())
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss, _ = method.loss(_batch(recipe, count))
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    del loss
    return sum(size for pointer, size in kept.items() if pointer not in weights)
