"""Which Vision Transformers a checkpoint file holds, in whose dialect, and which one is meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprobe.errors import CheckpointError, suggest
from vitprobe.models.formats import DIALECTS, Branch, Dialect
from vitprobe.models.inert import Inert, as_mapping

_SETTINGS = (
    *("preprocessor_config", "config", "cfg", "model_args", "hyper_parameters", "hparams", "args"),
)
_DEPTH = 3
# Dictionaries in one file: a few bytes can claim more than anything could ever walk through.
_MANY = 10_000
# Of an encoder that is a moving average of another, and of that other, under whatever name.
_AVERAGED = re.compile(r"ema|teacher|momentum|target")
_AVERAGES, _TRAINED = ("ema", "teacher", "momentum"), ("student",)


def saved_settings(content: Any) -> dict[str, Any]:
    """Settings of the training run that lie beside the weights (`args`, `config`, `arch`, …)."""
    content = as_mapping(content)
    settings = {key: value for key, value in content.items() if isinstance(value, str | int)}
    for name in _SETTINGS:
        settings.update(as_mapping(content.get(name)))
    return settings


@dataclass(frozen=True)
class Choice:
    """The encoder to load.

    name: what it is called; None where the file holds no other and none was asked for by name.
    others: prefixes of the other encoders in the same state dict.
    """

    dialect: Dialect
    branch: Branch
    name: str | None
    others: tuple[str, ...]


def choose_branch(
    path: Path, content: Any, settings: Mapping[str, Any], wanted: str | None
) -> Choice:
    """The encoder named `wanted`, or else the default of the file's dialect.

    Raises CheckpointError where the file holds no Vision Transformer, or not the one wanted, or
    several in different dialects, none of which is the default.
    """
    state_dicts = _state_dicts(path, content)
    found = _encoders(state_dicts, settings)
    if not found:
        raise CheckpointError(f"'{path}' {_no_transformer(content, state_dicts)}")
    branches = [branch for _, branch in found]
    named: dict[str, Branch] = {}
    for branch in branches:
        name = branch.name if branch.name not in named else f"{branch.container}:{branch.prefix}"
        named.setdefault(name, branch)
    dialect = found[0][0]
    if wanted is not None:
        name = _called(path, wanted, named)
    elif any(other.landmark != dialect.landmark for other, _ in found):
        raise CheckpointError(
            f"'{path}' holds encoders of different kinds: {', '.join(named)}; choose one with "
            "branch=."
        )
    else:
        name = next((name for name in dialect.branches if name in named), next(iter(named)))
    chosen = named[name]
    dialect = next(dialect for dialect, branch in found if branch is chosen)
    return Choice(
        dialect,
        chosen,
        name if wanted or len(named) > 1 else None,
        tuple(
            branch.prefix
            for branch in branches
            if branch.container == chosen.container and branch.prefix != chosen.prefix
        ),
    )


def _called(path: Path, wanted: str, named: Mapping[str, Branch]) -> str:
    if wanted in named:
        return wanted
    there = [
        name
        for name, branch in named.items()
        if wanted in (branch.container, branch.prefix.rstrip("."))
    ]
    if len(there) == 1:
        return there[0]
    if wanted in _AVERAGES + _TRAINED:
        alike = [name for name in named if wanted in name.lower()] or [
            name for name in named if (wanted in _AVERAGES) == bool(_AVERAGED.search(name.lower()))
        ]
        if len(alike) == 1:
            return alike[0]
    raise CheckpointError(
        f"'{path}' has no branch '{wanted}'; it holds {', '.join(named)}.{suggest(wanted, named)}"
    )


def _encoders(
    state_dicts: Sequence[tuple[str, dict[str, Tensor]]], settings: Mapping[str, Any]
) -> list[tuple[Dialect, Branch]]:
    """Every encoder of the file, in the first dialect that recognises it."""
    found: dict[tuple[str, str], tuple[Dialect, Branch]] = {}
    for dialect in DIALECTS:
        branches = [
            Branch(container, key.removesuffix(dialect.landmark), tensors)
            for container, tensors in state_dicts
            for key in tensors
            if key == dialect.landmark or key.endswith(f".{dialect.landmark}")
        ]
        if branches and dialect.recognise(branches, settings):
            for branch in branches:
                place = branch.container, branch.prefix + dialect.landmark
                found.setdefault(place, (dialect, branch))
    return list(found.values())


def _state_dicts(path: Path, content: Any) -> list[tuple[str, dict[str, Tensor]]]:
    """The dictionaries with tensors among the content and what it nests, by their paths in it.

    Raises CheckpointError where it nests too many to walk through.
    """
    found: list[tuple[str, dict[str, Tensor]]] = []
    walked = 0

    def walk(value: Any, container: str, depth: int) -> None:
        nonlocal walked
        if not isinstance(value, Mapping):
            return
        walked += 1
        if walked > _MANY:
            raise CheckpointError(
                f"'{path}' nests more than {_MANY:,} dictionaries; save the model's state_dict() "
                "alone."
            )
        if tensors := _tensors(value):
            found.append((container, tensors))
        for key, inner in value.items() if depth else ():
            if isinstance(key, str):
                walk(inner, f"{container}.{key}".lstrip("."), depth - 1)

    walk(content, "", _DEPTH)
    return found


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _no_transformer(content: Any, state_dicts: Sequence[tuple[str, dict[str, Tensor]]]) -> str:
    if isinstance(content, Inert):
        return "holds a whole pickled object, not weights; save the model's state_dict() instead."
    keys = [key for _, tensors in state_dicts for key in tensors]
    if not keys:
        return "holds no tensors under names; save the model's state_dict() instead."
    return (
        f"holds no Vision Transformer that vitprobe knows: none of its {len(keys)} tensors "
        f"({', '.join(keys[:3])}, …) is a '{DIALECTS[-1].landmark}' or its like in other dialects."
    )
