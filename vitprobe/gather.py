"""What a comparison gathers while images go by, one class for each group of its result.

Each adds what the models gave for one block after another, merges with that of another part of the
run, turns its sums into a dataset at the end, and says in notes what a reader must know of numbers
that are undefined.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitprobe.capture.features import feature_layouts
from vitprobe.datasets import (
    Feature,
    FourierArrays,
    LayerArrays,
    SimilarityArrays,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)
from vitprobe.errors import MeasureError
from vitprobe.measures.attention import AttentionMeasure, PerImage
from vitprobe.measures.cka import CKA, CKARBF, Estimator, SimilarityResult
from vitprobe.measures.exact_cka import ExactCKA
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.registry import ATTENTION, MEASURES, PER_BLOCK, SUBSET, TOKENS
from vitprobe.measures.subset import Subset, SubsetMeasure
from vitprobe.measures.tokens import (
    FourierAmplitude,
    RankMe,
    TokenPolicy,
    fourier_log_amplitude,
)
from vitprobe.model_block import POOLED, ModelBlock
from vitprobe.models.anatomy import Layout
from vitprobe.models.model import Subject
from vitprobe.samples import Samples
from vitprobe.settings import Settings
from vitprobe.sites import UniformLevels, in_words, open_layers, refusals, remarks
from vitprobe.wording import join, layers_in_words

Layouts = Mapping[str, Sequence[Layout]]
"""How the tokens of every layer lie, by model."""

EXACT_BYTES = 1 << 32
"""Most bytes of feature-space sums; beyond it CKA of pooled tokens is the blocked estimate."""


def features_of(layouts: Layouts) -> list[Feature]:
    """(model, layer) of every feature, in the order of rows and columns."""
    return [(name, layer) for name, layers in layouts.items() for layer in range(len(layers))]


def kept_numbers(layout: Layout, tokens: TokenPolicy) -> int:
    """How many numbers of an image a layer has under a token policy."""
    counts = {"patches": layout.patches, "all": layout.patches + layout.prefix_tokens}
    return counts.get(tokens, 1) * layout.width


class Similarities:
    """Similarity of every two layers of all models."""

    def __init__(self, layouts: Layouts, settings: Settings, device: torch.device) -> None:
        self.layouts = layouts
        self.features = features_of(layouts)
        self.measures = settings.similarity
        self.tokens: TokenPolicy = settings.tokens
        self.max_images = settings.max_images
        self.device = device
        count, estimator = len(self.features), settings.estimator
        self.cka = CKA(count, estimator) if "cka" in self.measures else None
        self.rbf = CKARBF(count, estimator) if "cka_rbf" in self.measures else None
        self.first_direction = FirstDirectionShare(count) if self.cka else None
        self.exact = self._exact(layouts, estimator) if self._wants_exact else None
        asked = layouts if any(name in SUBSET for name in self.measures) else {}
        self.subsets = {
            model: Subset(len(layers), settings.max_images) for model, layers in asked.items()
        }

    @property
    def _wants_exact(self) -> bool:
        return self.tokens in POOLED and self.cka is not None

    @staticmethod
    def _exact(layouts: Layouts, estimator: Estimator) -> ExactCKA | None:
        widths = [layout.width for layers in layouts.values() for layout in layers]
        return ExactCKA(widths, estimator) if ExactCKA.state_bytes(widths) <= EXACT_BYTES else None

    @property
    def streaming(self) -> bool:
        """Whether blocks of Gram matrices are wanted."""
        return self.cka is not None or self.rbf is not None

    @property
    def blocks(self) -> int | None:
        """Blocks of images summed over; None where no measure sums over blocks."""
        streamed = self.cka or self.rbf
        return None if streamed is None else streamed.blocks

    @property
    def cka_value(self) -> str | None:
        """How the value of CKA was come by: `exact` over all images, or `blocked`."""
        if self.cka is None:
            return None
        return "blocked" if self.exact is None else "exact"

    def add(self, first: int, parts: Mapping[str, ModelBlock]) -> None:
        """Add what the models gave for the block that begins with image `first`."""
        for model, subset in self.subsets.items():
            for layer, features in enumerate(parts[model].subset):
                subset.update(layer, first, features)
            parts[model].subset.clear()
        if not self.streaming:
            return
        grams = torch.cat([parts[model].grams.to(self.device) for model in self.layouts])
        if self.cka is not None and self.first_direction is not None:
            self.cka.update_grams(grams, first)
            self.first_direction.update_grams(grams)
        if self.rbf is not None:
            self.rbf.update_grams(grams, first)
        if self.exact is not None:
            self.exact.update([x for model in self.layouts for x in parts[model].vectors])

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the run."""
        for name in ("cka", "first_direction", "rbf", "exact"):
            if (ours := getattr(self, name)) is not None:
                ours.merge(getattr(other, name))
        for model, subset in self.subsets.items():
            subset.merge(other.subsets[model])

    def dataset(self, images: int, notes: list[str]) -> xr.Dataset:
        """The `similarity` group."""
        arrays = {}
        subset = Subset.beside(list(self.subsets.values())) if self.subsets else None
        for name in self.measures:
            streamed = {"cka": self.cka, "cka_rbf": self.rbf}.get(name)
            if subset is not None and name in SUBSET:
                found = self._on_subset(SUBSET[name](subset), notes)
                seen = min(images, self.max_images)
            elif streamed is not None:
                exact = self.exact.compute() if name == "cka" and self.exact else None
                found, seen = streamed.compute(exact), images
                self._note_constant(streamed, found.value, notes)
            value, error, floor = (array.numpy() for array in found[:3])
            arrays[name] = SimilarityArrays(value, error, floor, found.degrees, seen)
        if self._wants_exact and self.exact is None:
            notes.append(
                "CKA is the estimate over blocks: the sums of its exact value would take more than "
                f"{EXACT_BYTES >> 20} MB."
            )
        sums = {}
        if self.cka is not None:
            sums = _sums(self.cka) | {"pairs": np.asarray(self.cka.pairs)}
        return similarity_dataset(self.features, measures=arrays, sums=sums)

    def _on_subset(self, measure: SubsetMeasure, notes: list[str]) -> SimilarityResult:
        found = measure.compute()
        by_model: dict[str, list[tuple[int, str]]] = {}
        for index, reason in sorted(measure.reasons.items()):
            model, layer = self.features[index]
            by_model.setdefault(model, []).append((layer, reason))
        for model, layers in by_model.items():
            which = layers_in_words(layer for layer, _ in layers)
            notes.append(
                f"{model}: {measure.info.title} is undefined in pairs of {which}; layer "
                f"{layers[0][0]} {layers[0][1]}."
            )
        return found

    def _note_constant(self, measure: CKA, value: Tensor, notes: list[str]) -> None:
        for i, (model, layer) in enumerate(self.features):
            if math.isnan(value[i, i]):
                reason = measure.reasons.get(i, "constant over the images")
                notes.append(
                    f"{model}, layer {layer}: {reason}, under tokens '{self.tokens}', so its "
                    f"{measure.info.title} is undefined."
                )


class Tokens:
    """Numbers of the tokens of every layer of all models."""

    def __init__(self, layouts: Layouts, measures: Sequence[str]) -> None:
        self.features = features_of(layouts)
        self.layouts = layouts
        self._index = {feature: i for i, feature in enumerate(self.features)}
        self.per_image = {
            model: {name: TOKENS[name]() for name in measures if name in TOKENS}
            for model in layouts
        }
        asked = layouts if "rankme" in measures else {}
        self.rankme = {model: RankMe(len(layers)) for model, layers in asked.items()}

    def add(self, parts: Mapping[str, ModelBlock]) -> None:
        """Add what the models gave for a block."""
        for model, measures in self.per_image.items():
            for name, measure in measures.items():
                measure.merge(parts[model].tokens[name])
        for model, rankme in self.rankme.items():
            if (found := parts[model].rankme) is not None:
                rankme.merge(found)

    def merge(self, other: Self) -> None:
        """Add the numbers of another part of the run."""
        for model, measures in self.per_image.items():
            for name, measure in measures.items():
                measure.merge(other.per_image[model][name])
        for model, rankme in self.rankme.items():
            rankme.merge(other.rankme[model])

    def dataset(
        self,
        images: Sequence[str],
        first_direction: FirstDirectionShare | None,
        notes: list[str],
    ) -> xr.Dataset:
        """The `tokens` group."""
        per_layer, sums = {}, {}
        if first_direction is not None:
            share, spread = first_direction.compute(), first_direction.standard_error()
            per_layer["first_direction_share"] = LayerArrays(
                share.numpy(), spread.numpy(), first_direction.degrees
            )
            sums = _sums(first_direction)
        if self.rankme:
            found = [rankme.compute() for rankme in self.rankme.values()]
            value, error = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
            per_layer["rankme"] = LayerArrays(value, error, RankMe.degrees)
            self._note_undefined("rankme", value[None], notes)
        per_image: dict[str, list[np.ndarray]] = {}
        for by_name in self.per_image.values():
            for name, measure in by_name.items():
                per_image.setdefault(name, []).extend(measure.compute().values())
        joined = {name: np.stack(parts, axis=1) for name, parts in per_image.items()}
        for name, values in joined.items():
            self._note_undefined(name, values, notes)
        return tokens_dataset(
            self.features,
            images,
            per_image=joined,
            per_layer=per_layer,
            first_direction_sums=sums.get("sums"),
            first_direction_squares=sums.get("squares"),
            fourier=self._fourier() if "fourier_amplitude" in joined else None,
        )

    def _fourier(self) -> FourierArrays:
        curves: dict[Feature, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for model, measures in self.per_image.items():
            measure = measures["fourier_amplitude"]
            if isinstance(measure, FourierAmplitude):
                curves |= {(model, layer): c for layer, c in measure.curves().items()}
        # A grid that is not square has no curve.
        steps = max((len(frequency) for frequency, _, _ in curves.values()), default=0)
        tables = np.full((3, len(self.features), steps), np.nan)
        for feature, curve in curves.items():
            tables[:, self._index[feature], : len(curve[0])] = curve
        frequency, value, error = tables
        return FourierArrays(frequency, value, error)

    def _note_undefined(self, name: str, values: np.ndarray, notes: list[str]) -> None:
        """values: (images, features), or (1, features) of all images together."""
        for model, layouts in self.layouts.items():
            own = [i for i, (owner, _) in enumerate(self.features) if owner == model]
            missing = np.isnan(values[:, own])
            layers: dict[str, list[int]] = {}
            for layer in map(int, np.flatnonzero(missing.any(0))):
                why = _no_curve(layouts[layer].grid) if name == "fourier_amplitude" else ""
                layers.setdefault(why, []).append(layer)
            for why, found in layers.items():
                which = layers_in_words(found)
                if len(values) > 1:
                    lost = int(missing[:, found].any(1).sum())
                    which += f" in {lost} of {len(values)} images"
                notes.append(f"{model}: {MEASURES[name].title} is undefined for {which}{why}.")


class Attention:
    """Attention of every head of all models.

    Args:
        models: those without attention have no numbers here.
        measures: names; of each a model gives what its attention layers allow.
        asked: those of them that at least one model must give.

    Raises:
        MeasureError: a measure asked for that no model can give.
    """

    def __init__(
        self, models: Sequence[Subject], measures: Sequence[str], asked: Collection[str]
    ) -> None:
        self.refused = {model.name: refusals(model.anatomy, measures) for model in models}
        self.anatomies = {model.name: model.anatomy for model in models if model.anatomy.sites}
        given = [open_layers(anatomy, measures) for anatomy in self.anatomies.values()]
        self.measures = [name for name in measures if any(layers[name] for layers in given)]
        self._check(asked)
        self.by_model = {
            model: {name: ATTENTION[name]() for name in self.measures} for model in self.anatomies
        }

    def _check(self, asked: Collection[str]) -> None:
        missing = [name for name in asked if name not in self.measures]
        if missing:
            reasons = [
                f"{model} has {in_words([part for part in found if missing[0] in part.measures])}"
                for model, found in self.refused.items()
            ]
            raise MeasureError(
                f"no model here can give '{missing[0]}': {'; '.join(reasons)}. Leave "
                f"{join([repr(name) for name in missing])} out of the measures"
            )

    def add(self, parts: Mapping[str, ModelBlock]) -> None:
        """Add what the models gave for a block."""
        for model, measures in self.by_model.items():
            for name, found in parts[model].attention.items():
                measures[name].merge(found)

    def merge(self, other: Self) -> None:
        """Add the numbers of another part of the run."""
        for model, measures in self.by_model.items():
            for name, measure in measures.items():
                measure.merge(other.by_model[model][name])

    def dataset(self, images: Sequence[str], notes: list[str]) -> xr.Dataset:
        """The `attention` group."""
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        undefined: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        uniform: dict[str, list[float]] = {name: [] for name in self.measures}
        level = UniformLevels()
        for model, anatomy in self.anatomies.items():
            for name, measure in self.by_model[model].items():
                layers = measure.compute()
                for layer, site in enumerate(anatomy.sites):
                    columns = 1 if name in PER_BLOCK else site.heads
                    found = layers.get(layer, _nothing(len(images), columns))
                    values[name].append(found.mean)
                    undefined[name].append(found.undefined_rows)
                    uniform[name] += [level(name, site) if layer in layers else math.nan] * columns
                if layers:
                    _note_rows(model, measure, layers.values(), notes)
        sites = [
            (model, layer, site)
            for model, anatomy in self.anatomies.items()
            for layer, site in enumerate(anatomy.sites)
        ]
        return attention_dataset(
            [(name, layer, head) for name, layer, site in sites for head in range(site.heads)],
            images,
            values=_joined(values),
            undefined_rows=_joined(undefined),
            uniform={
                name: np.asarray(levels)
                for name, levels in uniform.items()
                if not np.isnan(levels).all()
            },
            blocks=[(name, layer) for name, layer, _ in sites],
        )

    def note(self, notes: list[str]) -> None:
        """What was refused, and what attention layers are that are not over patches."""
        for name, found in self.refused.items():
            if found:
                notes.append(f"{name}: {in_words(found)}.")
        for name, anatomy in self.anatomies.items():
            notes += [f"{name}, {text}" for text in remarks(anatomy)]


class Gathered:
    """All that images add to, of all models. Holds no model, and merges exactly."""

    def __init__(self, models: Sequence[Subject], settings: Settings, device: torch.device) -> None:
        layouts = {model.name: feature_layouts(model, settings.layers) for model in models}
        self.similarities = Similarities(layouts, settings, device)
        self.tokens = Tokens(layouts, settings.layer_tokens)
        self.attention = Attention(models, settings.attention, settings.required)
        self.samples = Samples(models)
        self.halved: dict[str, tuple[int, int]] = {}
        """Images in a forward pass at first, and in the end, of models that ran out of memory."""

    def add(self, first: int, parts: Mapping[str, ModelBlock]) -> None:
        """Add what all models gave for the block that begins with image `first`."""
        self.similarities.add(first, parts)
        self.tokens.add(parts)
        self.attention.add(parts)
        self.samples.add(first, parts)
        self._add_halved({n: part.halved for n, part in parts.items() if part.halved is not None})

    def merge(self, other: Self) -> None:
        """Add another part of the same run.

        Raises:
            MeasureError: an image that both parts have seen.
        """
        self.similarities.merge(other.similarities)
        self.tokens.merge(other.tokens)
        self.attention.merge(other.attention)
        self.samples.merge(other.samples)
        self._add_halved(other.halved)

    def _add_halved(self, halved: Mapping[str, tuple[int, int]]) -> None:
        for name, (before, after) in halved.items():
            known = self.halved.get(name, (before, after))
            self.halved[name] = (max(known[0], before), min(known[1], after))

    def note(self, notes: list[str]) -> None:
        """Say where the device had too little memory."""
        for name, (before, after) in self.halved.items():
            notes.append(
                f"{name}: the device ran out of memory with {before} images in a forward pass, so "
                f"it was given {after} at a time; blocks are unchanged."
            )


def _nothing(images: int, columns: int) -> PerImage:
    """The numbers of an attention layer that has none."""
    shape = (images, columns)
    return PerImage(np.full(shape, np.nan, np.float32), np.zeros(shape, np.int32))


def _no_curve(grid: tuple[int, int] | None) -> str:
    """Why a grid has no Fourier curve, as the end of a sentence; empty where it has one."""
    if grid is None:
        return ": where its patches lie in the image is not known"
    try:
        fourier_log_amplitude(torch.zeros(1, math.prod(grid), 1), grid=grid)
    except MeasureError as error:
        return f": {error}"
    return ""


def _sums(measure: CKA | FirstDirectionShare) -> dict[str, np.ndarray]:
    return {
        name: state.numpy() for name, state in vars(measure).items() if isinstance(state, Tensor)
    }


def _joined(parts: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}


def _note_rows(
    model: str, measure: AttentionMeasure, layers: Iterable[PerImage], notes: list[str]
) -> None:
    means, missing = zip(*layers, strict=True)
    rows = sum(int(counts.sum()) for counts in missing)
    if rows and measure.needs == "rows":
        notes.append(
            f"{model}: {rows} attention rows had no mass on patches and are left out of "
            f"{measure.info.title.lower()}."
        )
    elif rows and measure.needs == "heads":
        notes.append(
            f"{model}: {rows} attention rows have no {measure.info.title}, infinite or of a "
            "head alone in its block, and are left out of it."
        )
    undefined = sum(int(np.isnan(mean).sum()) for mean in means)
    if undefined:
        what = "blocks" if measure.per_block else "heads"
        notes.append(
            f"{model}: {measure.info.title} is undefined in {undefined} of "
            f"{sum(mean.size for mean in means)} {what} of single images, which are left out."
        )
