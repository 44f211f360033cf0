"""The result of a comparison: what was measured, with units and provenance, on xarray.

A `Comparison` holds these groups:

- `similarity`: for each measure its value between every two features (a feature is one layer of one
  model), the standard error and the floor under permuted images, and the sums by which CKA merges;
- `attention`: per-image means for every unit (a unit is one head of one attention layer of one
  model), or for every layer where a measure fuses the heads, rows left undefined, and the value
  under uniform attention that relative units divide by; nothing of models without attention;
- `tokens`: numbers of a feature, for every image or for all together;
- `samples`: thumbnails and attention maps of the first images;

and, where models were evaluated, `scores`: a row a number, as `vitprobe.scores` has them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from vitprobe import notebook, tables
from vitprobe.condensed import NOTE as CONDENSED
from vitprobe.condensed import condensed_groups
from vitprobe.datasets import by_head, columns, pair
from vitprobe.errors import ResultError, suggest
from vitprobe.files import replacing
from vitprobe.measures.registry import ATTENTION, MEASURES
from vitprobe.scores import Scores
from vitprobe.statistics import paired, quantile, t_interval

FORMAT: Final = 2
COMPANION: Final = "first_direction_share"
"""Measured with CKA and never asked for by itself."""


class Comparison:
    """Models compared on the same images. Made by `vitprobe.compare`, read by `open_result`.

    Intervals are pointwise: of one cell, layer or head, at its level, and not of all together.

    Attributes:
        tree: the xarray DataTree behind it all.
        provenance: versions, command, images, settings and the description of every model.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self.tree = tree
        self.provenance: dict[str, Any] = json.loads(tree.attrs["provenance"])
        # A report of many models asks for the same parts some thousand times.
        self._dataset = lru_cache(maxsize=None)(self._read_dataset)
        self._levels = lru_cache(maxsize=None)(self._read_levels)
        self._patch_images = lru_cache(maxsize=64)(partial(self.layer_images, patches=True))

    def __reduce__(self) -> tuple[type[Comparison], tuple[xr.DataTree]]:
        return Comparison, (self.tree,)

    @classmethod
    def assemble(
        cls, groups: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]
    ) -> Comparison:
        """A Comparison from datasets by group path and a JSON-able provenance.

        `provenance["models"]` lists the descriptions of the models in order.
        """
        root = xr.Dataset(attrs={"format": FORMAT, "provenance": json.dumps(provenance)})
        return cls(xr.DataTree.from_dict({"/": root, **{f"/{k}": v for k, v in groups.items()}}))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order they were given, untrained twins last."""
        return tuple(model["name"] for model in self.provenance["models"])

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures in this result; `first_direction_share` goes with `cka`."""
        return tuple(self.provenance["measures"])

    @property
    def notes(self) -> list[str]:
        """Everything a reader must know: assumptions, images replaced, undefined numbers."""
        return list(self.provenance["notes"])

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The models that are seeds of one method, by the method's name; empty without groups."""
        return {name: tuple(names) for name, names in self.provenance.get("groups", {}).items()}

    @property
    def references(self) -> dict[str, str]:
        """The untrained twin of each model that has one, by the model's name."""
        return dict(self.provenance.get("references", {}))

    @property
    def scores(self) -> pd.DataFrame:
        """What the models are worth by evaluation: `Scores.to_dataframe`; no rows without any."""
        return self._scores.to_dataframe()

    def with_scores(self, scores: Scores) -> Comparison:
        """This result with the scores of its models, besides those that it has.

        A row belongs to the model of its name, or else to the one of its checkpoint.

        Raises:
            ResultError: as `Scores.matched`.
        """
        checkpoints = {
            model["name"]: model.get("sha256") or "" for model in self.provenance["models"]
        }
        both = self._scores + scores.matched(checkpoints)
        tree = self.tree.copy()
        tree["scores"] = xr.DataTree(both.to_dataset())
        return Comparison(tree)

    @property
    def _scores(self) -> Scores:
        group = self.tree.children.get("scores")
        return Scores([]) if group is None else Scores.from_dataset(group.to_dataset(inherit=False))

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of a model: source, architecture with evidence, load report, hash.

        Raises:
            ResultError: no model of that name.
        """
        return self.provenance["models"][self._index(name)]

    def grid(self, name: str) -> tuple[int, int]:
        """Patches of a model's first layer, (rows, columns).

        Raises:
            ResultError: no model of that name, or its patches have no known order in the image.
        """
        rows, columns = self._of_first_layer(name, "grid")
        return rows, columns

    def patch_size(self, name: str) -> tuple[float, float]:
        """Pixels of a model's input per patch of its first layer, (height, width).

        Raises:
            ResultError: as `grid`.
        """
        height, width = self._of_first_layer(name, "patch_size")
        return height, width

    def _of_first_layer(self, name: str, what: str) -> Any:
        description = self.describe(name)
        layouts = description.get("layouts")
        value = layouts[0][what] if layouts else description["facts"][what]["value"]
        if value is None:
            raise ResultError(f"the patches of '{name}' have no known order in the image")
        return value

    def input_size(self, name: str) -> tuple[int, int, int]:
        """A model's input, (channels, height, width)."""
        channels, height, width = self.describe(name)["input_size"]
        return channels, height, width

    def attention_layers(self, name: str) -> list[dict[str, Any]]:
        """What is known of each attention layer of a model, in the order of `layer`.

        `path` of its module, the `block` it lies in, its `kind` ("global", "windows", "pooled
        keys", "class token", "channels" or "unknown places"), `heads`, `windows`, `queries` and
        `keys` of one window, what its rows are `over`, why it has `no_distance`, and a `note`.
        Empty for a model without attention.

        Raises:
            ResultError: no model of that name.
        """
        description = self.describe(name)
        if "attention" in description:
            return list(description["attention"])
        # Of a result from before attention layers were recorded, each is a block.
        group = self.tree.children.get("attention")
        units = xr.Dataset() if group is None else group.to_dataset()
        own = units["layer"].values[units["model"].values == name] if units else np.zeros(0, int)
        layers, heads = np.unique(own, return_counts=True)
        return [
            {"block": int(layer), "kind": "global", "over": "tokens", "heads": int(count)}
            for layer, count in zip(layers, heads, strict=True)
        ]

    def measured(self, measure: str) -> tuple[str, ...]:
        """The models for which a measure has a value in at least one layer, in order.

        Raises:
            ResultError: a measure that is not in this result.
        """
        dataset = self._dataset(measure)
        array = dataset[measure]
        owners = {
            "unit": "model",
            "block": "block_model",
            "feature": "model",
            "feature_b": "model_b",
        }
        (column,) = owners.keys() & set(array.dims)
        defined = array.notnull().any([dim for dim in array.dims if dim != column]).values
        found = set(dataset[owners[column]].values[defined])
        return tuple(name for name in self.models if name in found)

    def group_of(self, measure: str) -> str:
        """Which of `similarity`, `attention` and `tokens` a measure belongs to.

        Raises:
            ResultError: a measure that is not in this result.
        """
        for group in ("similarity", "attention", "tokens"):
            held = group in self.tree.children and measure in self.tree[group].data_vars
            if held and measure in (*self.measures, COMPANION):
                return group
        raise ResultError(
            f"'{measure}' was not measured in this result.{suggest(measure, self.measures)} "
            f"It has {', '.join(self.measures)}."
        )

    def is_per_image(self, measure: str) -> bool:
        """Whether a number of every image is kept, so that models can be compared in pairs.

        Raises:
            ResultError: a measure that is not in this result.
        """
        return "image" in self._dataset(measure)[measure].dims

    def cka(self, a: str, b: str) -> xr.DataArray:
        """CKA between the layers of two models: (layer_a, layer_b). As `similarity`."""
        return self.similarity("cka", a, b)

    def similarity(self, measure: str, a: str, b: str) -> xr.DataArray:
        """A similarity measure between the layers of two models: (layer_a, layer_b).

        nan where it is undefined, such as for a layer that is constant over the images; `notes`
        says which and why.

        Raises:
            ResultError: no model of that name, or no similarity measure of that name.
        """
        return self._pair(measure, measure, a, b)

    def equal_depth(self, measure: str, a: str, b: str, *, level: float = 0.95) -> xr.Dataset:
        """A similarity measure between layers at the same depth of two models.

        Layer i of `a` is set beside layer j of `b` where i / L_a = j / L_b; models of equal depth
        have one pair a layer. `most_different(measure, a, b)` names the pair of lowest value.

        Args:
            measure: such as `cka`.
            a: name of a model.
            b: name of another.
            level: of the intervals, pointwise.

        Returns:
            `value`, `low`, `high` and `floor` over (layer,), the layers of `a`, with the coordinate
            `layer_b`.

        Raises:
            ResultError: as `similarity`, or a level that is no probability.
        """
        value, floor = self.similarity(measure, a, b), self.floor(measure, a, b)
        low, high = self.interval(measure, a, b, level=level)
        own, other = value["layer_a"].values, value["layer_b"].values
        rows, columns = np.nonzero(tables.of_equal_depth(own, other))
        found = {"value": value, "low": low, "high": high, "floor": floor}
        return xr.Dataset(
            {name: ("layer", array.values[rows, columns]) for name, array in found.items()},
            coords={"layer": own[rows], "layer_b": ("layer", other[columns])},
            attrs={**value.attrs, "level": level, "model_a": a, "model_b": b},
        )

    def most_different(self, measure: str, a: str, b: str) -> tuple[int, int]:
        """The layers, of `a` and of `b`, that differ most at the same depth, by `equal_depth`.

        Whether that layer differs from its neighbours, the intervals of `equal_depth` say.

        Raises:
            ResultError: as `similarity`, or the measure is undefined in all of these layers.
        """
        found = self.equal_depth(measure, a, b)
        if not found["value"].notnull().any():
            raise ResultError(f"'{measure}' of '{a}' and '{b}' is undefined at every depth")
        at = found.isel(layer=int(found["value"].argmin("layer")))
        return int(at["layer"]), int(at["layer_b"])

    def summary(self) -> dict[str, Any]:
        """The main numbers as JSON-able values, see `vitprobe.summary.summary`."""
        from vitprobe.summary import summary

        return summary(self)

    def floor(self, measure: str, a: str, b: str) -> xr.DataArray:
        """What a similarity measure reaches when the images of one side are permuted.

        A value that does not exceed its floor is no more than unrelated layers would show.

        Returns:
            (layer_a, layer_b); nan where none was drawn.

        Raises:
            ResultError: as `similarity`.
        """
        return self._pair(measure, f"{measure}_floor", a, b)

    def standard_error(self, measure: str, a: str, b: str | None = None) -> xr.DataArray:
        """Standard error of a similarity measure, (layer_a, layer_b), or of a number of a layer
        that is of all images together, (layer,); nan where there is none.

        Raises:
            ResultError: as `interval`, or a measure that has a number of every image.
        """
        variable = f"{measure}_standard_error"
        if b is not None:
            return self._pair(measure, variable, a, b)
        self._check_group(measure, "tokens")
        if self.is_per_image(measure):
            raise ResultError(f"'{measure}' has a number of every image: 'per_image' gives them")
        if variable in self._dataset(measure):
            return self._columns(measure, variable, a)
        return xr.full_like(self.tokens(measure, a), np.nan)

    def interval(
        self,
        measure: str,
        a: str,
        b: str | None = None,
        *,
        level: float = 0.95,
        relative: bool = False,
    ) -> tuple[xr.DataArray, xr.DataArray]:
        """Pointwise confidence interval, cut where the measure itself ends: (low, high).

        Similarity measures want two models and give (layer_a, layer_b), from their standard errors;
        a layer with itself has no interval (nan). Attention measures give (layer, head) and token
        measures (layer,): Student's t over images, or from the standard error where the number is
        of all images together (nan where there is none).

        Raises:
            ResultError: a measure or model that is not in this result, one model where two are
                needed or two where one is, a level that is no probability, no such relative unit.
        """
        wanted = 2 if self.group_of(measure) == "similarity" else 1
        if wanted != 1 + (b is not None):
            raise ResultError(f"the interval of '{measure}' takes {wanted} model(s): give {wanted}")
        if b is not None:
            self._check_units(measure, relative)
            value = self.similarity(measure, a, b)
            error, degrees = self.standard_error(measure, a, b), value.attrs["degrees"]
        elif self.is_per_image(measure):
            images = self.per_image(measure, a, relative=relative)
            value, degrees = images[0].drop_vars("image"), None
            low, high = t_interval(images, level)[1:3]
        else:
            self._check_units(measure, relative)
            value, error = self.tokens(measure, a), self.standard_error(measure, a)
            degrees = value.attrs["degrees"]
        if degrees is not None:
            margin = quantile(level, degrees) * error.values
            low, high = value.values - margin, value.values + margin
        scale = self._uniform(measure, a).values if relative else 1.0
        low, high = self._cut(measure, low, high, scale)
        return value.copy(data=low), value.copy(data=high)

    def attention(self, measure: str, name: str, *, relative: bool = False) -> xr.DataArray:
        """An attention measure averaged over images: (layer, head).

        Layers are the model's attention layers, in a plain Vision Transformer its blocks; nan where
        a layer has no such measure. A measure that fuses the heads of a block has one head, 0.

        Args:
            measure: such as `attention_distance`.
            name: of the model.
            relative: divide by the value under uniform attention on the same grid.

        Raises:
            ResultError: measure or model not in this result, a model without attention, or a
                measure without relative units.
        """
        self._check_group(measure, "attention")
        return self._mean(self.per_image(measure, name, relative=relative), "image")

    def uniform(self, measure: str, name: str) -> xr.DataArray:
        """The value of an attention measure under uniform attention: (layer,), nan where none.

        Raises:
            ResultError: as `attention`; and a measure without relative units.
        """
        self._check_group(measure, "attention")
        self._check_units(measure, True)
        return self._mean(self._uniform(measure, name), "head")

    def attention_distance(self, name: str, *, relative: bool = False) -> xr.DataArray:
        """Mean attention distance (layer, head), pixels of the model's input or relative."""
        return self.attention("attention_distance", name, relative=relative)

    def attention_entropy(self, name: str, *, relative: bool = False) -> xr.DataArray:
        """Mean attention entropy (layer, head), nats or relative."""
        return self.attention("attention_entropy", name, relative=relative)

    def sink_mass(self, name: str) -> xr.DataArray:
        """Mean attention mass that patches send to prefix tokens (layer, head)."""
        return self.attention("sink_mass", name)

    def tokens(self, measure: str, name: str) -> xr.DataArray:
        """A token measure by layer: (layer,), the mean over images where it has one an image.

        Raises:
            ResultError: measure or model not in this result, or no token measure.
        """
        self._check_group(measure, "tokens")
        if self.is_per_image(measure):
            return self._mean(self.per_image(measure, name), "image")
        return self._columns(measure, measure, name)

    def first_direction_share(self, name: str) -> xr.DataArray:
        """Share of each layer's variance along its first principal direction: (layer,)."""
        return self.tokens(COMPANION, name)

    def per_image(self, measure: str, name: str, *, relative: bool = False) -> xr.DataArray:
        """A measure for every image: (image, layer, head), or (image, layer) of tokens.

        Raises:
            ResultError: measure or model not in this result, a model without attention, a measure
                without relative units, or one that is no number of an image.
        """
        if not self.is_per_image(measure):
            raise ResultError(f"'{measure}' is a number of all images together, not of each")
        self._check_units(measure, relative)
        array = self._columns(measure, measure, name)
        if relative:
            uniform = self._columns(measure, f"{measure}_uniform", name)
            units = {"units": "relative to uniform"}
            array = (array / uniform).assign_attrs(array.attrs | units)
        return array if self.group_of(measure) == "tokens" else by_head(array)

    def undefined_rows(self, measure: str, name: str) -> xr.DataArray:
        """Rows of attention left out of a measure, over all images: (layer, head).

        Raises:
            ResultError: measure or model not in this result, or no attention measure.
        """
        self._check_group(measure, "attention")
        rows = self._columns(measure, f"{measure}_undefined_rows", name)
        return by_head(rows.sum("image"))

    def by_layer(
        self, measure: str, name: str, *, relative: bool = False, level: float = 0.95
    ) -> xr.Dataset:
        """An attention or token measure by layer, with its interval over images.

        Heads are averaged within each image first, over those where the measure is defined.

        Returns:
            `value`, `low` and `high` over (layer,).

        Raises:
            ResultError: as `per_image`, or a similarity measure, or a level that is no probability.
        """
        if self.group_of(measure) == "similarity":
            raise ResultError(f"'{measure}' is of two layers; 'similarity' and 'interval' give it")
        if self.is_per_image(measure):
            images = self.layer_images(measure, name, relative=relative)
            value, low, high = t_interval(images, level)[:3]
            scale = self._mean(self._uniform(measure, name), "head").values if relative else 1.0
            low, high = self._cut(measure, low, high, scale)
            attrs, layers = images.attrs, images["layer"].values
        else:
            array = self.tokens(measure, name)
            low, high = (end.values for end in self.interval(measure, name, level=level))
            value, attrs, layers = array.values, array.attrs, array["layer"].values
        return xr.Dataset(
            {"value": ("layer", value), "low": ("layer", low), "high": ("layer", high)},
            coords={"layer": layers},
            attrs={**attrs, "level": level, "model": name},
        )

    def layer_images(
        self, measure: str, name: str, *, relative: bool = False, patches: bool = False
    ) -> xr.DataArray:
        """A measure for every image and layer, heads averaged: (image, layer) float64.

        patches: leave out (nan) attention that is not between patches but over channels, or of the
            class token alone, unless the measure is of the class token.

        Raises as `per_image`.
        """
        array = self.per_image(measure, name, relative=relative)
        if "head" not in array.dims:
            return array.astype(float)
        array = self._mean(array, "head")
        return array.where(~array["layer"].isin(self._closed(measure, name))) if patches else array

    def fourier_curves(self, name: str, *, level: float = 0.95) -> xr.Dataset:
        """Relative log-amplitude of a model's tokens by frequency, with its interval over images.

        Returns:
            `value`, `low`, `high` and `frequency` (units of pi radians a patch) over (layer, step);
            0 by definition at frequency 0, nan beyond the highest frequency of the model's grid.

        Raises:
            ResultError: `fourier_amplitude` or the model is not in this result.
        """
        measure = "fourier_amplitude"
        images = self.per_image(measure, name)
        value, error, frequency = (
            self._columns(measure, variable, name)
            for variable in ("fourier_curve", "fourier_curve_standard_error", "fourier_frequency")
        )
        degrees = images.notnull().sum("image").values - 1
        margin = quantile(level, degrees)[:, None] * error.values
        dims = ("layer", "step")
        return xr.Dataset(
            {
                "value": (dims, value.values),
                "low": (dims, value.values - margin),
                "high": (dims, value.values + margin),
                "frequency": (dims, frequency.values, frequency.attrs),
            },
            coords={"layer": value["layer"].values},
            attrs={**value.attrs, "level": level, "model": name},
        )

    def difference(
        self,
        measure: str,
        a: str,
        b: str,
        *,
        relative: bool | None = None,
        level: float = 0.95,
    ) -> xr.Dataset:
        """Model a minus model b, paired over the images where both are defined.

        Of attention over patches: other attention of a model (over channels, or of its class token
        alone) is left out, unless the measure is of the class token.

        Args:
            measure: an attention or token measure that is kept for every image.
            a: name of a model.
            b: name of another.
            relative: in units of uniform attention; None: where the models' uniform values differ.
            level: of the intervals.

        Returns:
            `value`, `low`, `high` and `p` over (layer,), heads averaged within each image first;
            of no layers where the two models differ in depth. The attributes `overall_value`,
            `overall_low`, `overall_high` and `overall_p` are of the mean over heads and layers:
            those layers of an image that are defined in both models, or, where they differ in
            depth, the images with all layers defined that can be.
            An interval that contains 0 means that the two cannot be told apart.

        Raises:
            ResultError: as `per_image`.
        """
        if relative is None:
            relative = self.needs_relative(measure, (a, b))
        first, second = (self._patch_images(measure, name, relative=relative) for name in (a, b))
        equal = np.array_equal(first["layer"], second["layer"])
        if equal:
            # Means of the two models are over the same layers, image by image.
            both = first.notnull() & second.notnull()
            first, second = first.where(both), second.where(both)
        else:
            # Layers that cannot have such a number make no image incomplete.
            first, second = (
                array.drop_sel(layer=self._closed(measure, name))
                for array, name in ((first, a), (second, b))
            )
            whole = (array.notnull().all("layer") for array in (first, second))
            first, second = (
                array.where(kept) for array, kept in zip((first, second), whole, strict=True)
            )
        overall = paired(self._mean(first, "layer"), self._mean(second, "layer"), level)
        layers = first["layer"].values if equal else first["layer"].values[:0]
        estimate = paired(first[:, : len(layers)], second[:, : len(layers)], level)
        names = ("value", "low", "high", "p")
        return xr.Dataset(
            {name: ("layer", getattr(estimate, name)) for name in names},
            coords={"layer": layers},
            attrs={
                **{key: first.attrs[key] for key in ("long_name", "units")},
                **{f"overall_{name}": float(getattr(overall, name)) for name in names},
                "images": int(overall.number),
                "level": level,
                "model_a": a,
                "model_b": b,
            },
        )

    def needs_relative(self, measure: str, names: Sequence[str]) -> bool:
        """Whether models can be set side by side only in units of uniform attention.

        Raises:
            ResultError: measure or model not in this result.
        """
        if f"{measure}_uniform" not in self._dataset(measure):
            return False
        levels = [self._levels(measure, name) for name in names if self.attention_layers(name)]
        levels = [values for values in levels if values]
        return any(values != levels[0] for values in levels)

    def differences(
        self, measures: Sequence[str] | None = None, *, level: float = 0.95
    ) -> pd.DataFrame:
        """The list of paired differences, see `vitprobe.tables.differences`."""
        return tables.differences(self, measures, level)

    def group_means(
        self, measures: Sequence[str] | None = None, *, level: float = 0.95
    ) -> pd.DataFrame:
        """Means of groups over their seeds, see `vitprobe.tables.group_means`."""
        return tables.group_means(self, measures, level)

    def group_differences(
        self, measures: Sequence[str] | None = None, *, level: float = 0.95
    ) -> pd.DataFrame:
        """The list of differences between groups, see `vitprobe.tables.group_differences`."""
        return tables.group_differences(self, measures, level)

    def group_similarity(self, measure: str, *, level: float = 0.95) -> pd.DataFrame:
        """Similarity within and between groups, see `vitprobe.tables.group_similarity`."""
        return tables.group_similarity(self, measure, level)

    def to_dataframe(self, measure: str) -> pd.DataFrame:
        """The tidy table of one measure, see `vitprobe.tables.tidy`.

        Raises:
            ResultError: a measure that is not in this result.
        """
        return tables.tidy(self, measure)

    def thumbnails(self) -> xr.DataArray | None:
        """The first images, (sample, row, column, channel) uint8, or None."""
        group = self.tree.children.get("samples")
        return None if group is None else group.to_dataset()["thumbnail"]

    def samples(self, name: str) -> xr.Dataset | None:
        """Attention maps of the first images, or None where none were kept.

        `attention` is (sample, unit, query, key) float16; `query` names the token rows that were
        kept (all of them where the maps are small).
        """
        group = self.tree.children.get("samples")
        maps = None if group is None else group.children.get(str(self._index(name)))
        return None if maps is None else maps.to_dataset(inherit=False)

    def condensed(self) -> Comparison:
        """What figures and tables read, in some percent of the space.

        Similarity keeps its values, standard errors and floors, rounded to 1/16384; measures of
        every image become their means over images, without an interval over images; sums that
        merge and samples are left out. A note says so.
        """
        measures = tuple(m for m in self.measures if self.group_of(m) == "similarity")
        notes = [*(note for note in self.notes if note != CONDENSED), CONDENSED]
        groups = condensed_groups(self.tree, measures)
        return Comparison.assemble(groups, {**self.provenance, "notes": notes})

    def save(self, path: str | Path) -> Path:
        """Write to a netCDF file (HDF5), moved into place when whole.

        Raises:
            ResultError: the file cannot be written.
        """
        path = Path(path)
        encoding = {
            group.path: {
                str(name): {"zlib": True, "complevel": 4, "shuffle": True}
                for name, variable in group.data_vars.items()
                if variable.size > 1024 and variable.dtype.kind in "fiu"
            }
            for group in self.tree.subtree
        }
        # HDF5 does not survive a disk that fills while it writes, so it writes to memory.
        data = self.tree.to_netcdf(None, engine="h5netcdf", encoding=encoding)
        with replacing(path) as partial:
            partial.write_bytes(data)
        return path

    def __repr__(self) -> str:
        images = self.provenance["images"]["count"]
        return f"Comparison({', '.join(self.models)}; {images} images; {', '.join(self.measures)})"

    def _repr_html_(self) -> str:
        return notebook.of_comparison(self)

    def _index(self, name: str) -> int:
        if name not in self.models:
            raise ResultError(
                f"no model '{name}' in this result.{suggest(name, self.models)} "
                f"It has {', '.join(self.models)}."
            )
        return self.models.index(name)

    def _closed(self, measure: str, name: str) -> list[int]:
        """Attention layers of a model that refuse a measure, or are not between patches."""
        if self.group_of(measure) != "attention":
            return []
        parts = self.describe(name).get("refused", ())
        closed = {i for part in parts if measure in part["measures"] for i in part["layers"]}
        if ATTENTION[measure].asks != "class":
            kinds = [layer["kind"] for layer in self.attention_layers(name)]
            closed |= {i for i, kind in enumerate(kinds) if kind in ("channels", "class token")}
        return sorted(closed)

    def _read_dataset(self, measure: str) -> xr.Dataset:
        return self.tree[self.group_of(measure)].to_dataset()

    def _read_levels(self, measure: str, name: str) -> frozenset[str]:
        """The values of a measure under uniform attention in a model: those of its windows or of
        its stages may differ."""
        values = self._columns(measure, f"{measure}_uniform", name).values
        return frozenset(f"{level:.6g}" for level in values if np.isfinite(level))

    def _check_group(self, measure: str, group: str) -> None:
        if self.group_of(measure) != group:
            raise ResultError(f"'{measure}' is a measure of {self.group_of(measure)}, not {group}")

    def _check_units(self, measure: str, relative: bool) -> None:
        if relative and f"{measure}_uniform" not in self._dataset(measure):
            raise ResultError(f"'{measure}' has no relative unit")

    def _pair(self, measure: str, variable: str, a: str, b: str) -> xr.DataArray:
        self._check_group(measure, "similarity")
        for name in (a, b):
            self._index(name)
        return pair(self._dataset(measure), measure, variable, a, b)

    def _columns(self, measure: str, variable: str, name: str) -> xr.DataArray:
        self._index(name)
        if self.group_of(measure) == "attention" and not self.attention_layers(name):
            raise ResultError(
                f"'{name}' has no attention: {self.describe(name).get('no_attention', '')}"
            )
        return columns(self._dataset(measure), variable, name)

    def _uniform(self, measure: str, name: str) -> xr.DataArray:
        return by_head(self._columns(measure, f"{measure}_uniform", name))

    def _cut(
        self, measure: str, low: np.ndarray, high: np.ndarray, scale: Any = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        attrs = self._dataset(measure)[measure].attrs
        return np.maximum(low, attrs["least"] / scale), np.minimum(high, attrs["most"] / scale)

    @staticmethod
    def _mean(array: xr.DataArray, dim: str) -> xr.DataArray:
        return array.astype(float).mean(dim, skipna=True, keep_attrs=True)


def open_result(path: str | Path) -> Comparison:
    """Read a Comparison saved by `Comparison.save`.

    Raises:
        ResultError: no such file, or not a vitprobe result.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultError(f"no result file '{path}'")
    try:
        # Files of other programs may lack what netCDF wants; that is said below, in one sentence.
        with warnings.catch_warnings(action="ignore"), _open(path) as tree:
            if not np.array_equal(tree.attrs.get("format", 0), FORMAT):
                raise ResultError(
                    f"'{path}' is no vitprobe result of format {FORMAT}; write it again with "
                    "'vitprobe compare'"
                )
            result = Comparison(tree.load())
        _check_whole(result, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, OSError) and not isinstance(error, PermissionError):
            # What HDF5 says of a file would help nobody.
            raise ResultError(
                f"'{path}' is no whole vitprobe result: it is damaged, cut short or a file of "
                "another kind; write it again with 'vitprobe compare'"
            ) from error
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResultError(f"'{path}' is no whole vitprobe result: {what}") from error
    return result


def _open(path: Path) -> xr.DataTree:
    tree: xr.DataTree = xr.open_datatree(path, engine="h5netcdf")
    return tree


def _check_whole(result: Comparison, path: Path) -> None:
    """Raise KeyError or ValueError for a result that lacks what its provenance names."""
    provenance = result.provenance
    for name in ("measures", "notes", "images", "models"):
        if name not in provenance:
            raise KeyError(f"its provenance has no {name}")
    if not all(isinstance(note, str) for note in provenance["notes"]):
        raise ValueError("its notes are no list of sentences")
    for what, names in (("models", result.models), ("measures", result.measures)):
        if len(set(names)) < len(names):
            raise ValueError(f"one of its {what} is named twice")
    named = [*result.references, *result.references.values()]
    named += [name for members in result.groups.values() for name in members]
    for name in named:
        result.describe(name)
    for name in result.models:
        for layer in result.attention_layers(name):
            missing = {"block", "kind", "heads"} - layer.keys()
            if missing:
                raise KeyError(f"an attention layer of {name} has no {min(missing)}")
    for name in result.scores["model"].unique():
        result.describe(name)
    if unknown := [name for name in result.measures if name not in MEASURES]:
        raise ResultError(
            f"'{path}' has the measure '{unknown[0]}', which is not known here; import what "
            "registers it (vitprobe.measures.register) before"
        )
    for measure in (*result.measures, *([COMPANION] if "cka" in result.measures else [])):
        try:
            dataset = result.tree[result.group_of(measure)].to_dataset()
        except ResultError:
            raise KeyError(f"it has no {measure}") from None
        _check_measure(result, measure, dataset)


def _check_measure(result: Comparison, measure: str, dataset: xr.Dataset) -> None:
    array = dataset[measure]
    variables, attrs = [], ["long_name", "units", "least", "most"]
    group = result.group_of(measure)
    coordinates = ["model", "layer"]
    if group == "similarity":
        variables = [f"{measure}_standard_error", f"{measure}_floor"]
        attrs += ["degrees", "images", "symmetric"]
        coordinates = ["model_a", "layer_a", "model_b", "layer_b"]
    elif group == "attention":
        variables = [f"{measure}_undefined_rows"]
        coordinates = (
            ["block_model", "block_layer"] if "block" in array.dims else [*coordinates, "head"]
        )
    elif measure == "fourier_amplitude":
        variables = ["fourier_curve", "fourier_curve_standard_error", "fourier_frequency"]
    for name in (*variables, *coordinates):
        if name not in dataset.variables:
            raise KeyError(f"it has no {name}")
    for name in attrs:
        if name not in array.attrs:
            raise KeyError(f"its {measure} has no attribute {name}")
    models = set(result.models)
    if group == "attention":
        models = {name for name in models if result.attention_layers(name)}
    if set(dataset[coordinates[0]].values) != models:
        raise ValueError("its models are not those that its provenance names")
