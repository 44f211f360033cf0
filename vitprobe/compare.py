"""The one loop: every image through every model once, every measure on the way.

Layers are reduced to Gram matrices as they arrive, attention to per-image sums; nothing else is
kept of an image, so memory does not grow with their number (but for per-image attention means).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe import provenance
from vitprobe.capture import Recorder
from vitprobe.capture.features import Convention, convention_of, feature_layers
from vitprobe.capture.geometry import plain
from vitprobe.data.images import Block, Images, View
from vitprobe.data.images import images as as_images
from vitprobe.devices import exact_products, find_device, placed
from vitprobe.errors import DataError, MeasureError, VitprobeError, suggest
from vitprobe.measures.attention import AttentionChunk, AttentionMeasure
from vitprobe.measures.cka import (
    CKA,
    MINIMUM_IMAGES,
    Estimator,
    FirstDirectionShare,
    centered_gram,
)
from vitprobe.measures.registry import ATTENTION, MEASURES
from vitprobe.measures.tokens import TokenPolicy, select_tokens
from vitprobe.models import Model
from vitprobe.results import (
    Comparison,
    Feature,
    Unit,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)
from vitprobe.samples import SAMPLES, THUMBNAIL, SampleMaps, thumbnails

DEFAULT_MEASURES: Final = ("cka", "attention_distance", "attention_entropy")

LONGEST_NAME: Final = 100

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """How a comparison is made; all of it is recorded in the result."""

    measures: Sequence[str] = DEFAULT_MEASURES
    layers: Convention = "normed"
    tokens: TokenPolicy = "patches"
    estimator: Estimator = "unbiased"
    block: int = 128
    batch_size: int | None = None
    device: str = "auto"
    precision: Precision = "fp32"
    workers: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.measures, str):
            raise MeasureError(f"measures are a list of names: give ['{self.measures}']")
        known = [name for name in MEASURES if name == "cka" or name in ATTENTION]
        for name in self.measures:
            if name not in known:
                raise MeasureError(
                    f"unknown measure '{name}'.{suggest(name, known)} Use some of "
                    f"{' '.join(known)}."
                )
        if not self.measures:
            raise MeasureError(f"no measure asked for: use some of {', '.join(known)}")
        if self.estimator not in MINIMUM_IMAGES:
            raise MeasureError(
                f"unknown CKA estimator '{self.estimator}': use 'unbiased' or 'biased'"
            )
        if self.block < MINIMUM_IMAGES[self.estimator]:
            raise MeasureError(
                f"a block of {self.block} images is too small: {self.estimator} CKA needs "
                f"{MINIMUM_IMAGES[self.estimator]}"
            )
        for what, number in (("batch size", self.batch_size), ("number of workers", self.workers)):
            if number is not None and number < 1:
                raise DataError(f"a {what} of {number} is none; give 1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise VitprobeError(f"unknown precision '{self.precision}': use 'fp32' or 'bf16'")

    @property
    def attention(self) -> tuple[str, ...]:
        """Attention measures; sink mass always goes with them, since renormalising hides it."""
        asked = [name for name in self.measures if name in ATTENTION]
        return tuple(dict.fromkeys([*asked, "sink_mass"])) if asked else ()


def compare(
    models: Sequence[Model],
    images: Any,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    layers: Convention = "normed",
    tokens: TokenPolicy = "patches",
    estimator: Estimator = "unbiased",
    block: int = 128,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    limit: int | None = None,
    seed: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Comparison:
    """Compare models on the same images, in one pass.

    Models may differ in depth, width, patch, input size and normalisation. CKA compares every layer
    of every model with every other; one model alone is compared with itself.

    Args:
        models: from `load` or `wrap`, with different names.
        images: whatever `vitprobe.images` takes.
        measures: names; attention measures bring sink mass with them.
        layers: `normed` (what each block's attention reads, and the final norm) or `residual`.
        tokens: what of a layer CKA compares: `patches`, `cls`, `mean` or `all`.
        estimator: of HSIC in CKA; `biased` is exact only when all images fit in one block.
        block: images over which similarity is computed before it is summed; recorded.
        batch_size: images in one forward pass, at most and by default a block.
        device: `auto` (CUDA or MPS where there is one), or a torch device.
        precision: `fp32` (TF32 and autocast off) or `bf16` autocast.
        limit: take the first so many images of the seeded permutation.
        seed: of the permutation, 0 unless given.
        workers: threads that decode images ahead.
        progress: show a progress bar on stderr where that is a terminal.

    Returns:
        The Comparison.

    Raises:
        VitprobeError: models that share a name, images too few or undecodable, an unknown measure,
            a layer that stays silent, features or attention that are not finite.
    """
    settings = Settings(
        measures if isinstance(measures, str) else tuple(measures),
        layers,
        tokens,
        estimator,
        block,
        batch_size,
        device,
        precision,
        workers,
        progress,
    )
    if isinstance(models, Model):
        raise VitprobeError(f"models are a list: give [model] to compare '{models.name}' alone")
    return _Run(list(models), as_images(images, limit=limit, seed=seed), settings).result()


@dataclass
class _Run:
    models: list[Model]
    images: Images
    settings: Settings
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for model in self.models:
            if not isinstance(model, Model):
                raise VitprobeError(
                    f"cannot compare {type(model).__name__}: make a model of it with load or wrap"
                )
        names = [model.name for model in self.models]
        if not names:
            raise VitprobeError("no models to compare; give at least one")
        for name in names:
            if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
                raise VitprobeError(
                    f"a model cannot be named {name[:LONGEST_NAME]!r}: give a name of 1 to "
                    f"{LONGEST_NAME} printable characters"
                )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise VitprobeError(f"two models are named '{twice}'; give each its own name")
        for model in self.models:
            convention_of(model, self.settings.layers)
            if "cka" in self.settings.measures:
                self._note_layers(model)
                if self.settings.tokens == "cls" and model.anatomy.prefix_tokens == 0:
                    raise MeasureError(
                        f"model '{model.name}' has no class token; use tokens 'patches' or 'mean'"
                    )
        self.device = find_device(self.settings.device)
        self.features: list[Feature] = [
            (model.name, layer) for model in self.models for layer in feature_layers(model.anatomy)
        ]
        self.cka = CKA(len(self.features), self.settings.estimator)
        self.first_direction = FirstDirectionShare(len(self.features))
        self.attention = {
            model.name: [ATTENTION[name]() for name in self.settings.attention]
            for model in self.models
        }
        self.samples = {model.name: SampleMaps(model) for model in self.models}
        self.thumbnails = np.empty((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)

    def result(self) -> Comparison:
        views = {model.name: View(*model.input_size) for model in self.models}
        total = len(self.images) if self.images.names is not None else self.images.limit
        bar = tqdm(
            total=total,
            unit=" images",
            desc="comparing",
            disable=None if self.settings.progress else True,
        )
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.enter_context(exact_products())
            stack.enter_context(
                torch.autocast(
                    self.device.type,
                    dtype=torch.bfloat16,
                    enabled=self.settings.precision == "bf16",
                )
            )
            for model in self.models:
                stack.enter_context(placed(model.module, self.device))
            blocks = self.images.blocks(
                views.values(), self.settings.block, workers=self.settings.workers
            )
            for number, block in enumerate(blocks):
                self._block(number, block, views)
                bar.update(len(block.names))
        return self._assemble()

    def _block(self, number: int, block: Block, views: dict[str, View]) -> None:
        if "cka" in self.settings.measures:
            needed = MINIMUM_IMAGES[self.settings.estimator]
            if len(block.names) < needed:
                raise DataError(
                    f"'{self.images.source}' gives too few images that can be decoded, "
                    f"{len(block.names)}: {self.settings.estimator} CKA needs at least {needed}"
                )
        grams: list[Tensor] = []
        for model in self.models:
            found = self._forward(model, number, block, block.views[views[model.name]])
            grams += [found[layer] for layer in sorted(found)]
        if grams:
            stacked = torch.stack(grams)
            self.cka.update_grams(stacked)
            self.first_direction.update_grams(stacked)
        if len(self.thumbnails) < SAMPLES:
            self.thumbnails = np.concatenate([self.thumbnails, thumbnails(block)])[:SAMPLES]

    def _forward(
        self, model: Model, number: int, block: Block, pixels: Tensor
    ) -> dict[int, Tensor]:
        """One model over one block: Grams by layer, attention into its measures."""
        count = len(pixels)
        step = min(self.settings.batch_size or count, count)
        parts: dict[int, list[Tensor]] = {}
        grams: dict[int, Tensor] = {}

        def on_features(layer: int, tokens: Tensor) -> None:
            kept = select_tokens(tokens, model.anatomy.prefix_tokens, self.settings.tokens)
            if step == count:
                grams[layer] = gram(layer, kept)
            else:
                parts.setdefault(layer, []).append(kept.clone())

        def gram(layer: int, kept: Tensor) -> Tensor:
            result = centered_gram(kept)
            if not torch.isfinite(result).all():
                raise MeasureError(
                    f"model '{model.name}' gives NaN or infinite features in layer {layer}, block "
                    f"{number} of the images; check its weights with 'vitprobe inspect'"
                )
            return result

        def on_attention(chunk: AttentionChunk) -> None:
            for measure in self.attention[model.name]:
                try:
                    measure.update(chunk)
                except MeasureError as error:
                    raise MeasureError(
                        f"model '{model.name}', block {number} of the images: {error}; check its "
                        "weights with 'vitprobe inspect'"
                    ) from error
            self.samples[model.name].update(chunk)

        recorder = Recorder(
            model,
            convention=self.settings.layers,
            on_features=on_features if "cka" in self.settings.measures else None,
            on_attention=on_attention if self.settings.attention else None,
        )
        # A module of the user's own may keep what it computes, and could not train with inference
        # tensors later.
        grad_off = torch.no_grad() if model.spec == "module" else torch.inference_mode()
        with grad_off, recorder:
            for start in range(0, count, step):
                batch = pixels[start : start + step].to(self.device)
                recorder.run(batch, block.first + start)
            for layer in list(parts):
                grams[layer] = gram(layer, torch.cat(parts.pop(layer)))
        return grams

    def _assemble(self) -> Comparison:
        groups: dict[str, xr.Dataset] = {}
        if "cka" in self.settings.measures:
            value, error = self.cka.compute()
            sums = {
                name: getattr(self.cka, name).numpy()
                for name in ("products", "squares", "cross", "selves")
            }
            groups["similarity"] = similarity_dataset(
                self.features, value=value.numpy(), standard_error=error.numpy(), sums=sums
            )
            groups["tokens"] = tokens_dataset(
                self.features,
                first_direction_share=self.first_direction.compute().numpy(),
                first_direction_sums=self.first_direction.sums.numpy(),
            )
            self._note_constant(value)
        if self.settings.attention:
            groups["attention"] = self._attention_group()
            groups |= self._sample_groups()
        self._note_images()
        for model in self.models:
            self._note_assumed(model)
        return Comparison.assemble(groups, self._provenance())

    def _attention_group(self) -> xr.Dataset:
        units: list[Unit] = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.settings.attention}
        undefined: dict[str, list[np.ndarray]] = {name: [] for name in self.settings.attention}
        uniform: dict[str, list[float]] = {name: [] for name in self.settings.attention}
        for model in self.models:
            geometry = plain(model.anatomy)
            for measure in self.attention[model.name]:
                name = measure.info.name
                level = measure.uniform(geometry.query_xy, geometry.key_xy, geometry.key_prefix)
                layers = measure.compute()
                for layer, (mean, missing) in layers.items():
                    heads = mean.shape[1]
                    if measure is self.attention[model.name][0]:
                        units += [(model.name, layer, head) for head in range(heads)]
                    values[name].append(mean)
                    undefined[name].append(missing)
                    uniform[name] += [math.nan if level is None else level] * heads
                self._note_undefined(model, measure, layers)
        return attention_dataset(
            units,
            self.images.used,
            values={name: np.concatenate(parts, axis=1) for name, parts in values.items()},
            undefined_rows={
                name: np.concatenate(parts, axis=1) for name, parts in undefined.items()
            },
            uniform={
                name: np.asarray(levels)
                for name, levels in uniform.items()
                if not np.isnan(levels).all()
            },
            info={name: (MEASURES[name].title, MEASURES[name].unit) for name in values},
        )

    def _sample_groups(self) -> dict[str, xr.Dataset]:
        thumbnail = (("sample", "row", "column", "channel"), self.thumbnails)
        names = {"name": ("sample", self.images.used[:SAMPLES])}
        groups = {"samples": xr.Dataset({"thumbnail": thumbnail}, coords=names)}
        for index, model in enumerate(self.models):
            groups[f"samples/{index}"] = self.samples[model.name].dataset()
        return groups

    def _note_constant(self, value: Tensor) -> None:
        for (model, layer), own in zip(self.features, value.diagonal().tolist(), strict=True):
            if math.isnan(own):
                self.notes.append(
                    f"{model}, layer {layer}: constant over the images under tokens "
                    f"'{self.settings.tokens}', so its CKA is undefined."
                )

    def _note_assumed(self, model: Model) -> None:
        assumed = model.describe()["assumed"]
        if "heads" in assumed:
            self.notes.append(
                f"{model.name}: {model.facts['heads'].value} heads assumed, which nothing in the "
                "file says and which changes every result; give heads=N to state them."
            )
        others = [f"{name} {model.facts[name].value}" for name in assumed if name != "heads"]
        if others:
            self.notes.append(f"{model.name}: assumed, not read anywhere: {', '.join(others)}.")

    def _note_layers(self, model: Model) -> None:
        anatomy = model.anatomy
        followed = convention_of(model, self.settings.layers)
        if followed != self.settings.layers:
            self.notes.append(
                f"{model.name}: no norm before its attention, so its layers are residual ones."
            )
        elif followed == "normed" and anatomy.final_norm is None:
            self.notes.append(
                f"{model.name}: no final norm, so its layer {len(anatomy.blocks)} is what the last "
                "block writes."
            )

    def _note_undefined(
        self, model: Model, measure: AttentionMeasure, layers: dict[int, Any]
    ) -> None:
        rows = sum(int(missing.sum()) for _, missing in layers.values())
        if rows:
            self.notes.append(
                f"{model.name}: {rows} attention rows had no mass on patches and are left out of "
                f"{measure.info.title.lower()}."
            )

    def _note_images(self) -> None:
        lost = self.images.undecodable
        if lost:
            named = ", ".join(lost[:5]) + (" …" if len(lost) > 5 else "")
            count = f"{len(lost)} image" + ("s" if len(lost) > 1 else "")
            place = (
                "" if self.images.limit is None else ", and the next of the order took its place"
            )
            self.notes.append(f"{count} could not be decoded{place}: {named}.")
        limit = self.images.limit
        if limit is not None and len(self.images.used) < limit:
            self.notes.append(
                f"{limit} images were asked for and {len(self.images.used)} could be had."
            )
        if self.settings.estimator == "biased" and self.cka.blocks > 1:
            self.notes.append(
                f"Biased CKA was summed over {self.cka.blocks} blocks and so depends on the block "
                "size; it is exact only with one block."
            )
        if self.images.seed is None:
            self.notes.append(
                "The images were taken in the order their source gives; CKA over blocks is biased "
                "where that order is by class."
            )
        for model in self.models:
            dtype = next((p.dtype for p in model.module.parameters()), torch.float32)
            if dtype != torch.float32:
                self.notes.append(f"{model.name}: its weights are {dtype}, and so it was run.")
            height, width = model.input_size[1:]
            if height != width:
                self.notes.append(
                    f"{model.name}: its input is {height} x {width}, so the square images are "
                    "stretched."
                )

    def _provenance(self) -> dict[str, Any]:
        settings = self.settings
        cka = ("cka",) if "cka" in settings.measures else ()
        return {
            **provenance.collect(),
            "models": [model.describe() for model in self.models],
            "measures": [*cka, *settings.attention],
            "layers": settings.layers,
            "tokens": settings.tokens,
            "estimator": settings.estimator,
            "block": settings.block,
            "blocks": self.cka.blocks if "cka" in settings.measures else None,
            "batch_size": settings.batch_size,
            "device": str(self.device),
            "precision": settings.precision,
            "seed": self.images.seed,
            "preprocessing": "centre square; bicubic, antialiased; each model's own mean and std",
            "images": {
                "source": self.images.source,
                "count": len(self.images.used),
                "limit": self.images.limit,
                "order": "as given" if self.images.seed is None else "permuted by the seed",
                "sha256": self.images.sha256,
                "undecodable": list(self.images.undecodable),
            },
            "notes": self.notes,
        }
