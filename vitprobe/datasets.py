"""The groups of a `Comparison` as xarray datasets: made of what measures compute, read by model.

Every variable carries its long name, its unit and what it is at `least` and `most`, so that a saved
result reads by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from vitprobe.measures.registry import MEASURES, PER_BLOCK, SYMMETRIC

Feature = tuple[str, int]
"""(model, layer)"""
Unit = tuple[str, int, int]
"""(model, block, head)"""


class SimilarityArrays(NamedTuple):
    """One similarity measure of every pair of features, (features, features) each."""

    value: np.ndarray
    standard_error: np.ndarray
    floor: np.ndarray
    """Beyond which a value is more than what permuted images give; nan where there is none."""
    degrees: float
    """Of freedom of the intervals; math.inf: normal."""
    images: int
    """How many the measure is computed on."""


class LayerArrays(NamedTuple):
    """One number of every feature that belongs to all images together, (features,) each."""

    value: np.ndarray
    standard_error: np.ndarray | None = None
    degrees: float = math.inf


class FourierArrays(NamedTuple):
    """Amplitude spectra of every feature, (features, steps) each, nan beyond a shorter spectrum."""

    frequency: np.ndarray
    """Units of pi radians a patch."""
    curve: np.ndarray
    standard_error: np.ndarray


def similarity_dataset(
    features: Sequence[Feature],
    *,
    measures: Mapping[str, SimilarityArrays],
    sums: Mapping[str, np.ndarray] | None = None,
) -> xr.Dataset:
    """The `similarity` group.

    Args:
        features: (model, layer) of each row and column; row a and column b hold the measure of
            (a, b).
        measures: by name.
        sums: the state of CKA that merges, by name, (…, features, features) each or a number.
    """
    dims = ("feature_a", "feature_b")
    variables: dict[str, Any] = {}
    for name, arrays in measures.items():
        attrs = _attrs(name) | {
            "degrees": arrays.degrees,
            "images": arrays.images,
            "symmetric": int(SYMMETRIC[name]),
        }
        title = MEASURES[name].title
        error, floor = f"standard error of {title}", f"floor of {title} under permuted images"
        variables[name] = (dims, arrays.value, attrs)
        variables[f"{name}_standard_error"] = (dims, arrays.standard_error, {"long_name": error})
        variables[f"{name}_floor"] = (dims, arrays.floor, {"long_name": floor})
    for name, array in (sums or {}).items():
        leading = tuple(f"{name}_{axis}" for axis in range(array.ndim - 2))
        variables[f"cka_{name}"] = ((*leading, *dims) if array.ndim else (), array)
    names, layers = _columns(features)
    return xr.Dataset(
        variables,
        coords={
            "model_a": ("feature_a", names),
            "layer_a": ("feature_a", layers),
            "model_b": ("feature_b", names),
            "layer_b": ("feature_b", layers),
        },
    )


def attention_dataset(
    units: Sequence[Unit],
    images: Sequence[str],
    *,
    values: Mapping[str, np.ndarray],
    undefined_rows: Mapping[str, np.ndarray],
    uniform: Mapping[str, np.ndarray],
    blocks: Sequence[Feature] = (),
) -> xr.Dataset:
    """The `attention` group.

    Args:
        units: (model, block, head) of each column of the measures of a head.
        images: names, in order of processing.
        values: by measure, (images, units) float32; (images, blocks) where heads are fused.
        undefined_rows: by measure, int32 of the same shape.
        uniform: by measure with relative units, (units,) or (blocks,).
        blocks: (model, block) of each column of the measures that fuse the heads.
    """
    variables: dict[str, Any] = {}
    for name, array in values.items():
        column = "block" if name in PER_BLOCK else "unit"
        dims = ("image", column)
        variables[name] = (dims, array, _attrs(name))
        variables[f"{name}_undefined_rows"] = (dims, undefined_rows[name])
        if name in uniform:
            variables[f"{name}_uniform"] = (column, uniform[name], {"units": MEASURES[name].unit})
    coords: dict[str, Any] = {
        "image": ("image", list(images)),
        "model": ("unit", [model for model, _, _ in units]),
        "layer": ("unit", [layer for _, layer, _ in units]),
        "head": ("unit", [head for _, _, head in units]),
    }
    if blocks:
        names, layers = _columns(blocks)
        coords |= {"block_model": ("block", names), "block_layer": ("block", layers)}
    return xr.Dataset(variables, coords=coords)


def tokens_dataset(
    features: Sequence[Feature],
    images: Sequence[str] = (),
    *,
    per_image: Mapping[str, np.ndarray] | None = None,
    per_layer: Mapping[str, LayerArrays] | None = None,
    first_direction_sums: np.ndarray | None = None,
    first_direction_squares: np.ndarray | None = None,
    fourier: FourierArrays | None = None,
) -> xr.Dataset:
    """The `tokens` group.

    Args:
        features: (model, layer) of each column.
        images: names, in order of processing; needed by `per_image`.
        per_image: by measure, (images, features) float32.
        per_layer: by measure (`first_direction_share`, `rankme`), numbers of all images together.
        first_direction_sums: (features, 2), the leading eigenvalue and the trace that it divides.
        first_direction_squares: (features, 2, 2), sums of products of what images add to these,
            which with them merge.
        fourier: the spectra behind `fourier_amplitude`.
    """
    variables: dict[str, Any] = {}
    names, layers = _columns(features)
    coords: dict[str, Any] = {"model": ("feature", names), "layer": ("feature", layers)}
    for name, array in (per_image or {}).items():
        coords["image"] = ("image", list(images))
        variables[name] = (("image", "feature"), array, _attrs(name))
    for name, arrays in (per_layer or {}).items():
        variables[name] = ("feature", arrays.value, _attrs(name) | {"degrees": arrays.degrees})
        if arrays.standard_error is not None:
            variables[f"{name}_standard_error"] = ("feature", arrays.standard_error)
    if first_direction_sums is not None:
        variables["first_direction_sums"] = (("feature", "sum"), first_direction_sums)
    if first_direction_squares is not None:
        products = ("feature", "sum", "other_sum")
        variables["first_direction_squares"] = (products, first_direction_squares)
    if fourier is not None:
        dims = ("feature", "step")
        attrs = _attrs("fourier_amplitude")
        variables["fourier_curve"] = (dims, fourier.curve, attrs)
        variables["fourier_curve_standard_error"] = (dims, fourier.standard_error)
        units = {"long_name": "frequency", "units": "pi rad / patch"}
        variables["fourier_frequency"] = (dims, fourier.frequency, units)
    return xr.Dataset(variables, coords=coords)


def _attrs(name: str) -> dict[str, Any]:
    info = MEASURES[name]
    least, most = info.bounds
    return {
        "long_name": info.title,
        "units": info.unit or "1",
        "least": float(least),
        "most": float(most),
    }


def _columns(features: Sequence[Feature]) -> tuple[list[str], list[int]]:
    return [model for model, _ in features], [layer for _, layer in features]


def pair(dataset: xr.Dataset, measure: str, variable: str, a: str, b: str) -> xr.DataArray:
    """A variable of `similarity` between the layers of two models: (layer_a, layer_b)."""
    rows, columns = dataset["model_a"].values == a, dataset["model_b"].values == b
    array = dataset[variable][np.flatnonzero(rows), np.flatnonzero(columns)]
    return xr.DataArray(
        array.values,
        dims=("layer_a", "layer_b"),
        coords={"layer_a": array["layer_a"].values, "layer_b": array["layer_b"].values},
        name=variable,
        attrs={**dataset[measure].attrs, **array.attrs, "model_a": a, "model_b": b},
    )


def columns(dataset: xr.Dataset, variable: str, model: str) -> xr.DataArray:
    """A model's part of a variable: (…, layer) of `tokens`, (…, unit) of `attention`.

    Units have the coordinates `layer` and `head`; a block whose heads are fused has head 0.
    """
    array = dataset[variable]
    (column,) = {"unit", "block", "feature"} & set(array.dims)
    prefix = "block_" if column == "block" else ""
    own = np.flatnonzero(dataset[f"{prefix}model"].values == model)
    layers = dataset[f"{prefix}layer"].values[own]
    array = array.isel({column: own}).reset_coords(drop=True)
    if column == "feature":
        return array.rename(feature="layer").assign_coords(layer=layers)
    heads = dataset["head"].values[own] if column == "unit" else np.zeros_like(layers)
    array = array.rename({column: "unit"}) if column == "block" else array
    return array.assign_coords(layer=("unit", layers), head=("unit", heads))


def by_head(array: xr.DataArray) -> xr.DataArray:
    """(…, unit) as (…, layer, head); a head that a layer does not have is nan."""
    layers, heads = (np.unique(array[dim].values) for dim in ("layer", "head"))
    dtype = np.result_type(array.dtype, np.float32)
    table = np.full((*array.shape[:-1], len(layers), len(heads)), np.nan, dtype)
    rows = np.searchsorted(layers, array["layer"].values)
    table[..., rows, np.searchsorted(heads, array["head"].values)] = array.values
    kept = {dim: array[dim].values for dim in array.dims if dim in array.coords}
    return xr.DataArray(
        table,
        dims=(*array.dims[:-1], "layer", "head"),
        coords={**kept, "layer": layers, "head": heads},
        name=array.name,
        attrs=array.attrs,
    )
