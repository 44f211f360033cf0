"""A comparison reduced to what its figures and tables read: small enough to be committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import xarray as xr

NOTE: Final = (
    "This result is condensed: attention and token measures are means over images, so that they "
    "have no interval over images, and it cannot be merged with others."
)
_KEPT: Final = ("_standard_error", "_floor")
STEP: Final = 2.0**-14
"""Similarity is rounded to it: the bits below say nothing, and noise is what takes space."""


def condensed_groups(tree: xr.DataTree, similarity: tuple[str, ...]) -> Mapping[str, xr.Dataset]:
    """The groups of a Comparison's tree without samples, sums that merge, and images.

    similarity: names of the similarity measures; of them values, standard errors and floors stay,
    rounded to `STEP`.
    """
    groups: dict[str, xr.Dataset] = {}
    for name, group in tree.children.items():
        if name == "samples":
            continue
        dataset = group.to_dataset()
        if name == "similarity":
            kept = [one + end for one in similarity for end in ("", *_KEPT)]
            dataset = dataset[kept]
            rounded = {name: _rounded(array) for name, array in dataset.data_vars.items()}
            dataset = dataset.assign(rounded)
        if "image" in dataset.dims:
            dataset = _means(dataset)
        groups[name] = dataset
    return groups


def _rounded(array: xr.DataArray) -> xr.DataArray:
    return array.copy(data=(np.round(array.values / STEP) * STEP).astype(np.float32))


def _means(dataset: xr.Dataset) -> xr.Dataset:
    """One image that stands for all: means of values, sums of counted rows."""
    variables: dict[Any, xr.DataArray] = {}
    for name, array in dataset.data_vars.items():
        if "image" not in array.dims:
            variables[name] = array
        elif str(name).endswith("_undefined_rows"):
            variables[name] = array.sum("image", keep_attrs=True).expand_dims("image")
        else:
            mean = array.astype(float).mean("image", skipna=True, keep_attrs=True)
            variables[name] = mean.astype(array.dtype).expand_dims("image")
    label = f"mean of {dataset.sizes['image']} images"
    reduced = xr.Dataset(variables, attrs=dataset.attrs)
    return reduced.assign_coords(image=("image", [label]))
