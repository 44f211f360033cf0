"""What a comparison gathers while images go by, one class for each group of its result.

Each is fed by the loop of `compare`, turns its sums into a dataset at the end, and says in notes
what a reader must know of numbers that are undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitprobe.capture.features import feature_layers
from vitprobe.capture.geometry import plain
from vitprobe.datasets import (
    Feature,
    FourierArrays,
    LayerArrays,
    SimilarityArrays,
    Unit,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)
from vitprobe.errors import MeasureError
from vitprobe.measures.attention import AttentionChunk, AttentionMeasure, PerImage
from vitprobe.measures.cka import CKA, CKARBF, Estimator, SimilarityResult
from vitprobe.measures.exact_cka import ExactCKA
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.gram import centered_gram
from vitprobe.measures.registry import ATTENTION, MEASURES, PER_BLOCK, SUBSET, TOKENS
from vitprobe.measures.subset import Subset, SubsetMeasure
from vitprobe.measures.tokens import (
    FourierAmplitude,
    RankMe,
    TokenPolicy,
    fourier_log_amplitude,
    select_tokens,
)
from vitprobe.models import Model

EXACT_BYTES = 1 << 32
"""Most bytes of feature-space sums; beyond it CKA of pooled tokens is the blocked estimate."""


def features_of(models: Sequence[Model]) -> list[Feature]:
    """(model, layer) of every feature, in the order of rows and columns."""
    return [(model.name, layer) for model in models for layer in feature_layers(model.anatomy)]


def check_finite(numbers: Tensor, layer: int) -> None:
    """Raise MeasureError for features of a layer, or a Gram matrix of them, that are not finite."""
    if not torch.isfinite(numbers).all():
        raise MeasureError(f"layer {layer} gives NaN or infinite features")


def kept_numbers(model: Model, tokens: TokenPolicy) -> int:
    """How many numbers of an image a layer has under a token policy."""
    patches = math.prod(model.anatomy.grid)
    counts = {"patches": patches, "all": patches + model.anatomy.prefix_tokens}
    return counts.get(tokens, 1) * model.anatomy.width


class Similarities:
    """Similarity of every two layers of all models."""

    def __init__(
        self,
        models: Sequence[Model],
        measures: Sequence[str],
        tokens: TokenPolicy,
        estimator: Estimator,
        max_images: int,
    ) -> None:
        self.features = features_of(models)
        self.measures = measures
        self.tokens: TokenPolicy = tokens
        self.max_images = max_images
        self._index = {feature: i for i, feature in enumerate(self.features)}
        count = len(self.features)
        self.cka = CKA(count, estimator) if "cka" in measures else None
        self.rbf = CKARBF(count, estimator) if "cka_rbf" in measures else None
        self.first_direction = FirstDirectionShare(count) if self.cka else None
        self.exact = self._exact(models, estimator) if self._wants_exact else None
        asked = any(name in SUBSET for name in measures)
        self.subset = Subset(count, max_images) if asked else None
        self._parts: dict[int, list[Tensor]] = {}
        self._grams: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}

    @property
    def _wants_exact(self) -> bool:
        return self.tokens in ("cls", "mean") and self.cka is not None

    @staticmethod
    def _exact(models: Sequence[Model], estimator: Estimator) -> ExactCKA | None:
        widths = [m.anatomy.width for m in models for _ in feature_layers(m.anatomy)]
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

    def update(self, model: Model, layer: int, first_image: int, tokens: Tensor, left: int) -> None:
        """Add a layer's tokens (n, tokens, width) of some images; `left` more of the block come."""
        index = self._index[model.name, layer]
        kept = select_tokens(tokens, model.anatomy.prefix_tokens, self.tokens)
        if self.subset is not None:
            self.subset.update(index, first_image, kept)
        if not self.streaming:
            return
        parts = self._parts.setdefault(index, [])
        # What is kept past this forward pass must not share memory with the model's own tensors.
        parts.append(kept.clone() if left else kept)
        if left:
            return
        del self._parts[index]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._grams[index] = centered_gram(whole)
        check_finite(self._grams[index], layer)
        if self.exact is not None:
            self._vectors[index] = whole.clone()

    def end_block(self, first_image: int) -> None:
        """All models have seen the block that began with this image."""
        if not self.streaming:
            return
        grams = torch.stack([self._grams.pop(i) for i in range(len(self.features))])
        if self.cka is not None and self.first_direction is not None:
            self.cka.update_grams(grams, first_image)
            self.first_direction.update_grams(grams)
        if self.rbf is not None:
            self.rbf.update_grams(grams, first_image)
        if self.exact is not None:
            self.exact.update([self._vectors.pop(i) for i in range(len(self.features))])

    def dataset(self, images: int, notes: list[str]) -> xr.Dataset:
        """The `similarity` group."""
        arrays = {}
        for name in self.measures:
            streamed = {"cka": self.cka, "cka_rbf": self.rbf}.get(name)
            if self.subset is not None and name in SUBSET:
                found = self._on_subset(SUBSET[name](self.subset), notes)
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
            which = ", ".join(str(layer) for layer, _ in layers)
            notes.append(
                f"{model}: {measure.info.title} is undefined in pairs of layers {which}; layer "
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

    def __init__(
        self, models: Sequence[Model], measures: Sequence[str], tokens: TokenPolicy
    ) -> None:
        self.features = features_of(models)
        self.models = models
        self.tokens: TokenPolicy = tokens
        self._index = {feature: i for i, feature in enumerate(self.features)}
        self.per_image = {
            model.name: {name: TOKENS[name]() for name in measures if name in TOKENS}
            for model in models
        }
        self.rankme = RankMe(len(self.features)) if "rankme" in measures else None

    def update(self, model: Model, layer: int, first_image: int, tokens: Tensor) -> None:
        """Add a layer's tokens (n, tokens, width) of some images."""
        prefix, grid = model.anatomy.prefix_tokens, model.anatomy.grid
        for measure in self.per_image[model.name].values():
            measure.update(layer, first_image, tokens[:, prefix:], grid)
        if self.rankme is not None:
            policy: TokenPolicy = "cls" if self.tokens == "cls" else "mean"
            vectors = select_tokens(tokens, prefix, policy)
            self.rankme.update(self._index[model.name, layer], first_image, vectors)

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
        if self.rankme is not None:
            value, error = (array.numpy() for array in self.rankme.compute())
            per_layer["rankme"] = LayerArrays(value, error, self.rankme.degrees)
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
        for model in self.models:
            measure = self.per_image[model.name]["fourier_amplitude"]
            if isinstance(measure, FourierAmplitude):
                curves |= {(model.name, layer): c for layer, c in measure.curves().items()}
        # A grid that is not square has no curve.
        steps = max((len(frequency) for frequency, _, _ in curves.values()), default=0)
        tables = np.full((3, len(self.features), steps), np.nan)
        for feature, curve in curves.items():
            tables[:, self._index[feature], : len(curve[0])] = curve
        frequency, value, error = tables
        return FourierArrays(frequency, value, error)

    def _note_undefined(self, name: str, values: np.ndarray, notes: list[str]) -> None:
        """values: (images, features), or (1, features) of all images together."""
        for model in self.models:
            own = [i for i, (owner, _) in enumerate(self.features) if owner == model.name]
            missing = np.isnan(values[:, own])
            layers = [self.features[own[i]][1] for i in np.flatnonzero(missing.any(0))]
            if not layers:
                continue
            which = f"layer(s) {', '.join(map(str, layers))}"
            if len(values) > 1:
                which += f" in {int(missing.any(1).sum())} of {len(values)} images"
            why = _no_curve(model.anatomy.grid) if name == "fourier_amplitude" else ""
            notes.append(f"{model.name}: {MEASURES[name].title} is undefined for {which}{why}.")


class Attention:
    """Attention of every head of all models."""

    def __init__(self, models: Sequence[Model], measures: Sequence[str]) -> None:
        self.models = models
        self.measures = measures
        self.by_model = {
            model.name: {name: ATTENTION[name]() for name in measures} for model in models
        }

    def update(self, model: Model, chunk: AttentionChunk) -> None:
        """Add some rows of one block of a model."""
        for measure in self.by_model[model.name].values():
            measure.update(chunk)

    def dataset(self, images: Sequence[str], notes: list[str]) -> xr.Dataset:
        """The `attention` group."""
        units: list[Unit] = []
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        undefined: dict[str, list[np.ndarray]] = {name: [] for name in self.measures}
        uniform: dict[str, list[float]] = {name: [] for name in self.measures}
        for model in self.models:
            geometry = plain(model.anatomy)
            seen: dict[int, int] = {}
            for name, measure in self.by_model[model.name].items():
                level = measure.uniform(geometry.query_xy, geometry.key_xy, geometry.key_prefix)
                layers = measure.compute()
                for layer, (mean, missing) in layers.items():
                    columns = mean.shape[1]
                    values[name].append(mean)
                    undefined[name].append(missing)
                    uniform[name] += [math.nan if level is None else level] * columns
                    if name not in PER_BLOCK:
                        seen[layer] = columns
                _note_rows(model, measure, layers.values(), notes)
            units += [(model.name, i, head) for i in sorted(seen) for head in range(seen[i])]
        return attention_dataset(
            units,
            images,
            values=_joined(values),
            undefined_rows=_joined(undefined),
            uniform={
                name: np.asarray(levels)
                for name, levels in uniform.items()
                if not np.isnan(levels).all()
            },
            blocks=[
                (model.name, block)
                for model in self.models
                for block in range(len(model.anatomy.blocks))
            ],
        )


def _no_curve(grid: tuple[int, int]) -> str:
    """Why a grid has no Fourier curve, as the end of a sentence; empty where it has one."""
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
    model: Model, measure: AttentionMeasure, layers: Iterable[PerImage], notes: list[str]
) -> None:
    means, missing = zip(*layers, strict=True)
    rows = sum(int(counts.sum()) for counts in missing)
    if rows and measure.needs == "rows":
        notes.append(
            f"{model.name}: {rows} attention rows had no mass on patches and are left out of "
            f"{measure.info.title.lower()}."
        )
    elif rows and measure.needs == "heads":
        notes.append(
            f"{model.name}: {rows} attention rows have no {measure.info.title}, infinite or of a "
            "head alone in its block, and are left out of it."
        )
    undefined = sum(int(np.isnan(mean).sum()) for mean in means)
    if undefined:
        what = "blocks" if measure.per_block else "heads"
        notes.append(
            f"{model.name}: {measure.info.title} is undefined in {undefined} of "
            f"{sum(mean.size for mean in means)} {what} of single images, which are left out."
        )
