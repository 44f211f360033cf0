"""The result of a comparison: what was measured, with units and provenance, on xarray.

A `Comparison` holds four groups:

- `similarity`: CKA between every two features (a feature is one layer of one model), its standard
  error, and the sums from which both follow and by which results merge;
- `attention`: per-image means for every unit (a unit is one head of one layer of one model), rows
  left undefined, and the value under uniform attention that relative units divide by;
- `tokens`: per-feature numbers such as the first-direction share;
- `samples`: thumbnails and attention maps of the first images.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import norm

from vitprobe.errors import ResultError, suggest
from vitprobe.files import replacing

FORMAT: Final = 1
Feature = tuple[str, int]
"""(model, layer)"""
Unit = tuple[str, int, int]
"""(model, block, head)"""


class Comparison:
    """Models compared on the same images. Made by `vitprobe.compare`, read by `open_result`.

    Attributes:
        tree: the xarray DataTree behind it all.
        provenance: versions, command, images, settings and the description of every model.
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self.tree = tree
        self.provenance: dict[str, Any] = json.loads(tree.attrs["provenance"])

    @classmethod
    def assemble(
        cls, groups: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]
    ) -> Comparison:
        """A Comparison from datasets by group path and a JSON-able provenance.

        `provenance["models"]` lists the descriptions of the models in order.
        """
        root = xr.Dataset(
            attrs={"format": FORMAT, "provenance": json.dumps(provenance, sort_keys=True)}
        )
        return cls(xr.DataTree.from_dict({"/": root, **{f"/{k}": v for k, v in groups.items()}}))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order they were given."""
        return tuple(model["name"] for model in self.provenance["models"])

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures in this result."""
        return tuple(self.provenance["measures"])

    @property
    def notes(self) -> list[str]:
        """Everything a reader must know: assumptions, images replaced, undefined numbers."""
        return list(self.provenance["notes"])

    def describe(self, name: str) -> dict[str, Any]:
        """What is known of a model: source, architecture with evidence, load report, hash.

        Raises:
            ResultError: no model of that name.
        """
        return self.provenance["models"][self._index(name)]

    def grid(self, name: str) -> tuple[int, int]:
        """Patches of a model's input, (rows, columns)."""
        rows, columns = self.describe(name)["facts"]["grid"]["value"]
        return rows, columns

    def patch_size(self, name: str) -> tuple[float, float]:
        """Pixels of a model's input per patch, (height, width)."""
        height, width = self.describe(name)["facts"]["patch_size"]["value"]
        return height, width

    def input_size(self, name: str) -> tuple[int, int, int]:
        """A model's input, (channels, height, width)."""
        channels, height, width = self.describe(name)["input_size"]
        return channels, height, width

    def cka(self, a: str, b: str) -> xr.DataArray:
        """CKA between the layers of two models: (layer_a, layer_b).

        nan where a layer is constant over the images; `notes` says which.

        Raises:
            ResultError: no model of that name, or CKA was not measured.
        """
        return self._pair("cka", a, b)

    def interval(
        self, measure: str, a: str, b: str, *, level: float = 0.95
    ) -> tuple[xr.DataArray, xr.DataArray]:
        """Pointwise confidence interval of CKA: (low, high), each (layer_a, layer_b).

        From the influence function over images; the upper end is cut at 1. A layer with itself has
        no interval (nan), for its CKA is 1 by construction.

        Raises:
            ResultError: another measure than `cka`, or no model of that name.
        """
        if measure != "cka":
            raise ResultError(f"intervals are kept for 'cka', not for '{measure}'")
        if not 0 < level < 1:
            raise ResultError(f"a level of {level} is no probability; give one such as 0.95")
        value = self._pair("cka", a, b)
        margin = float(norm.ppf((1 + level) / 2)) * self._pair("cka_standard_error", a, b)
        return value - margin, (value + margin).clip(max=1)

    def attention(self, measure: str, name: str, *, relative: bool = False) -> xr.DataArray:
        """An attention measure averaged over images: (layer, head).

        Args:
            measure: such as `attention_distance`.
            name: of the model.
            relative: divide by the value under uniform attention on the same grid.

        Raises:
            ResultError: measure or model not in this result, or a measure without relative units.
        """
        per_image = self.per_image(measure, name, relative=relative)
        with np.errstate(invalid="ignore"):
            mean = per_image.astype(float).mean("image", skipna=True)
        mean.attrs = per_image.attrs
        return mean

    def attention_distance(self, name: str, *, relative: bool = False) -> xr.DataArray:
        """Mean attention distance (layer, head), pixels of the model's input or relative."""
        return self.attention("attention_distance", name, relative=relative)

    def attention_entropy(self, name: str, *, relative: bool = False) -> xr.DataArray:
        """Mean attention entropy (layer, head), nats or relative."""
        return self.attention("attention_entropy", name, relative=relative)

    def sink_mass(self, name: str) -> xr.DataArray:
        """Mean attention mass that patches send to prefix tokens (layer, head)."""
        return self.attention("sink_mass", name)

    def per_image(self, measure: str, name: str, *, relative: bool = False) -> xr.DataArray:
        """An attention measure for every image: (image, layer, head). Raises as `attention`."""
        dataset = self._group("attention", measure)
        dataset = dataset.isel(unit=np.flatnonzero(self._mask(dataset, "model", name)))
        array = dataset[measure]
        attrs = dict(array.attrs)
        if relative:
            if f"{measure}_uniform" not in dataset:
                raise ResultError(f"'{measure}' has no relative unit")
            array = array / dataset[f"{measure}_uniform"]
            attrs["units"] = "relative to uniform"
        layers, heads = (np.unique(array[dim].values) for dim in ("layer", "head"))
        # Layers may differ in heads; a head that does not exist is nan.
        table = np.full((array.sizes["image"], len(layers), len(heads)), np.nan, array.dtype)
        rows = np.searchsorted(layers, array["layer"].values)
        columns = np.searchsorted(heads, array["head"].values)
        table[:, rows, columns] = array.values
        return xr.DataArray(
            table,
            dims=("image", "layer", "head"),
            coords={"image": array["image"].values, "layer": layers, "head": heads},
            name=measure,
            attrs=attrs,
        )

    def first_direction_share(self, name: str) -> xr.DataArray:
        """Share of each layer's variance along its first principal direction: (layer,)."""
        dataset = self._group("tokens", "cka")
        share = dataset["first_direction_share"]
        share = share.isel(feature=np.flatnonzero(self._mask(dataset, "model", name)))
        return xr.DataArray(
            share.values,
            dims=("layer",),
            coords={"layer": share["layer"].values},
            name="first_direction_share",
            attrs=share.attrs,
        )

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

    def to_dataframe(self, measure: str) -> pd.DataFrame:
        """The tidy table of one measure.

        `cka`: model_a, layer_a, model_b, layer_b, cka, standard_error, low, high, every pair once.
        Attention measures: model, layer, head, the mean over images, its standard error, relative
        value where defined, images, undefined_rows.

        Raises:
            ResultError: a measure that is not in this result.
        """
        if measure == "cka":
            return self._similarity_table()
        if measure == "first_direction_share":
            share = self._group("tokens", "cka")["first_direction_share"]
            return share.to_dataframe().reset_index(drop=True)
        dataset = self._group("attention", measure)
        values = dataset[measure].astype(float)
        table = pd.DataFrame({key: dataset[key].values for key in ("model", "layer", "head")})
        count = values.notnull().sum("image")
        table[measure] = values.mean("image").values
        table["standard_error"] = (values.std("image", ddof=1) / np.sqrt(count)).values
        if f"{measure}_uniform" in dataset:
            table["relative"] = table[measure] / dataset[f"{measure}_uniform"].values
        table["images"] = count.values
        table["undefined_rows"] = dataset[f"{measure}_undefined_rows"].sum("image").values
        return table

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
        with replacing(path) as partial:
            self.tree.to_netcdf(partial, engine="h5netcdf", encoding=encoding)
        return path

    def __repr__(self) -> str:
        images = self.provenance["images"]["count"]
        return f"Comparison({', '.join(self.models)}; {images} images; {', '.join(self.measures)})"

    def _index(self, name: str) -> int:
        if name not in self.models:
            raise ResultError(
                f"no model '{name}' in this result.{suggest(name, self.models)} "
                f"It has {', '.join(self.models)}."
            )
        return self.models.index(name)

    def _mask(self, dataset: xr.Dataset, coordinate: str, name: str) -> np.ndarray:
        self._index(name)
        return np.asarray(dataset[coordinate].values == name)

    def _group(self, group: str, measure: str) -> xr.Dataset:
        known = self.measures
        if group not in self.tree.children or measure not in known:
            raise ResultError(
                f"'{measure}' was not measured in this result.{suggest(measure, known)} "
                f"It has {', '.join(self.measures)}."
            )
        return self.tree[group].to_dataset()

    def _pair(self, variable: str, a: str, b: str) -> xr.DataArray:
        dataset = self._group("similarity", "cka")
        rows = np.flatnonzero(self._mask(dataset, "model_a", a))
        columns = np.flatnonzero(self._mask(dataset, "model_b", b))
        array = dataset[variable].isel(feature_a=rows, feature_b=columns)
        return xr.DataArray(
            array.values,
            dims=("layer_a", "layer_b"),
            coords={"layer_a": array["layer_a"].values, "layer_b": array["layer_b"].values},
            name=variable,
            attrs={**array.attrs, "model_a": a, "model_b": b},
        )

    def _similarity_table(self) -> pd.DataFrame:
        parts = []
        for i, a in enumerate(self.models):
            for b in self.models[i:]:
                low, high = self.interval("cka", a, b)
                part = pd.concat(
                    [
                        array.to_series().rename(name)
                        for name, array in {
                            "cka": self.cka(a, b),
                            "standard_error": self._pair("cka_standard_error", a, b),
                            "low": low,
                            "high": high,
                        }.items()
                    ],
                    axis=1,
                ).reset_index()
                if a == b:
                    part = part[part["layer_a"] <= part["layer_b"]]
                part.insert(0, "model_a", a)
                part.insert(2, "model_b", b)
                parts.append(part)
        return pd.concat(parts, ignore_index=True)


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
            if tree.attrs.get("format") != FORMAT:
                raise ResultError(
                    f"'{path}' is no vitprobe result of format {FORMAT}; write it again with "
                    "'vitprobe compare'"
                )
            result = Comparison(tree.load())
        _check_whole(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResultError(f"'{path}' is no whole vitprobe result: {what}") from error
    return result


def _open(path: Path) -> xr.DataTree:
    tree: xr.DataTree = xr.open_datatree(path, engine="h5netcdf")
    return tree


def _check_whole(result: Comparison) -> None:
    """Raise KeyError or ValueError for a result that lacks what its provenance names."""
    for name in ("measures", "notes", "images", "models"):
        if name not in result.provenance:
            raise KeyError(f"its provenance has no {name}")
    for measure in result.measures:
        group = "similarity" if measure == "cka" else "attention"
        if group not in result.tree.children or measure not in result.tree[group]:
            raise KeyError(f"it has no {measure}")
        held = result.tree[group].to_dataset()["model_a" if measure == "cka" else "model"]
        if set(held.values) != set(result.models):
            raise ValueError("its models are not those that its provenance names")


def similarity_dataset(
    features: Sequence[Feature],
    *,
    value: np.ndarray,
    standard_error: np.ndarray,
    sums: Mapping[str, np.ndarray],
) -> xr.Dataset:
    """The `similarity` group. All arrays are (features, features); `sums` are `CKA`'s state."""
    names, layers = [model for model, _ in features], [layer for _, layer in features]
    dims = ("feature_a", "feature_b")
    return xr.Dataset(
        {
            "cka": (dims, value, {"long_name": "CKA", "units": "1"}),
            "cka_standard_error": (dims, standard_error, {"long_name": "standard error of CKA"}),
            **{f"cka_{key}": (dims, array) for key, array in sums.items()},
        },
        coords={
            "model_a": ("feature_a", names),
            "layer_a": ("feature_a", layers),
            "model_b": ("feature_b", names),
            "layer_b": ("feature_b", layers),
        },
    )


def tokens_dataset(
    features: Sequence[Feature],
    *,
    first_direction_share: np.ndarray,
    first_direction_sums: np.ndarray,
) -> xr.Dataset:
    """The `tokens` group.

    Args:
        features: (model, layer) of each row.
        first_direction_share: (features,).
        first_direction_sums: (features, 2), the leading eigenvalue and the trace that it divides.
    """
    attrs = {"long_name": "share of variance along the first direction", "units": "1"}
    return xr.Dataset(
        {
            "first_direction_share": ("feature", first_direction_share, attrs),
            "first_direction_sums": (("feature", "sum"), first_direction_sums),
        },
        coords={
            "model": ("feature", [model for model, _ in features]),
            "layer": ("feature", [layer for _, layer in features]),
        },
    )


def attention_dataset(
    units: Sequence[Unit],
    images: Sequence[str],
    *,
    values: Mapping[str, np.ndarray],
    undefined_rows: Mapping[str, np.ndarray],
    uniform: Mapping[str, np.ndarray],
    info: Mapping[str, tuple[str, str]],
) -> xr.Dataset:
    """The `attention` group.

    Args:
        units: (model, block, head) of each column.
        images: names, in order of processing.
        values: by measure, (images, units) float32.
        undefined_rows: by measure, (images, units) int32.
        uniform: by measure with relative units, (units,).
        info: by measure, (long name, unit).
    """
    dims = ("image", "unit")
    variables: dict[str, Any] = {}
    for name, array in values.items():
        long_name, unit = info[name]
        variables[name] = (dims, array, {"long_name": long_name, "units": unit})
        variables[f"{name}_undefined_rows"] = (dims, undefined_rows[name])
        if name in uniform:
            variables[f"{name}_uniform"] = ("unit", uniform[name], {"units": unit})
    return xr.Dataset(
        variables,
        coords={
            "image": ("image", list(images)),
            "model": ("unit", [model for model, _, _ in units]),
            "layer": ("unit", [layer for _, layer, _ in units]),
            "head": ("unit", [head for _, _, head in units]),
        },
    )
