"""The main numbers of a comparison as JSON, for scripts: `vitprobe compare --json`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from vitprobe.tables import pairs

if TYPE_CHECKING:
    import xarray as xr

    from vitprobe.results import Comparison

FORMAT: Final = 1


def summary(result: Comparison) -> dict[str, Any]:
    """What a script asks of a comparison, as JSON-able values; undefined numbers are None.

    Returns:
        `format` (1), `vitprobe` (the version), `images` (source, count, sha256), `models` (name,
        spec, sha256, dialect, parameters, input_size, facts, assumed), `measures`, `notes`, and

        - `similarity`: for each measure and pair of models, layers at the same depth (see
          `Comparison.equal_depth`): `layers` (layer_a, layer_b, value, low, high), their `mean`,
          and `most_different`, the layers of lowest value;
        - `by_layer`: for each attention and token measure and model, `value`, `low` and `high` of
          every layer, in `units`;
        - `differences`: the rows of `Comparison.differences`;
        - `group_means`, `group_differences`: the rows of those; empty without groups;
        - `scores`: the rows of `Comparison.scores`; empty without evaluations.
    """
    of_two = [m for m in result.measures if result.group_of(m) == "similarity"]
    of_one = [m for m in result.measures if m not in of_two]
    grouped = bool(result.groups)
    return {
        "format": FORMAT,
        "vitprobe": result.provenance["versions"].get("vitprobe"),
        "images": {key: result.provenance["images"].get(key) for key in _OF_IMAGES},
        "models": [_model(result, name) for name in result.models],
        "measures": list(result.measures),
        "notes": result.notes,
        "similarity": [_pair(result, m, a, b) for m in of_two for a, b in pairs(result)],
        "by_layer": [_layers(result, m, name) for m in of_one for name in result.measured(m)],
        "differences": _rows(result.differences()),
        "group_means": _rows(result.group_means()) if grouped else [],
        "group_differences": _rows(result.group_differences()) if grouped else [],
        "scores": _rows(result.scores),
    }


_OF_IMAGES: Final = ("source", "count", "sha256")
_OF_MODELS: Final = ("name", "spec", "sha256", "dialect", "parameters", "input_size", "assumed")


def _model(result: Comparison, name: str) -> dict[str, Any]:
    known = result.describe(name)
    facts = {key: fact["value"] for key, fact in known["facts"].items()}
    return {**{key: known.get(key) for key in _OF_MODELS}, "facts": facts}


def _pair(result: Comparison, measure: str, a: str, b: str) -> dict[str, Any]:
    found = result.equal_depth(measure, a, b)
    layers = [
        {"layer_a": int(i), "layer_b": int(j), **{k: _number(v) for k, v in ends.items()}}
        for i, j, ends in zip(
            found["layer"].values, found["layer_b"].values, _columns(found), strict=True
        )
    ]
    defined = [(layer["value"], layer) for layer in layers if layer["value"] is not None]
    return {
        "measure": measure,
        "model_a": a,
        "model_b": b,
        "mean": _number(found["value"].mean()),
        "most_different": min(defined, key=lambda one: one[0], default=(0.0, None))[1],
        "layers": layers,
    }


def _columns(found: xr.Dataset) -> list[dict[str, float]]:
    names = ("value", "low", "high")
    values = zip(*(found[name].values for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in values]


def _layers(result: Comparison, measure: str, name: str) -> dict[str, Any]:
    found = result.by_layer(measure, name)
    return {
        "measure": measure,
        "model": name,
        "units": found.attrs["units"],
        "layers": [int(layer) for layer in found["layer"].values],
        **{key: [_number(v) for v in found[key].values] for key in ("value", "low", "high")},
    }


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if value is pd.NA:
        return None
    return _number(value) if isinstance(value, float) else value


def _number(value: Any) -> float | None:
    """A float, None where it is undefined or infinite: JSON has neither."""
    number = float(value)
    return number if math.isfinite(number) else None
