"""The one loop: every image through every model once, every measure on the way.

Layers are reduced to Gram matrices and per-image numbers as they arrive, attention to per-image
sums; nothing else is kept of an image, so memory does not grow with their number, but for a few
numbers an image, one vector an image and layer for RankMe, and the features of the first
`max_images` where a measure needs them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe import provenance
from vitprobe.capture import Recorder
from vitprobe.capture.features import Convention, convention_of, feature_layouts
from vitprobe.data.images import Block, Images, View
from vitprobe.data.images import images as as_images
from vitprobe.devices import exact_products, find_device, placed
from vitprobe.errors import DataError, MeasureError, VitprobeError, suggest
from vitprobe.gather import Attention, Similarities, Tokens, check_finite, kept_numbers
from vitprobe.measures.attention import AttentionChunk
from vitprobe.measures.base import Group
from vitprobe.measures.cka import MINIMUM_IMAGES, Estimator
from vitprobe.measures.registry import MEASURES, SUBSET
from vitprobe.measures.tokens import TokenPolicy
from vitprobe.models import Model
from vitprobe.models.anatomy import Layout
from vitprobe.models.untrained import is_untrained, same_architecture, untrained
from vitprobe.results import COMPANION, Comparison
from vitprobe.samples import SAMPLES, THUMBNAIL, SampleMaps, thumbnails
from vitprobe.sites import described
from vitprobe.wording import layers_in_words

DEFAULT_MEASURES: Final = ("cka", "attention_distance", "attention_entropy")
ALL: Final = "all"
KNOWN: Final = tuple(name for name in MEASURES if name != COMPANION)

LONGEST_NAME: Final = 100
UNTRAINED: Final = " (untrained)"
SHARED_TWIN: Final = "Untrained twin"

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
    max_images: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.measures, str):
            raise MeasureError(f"measures are a list of names: give ['{self.measures}']")
        for name in self.measures:
            if name not in (*KNOWN, ALL):
                raise MeasureError(
                    f"unknown measure '{name}'.{suggest(name, KNOWN)} Use some of "
                    f"{' '.join(KNOWN)}, or {ALL}."
                )
        if not self.measures:
            raise MeasureError(f"no measure asked for: use some of {', '.join(KNOWN)}, or {ALL}")
        if self.tokens not in get_args(TokenPolicy):
            raise MeasureError(
                f"unknown tokens '{self.tokens}': use one of {', '.join(get_args(TokenPolicy))}"
            )
        if self.max_images < 4:
            raise MeasureError(f"max_images of {self.max_images} is too few; give 4 or more")
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
    def similarity(self) -> tuple[str, ...]:
        """Measures of two layers."""
        return self._of("similarity")

    @property
    def attention(self) -> tuple[str, ...]:
        """Attention measures; sink mass always goes with them, since renormalising hides it."""
        asked = self._of("attention")
        return tuple(dict.fromkeys([*asked, "sink_mass"])) if asked else ()

    @property
    def required(self) -> tuple[str, ...]:
        """Attention measures that some model must give: those asked for by name."""
        if ALL in self.measures or tuple(self.measures) == DEFAULT_MEASURES:
            return ()
        return self._of("attention")

    @property
    def layer_tokens(self) -> tuple[str, ...]:
        """Measures of the tokens of a layer."""
        return self._of("tokens")

    @property
    def features(self) -> bool:
        """Whether anything is asked of layers."""
        return bool(self.similarity or self.layer_tokens)

    def _of(self, group: Group) -> tuple[str, ...]:
        asked = KNOWN if ALL in self.measures else dict.fromkeys(self.measures)
        return tuple(name for name in asked if MEASURES[name].group == group)


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
    max_images: int = 256,
    random_reference: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Compare models on the same images, in one pass.

    Models may differ in depth, width, patch, input size and normalisation. Similarity compares
    every layer of every model with every other; one model alone is compared with itself.

    Args:
        models: from `load` or `wrap`, with different names.
        images: whatever `vitprobe.images` takes.
        measures: names from `vitprobe.measures.MEASURES`, or `["all"]`; attention measures bring
            sink mass with them, CKA the first-direction share. What a model cannot give is left out
            and noted with its reason, as all attention of a convolutional network is.
        layers: `normed` (what each block's attention reads, and the final norm) or `residual`.
        tokens: what of a layer is compared: `patches`, `cls`, `mean` or `all`. Linear CKA of `cls`
            and `mean` is exact over all images; any other belongs to the block size.
        estimator: of HSIC in CKA; summed over blocks, `biased` is exact only with one block.
        block: images over which similarity is computed before it is summed; recorded.
        batch_size: images in one forward pass, at most and by default a block.
        device: `auto` (CUDA or MPS where there is one), or a torch device.
        precision: `fp32` (TF32 and autocast off) or `bf16` autocast.
        limit: take the first so many images of the seeded permutation.
        seed: of the permutation, 0 unless given.
        workers: threads that decode images ahead.
        progress: show a progress bar on stderr where that is a terminal.
        max_images: on how many of the first images measures are computed that need all their
            images together; their features are kept in memory until the end.
        random_reference: add to every model that was trained a twin of the same architecture with
            random weights, "NAME (untrained)"; models that differ in weights alone share one,
            "Untrained twin".
        groups: names of models that are seeds of one method, by the method's name.

    Returns:
        The Comparison.

    Raises:
        VitprobeError: models that share a name, images too few or undecodable, an unknown measure,
            an attention measure asked for by name (and not by default or as "all") that no model
            can give, a layer that stays silent, features or attention that are not finite, a group
            of models that are not there.
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
        max_images,
    )
    if isinstance(models, Model):
        raise VitprobeError(f"models are a list: give [model] to compare '{models.name}' alone")
    run = _Run(
        list(models),
        as_images(images, limit=limit, seed=seed),
        settings,
        {name: list(members) for name, members in (groups or {}).items()},
        random_reference,
    )
    return run.result()


def subset_bytes(models: Sequence[Model], settings: Settings, images: int) -> int:
    """Memory that the features of the subset measures will take, 0 where there are none."""
    if not any(name in SUBSET for name in settings.similarity):
        return 0
    numbers = (
        kept_numbers(layout, settings.tokens)
        for model in models
        for layout in feature_layouts(model, settings.layers)
    )
    return 4 * min(images, settings.max_images) * sum(numbers)


@dataclass
class _Run:
    models: list[Model]
    images: Images
    settings: Settings
    groups: dict[str, list[str]]
    random_reference: bool
    notes: list[str] = field(default_factory=list)
    references: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model in self.models:
            if not isinstance(model, Model):
                raise VitprobeError(
                    f"cannot compare {type(model).__name__}: make a model of it with load or wrap"
                )
        check_groups(self.groups, [model.name for model in self.models])
        self._check_seeds()
        if self.random_reference:
            self._add_references()
        self._check_names()
        settings = self.settings
        self.layouts = {m.name: feature_layouts(m, settings.layers) for m in self.models}
        for model in self.models:
            if settings.features:
                self._note_layers(model)
                self._check_class_token(model)
        self.device = find_device(settings.device)
        self.similarities = Similarities(
            self.layouts,
            settings.similarity,
            settings.tokens,
            settings.estimator,
            settings.max_images,
        )
        self.tokens = Tokens(self.layouts, settings.layer_tokens, settings.tokens)
        self.attention = Attention(self.models, settings.attention, settings.required)
        if not (settings.features or self.attention.measures):
            raise MeasureError(
                "no model here has attention, and nothing else was asked for; give other measures, "
                "such as cka"
            )
        self.grams_alone = self.similarities.subset is None and not settings.layer_tokens
        self.samples = {model.name: SampleMaps(model) for model in self.models}
        self.thumbnails = np.empty((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)

    def _check_class_token(self, model: Model) -> None:
        if self.settings.tokens != "cls":
            return
        layers = self.layouts[model.name]
        without = [i for i, layout in enumerate(layers) if layout.prefix_tokens == 0]
        if not model.anatomy.class_token or without:
            where = f" in {layers_in_words(without)}" if 0 < len(without) < len(layers) else ""
            raise MeasureError(
                f"model '{model.name}' has no class token{where}; use tokens 'patches' or 'mean'"
            )

    def _check_seeds(self) -> None:
        by_name = {model.name: model for model in self.models}
        for group, members in self.groups.items():
            for a, b in combinations([by_name[name] for name in members], 2):
                if _same_weights(a, b):
                    raise VitprobeError(
                        f"'{a.name}' and '{b.name}' of group '{group}' have the same weights: "
                        "give each seed once"
                    )

    def _check_names(self) -> None:
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

    def _add_references(self) -> None:
        """An untrained twin for every trained model, one for all that differ in weights alone."""
        alike: list[list[Model]] = []
        for model in self.models:
            if is_untrained(model):
                continue
            part = next((part for part in alike if same_architecture(part[0], model)), None)
            if part is None:
                alike.append([model])
            else:
                part.append(model)
        shared = 0
        for part in alike:
            name = part[0].name[: LONGEST_NAME - len(UNTRAINED)] + UNTRAINED
            if len(part) > 1:
                shared += 1
                name = SHARED_TWIN if shared == 1 else f"{SHARED_TWIN} {shared}"
            try:
                twin = untrained(part[0], name)
            except VitprobeError as error:
                reason = str(error).rstrip(".")
                self.notes += [f"{m.name} has no untrained twin: {reason}." for m in part]
                continue
            self.models = [*self.models, twin]
            self.references |= {model.name: twin.name for model in part}

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
        needed = MINIMUM_IMAGES[self.settings.estimator]
        if self.similarities.streaming and len(block.names) < needed:
            raise DataError(
                f"'{self.images.source}' gives too few images that can be decoded, "
                f"{len(block.names)}: {self.settings.estimator} CKA needs at least {needed}"
            )
        for model in self.models:
            try:
                self._forward(model, block, block.views[views[model.name]])
            except MeasureError as error:
                raise MeasureError(
                    f"model '{model.name}', block {number} of the images: {error}; check its "
                    "weights with 'vitprobe inspect'"
                ) from error
        self.similarities.end_block(block.first)
        if len(self.thumbnails) < SAMPLES:
            self.thumbnails = np.concatenate([self.thumbnails, thumbnails(block)])[:SAMPLES]

    def _forward(self, model: Model, block: Block, pixels: Tensor) -> None:
        """One model over one block: features and attention into what gathers them."""
        count = len(pixels)
        step = min(self.settings.batch_size or count, count)
        start = 0

        def on_features(layer: int, tokens: Tensor) -> None:
            first, left = block.first + start, count - start - len(tokens)
            # Under a caller's autocast matrix products alone would fall to half precision.
            with torch.autocast(self.device.type, enabled=False):
                tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
                if not self.grams_alone:  # a Gram is smaller, and checked in any case
                    check_finite(tokens, layer)
                if self.settings.similarity:
                    self.similarities.update(model.name, layer, first, tokens, left)
                if self.settings.layer_tokens:
                    self.tokens.update(model.name, layer, first, tokens)

        def on_attention(chunk: AttentionChunk) -> None:
            self.attention.update(model.name, chunk)
            self.samples[model.name].update(chunk)

        attends = bool(self.attention.measures and model.anatomy.sites)
        if not (self.settings.features or attends):
            return
        recorder = Recorder(
            model,
            convention=self.settings.layers,
            on_features=on_features if self.settings.features else None,
            on_attention=on_attention if attends else None,
        )
        # A module of the user's own may keep what it computes, and could not train with inference
        # tensors later.
        grad_off = torch.no_grad() if model.spec == "module" else torch.inference_mode()
        with grad_off, recorder:
            for start in range(0, count, step):
                batch = pixels[start : start + step].to(self.device)
                recorder.run(batch, block.first + start)

    def _assemble(self) -> Comparison:
        groups: dict[str, xr.Dataset] = {}
        names = self.images.used
        if self.settings.similarity:
            groups["similarity"] = self.similarities.dataset(len(names), self.notes)
        if self.settings.layer_tokens or self.similarities.first_direction is not None:
            groups["tokens"] = self.tokens.dataset(
                names, self.similarities.first_direction, self.notes
            )
        if self.attention.measures:
            groups["attention"] = self.attention.dataset(names, self.notes)
            groups |= self._sample_groups()
        self.attention.note(self.notes)
        self._note_images()
        self._note_groups()
        for model in self.models:
            self._note_assumed(model)
        return Comparison.assemble(groups, self._provenance())

    def _sample_groups(self) -> dict[str, xr.Dataset]:
        thumbnail = (("sample", "row", "column", "channel"), self.thumbnails)
        names = {"name": ("sample", self.images.used[:SAMPLES])}
        groups = {"samples": xr.Dataset({"thumbnail": thumbnail}, coords=names)}
        for index, model in enumerate(self.models):
            if (maps := self.samples[model.name].dataset()) is not None:
                groups[f"samples/{index}"] = maps
        return groups

    def _note_groups(self) -> None:
        for name, members in self.groups.items():
            if len(members) == 1:
                self.notes.append(
                    f"Group {name} has one seed, so nothing is known of how its seeds differ: it "
                    "has no interval over seeds."
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
            which = "its attention" if anatomy.sites else "its blocks"
            self.notes.append(
                f"{model.name}: no norm before {which}, so its layers are residual ones."
            )
        elif followed == "normed" and anatomy.final_norm is None:
            self.notes.append(
                f"{model.name}: no final norm, so its layer {len(anatomy.blocks)} is what the last "
                "block writes."
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
        blocks = self.similarities.blocks
        exact = self.similarities.cka_value == "exact" and "cka_rbf" not in self.settings.similarity
        if self.settings.estimator == "biased" and blocks is not None and blocks > 1 and not exact:
            self.notes.append(
                f"Biased CKA was summed over {blocks} blocks and so depends on the block size; it "
                "is exact only with one block."
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
        return {
            **provenance.collect(),
            "models": [model.describe() | self._described(model) for model in self.models],
            "measures": [*settings.similarity, *self.attention.measures, *settings.layer_tokens],
            "groups": self.groups,
            "references": self.references,
            "layers": settings.layers,
            "tokens": settings.tokens,
            "estimator": settings.estimator,
            "cka_value": self.similarities.cka_value,
            "max_images": settings.max_images,
            "block": settings.block,
            "blocks": self.similarities.blocks,
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

    def _described(self, model: Model) -> dict[str, Any]:
        """What this comparison took of a model, and what it could not."""
        return {
            "layers": convention_of(model, self.settings.layers),
            "layouts": [_layout(layout) for layout in self.layouts[model.name]],
            "attention": described(model),
            "no_attention": model.anatomy.no_attention,
            "refused": [asdict(part) for part in self.attention.refused[model.name]],
        }


def _layout(layout: Layout) -> dict[str, Any]:
    """What of a layer's tokens a result records."""
    names = ("width", "prefix_tokens", "patches", "grid", "patch_size")
    return {name: getattr(layout, name) for name in names}


def _same_weights(a: Model, b: Model) -> bool:
    first, second = (list(model.module.parameters()) for model in (a, b))
    return len(first) == len(second) and all(
        x.shape == y.shape and torch.equal(x, y.to(x)) for x, y in zip(first, second, strict=True)
    )


def check_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    """Raise VitprobeError for a group without models, of unknown ones, or of one that is taken."""
    owner: dict[str, str] = {}
    for group, members in groups.items():
        if not members:
            raise VitprobeError(f"group '{group}' has no models; name those that are its seeds")
        if group in names:
            raise VitprobeError(f"a model and a group are both named '{group}'; rename one")
        for name in members:
            if name not in names:
                raise VitprobeError(
                    f"group '{group}' names '{name}', which is no model of this comparison."
                    f"{suggest(name, names)}"
                )
            if name in owner:
                raise VitprobeError(
                    f"model '{name}' is in group '{owner[name]}' already; a seed counts once"
                )
            owner[name] = group
