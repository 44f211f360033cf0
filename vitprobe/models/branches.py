"""Which Vision Transformers a checkpoint file holds, in whose dialect, and which one is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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

    Raises CheckpointError where the file holds no Vision Transformer, or not the one wanted.
    """
    for dialect in DIALECTS:
        branches = list(_find(content, dialect.landmark))
        if branches and dialect.recognise(branches, settings):
            break
    else:
        raise CheckpointError(f"'{path}' {_no_transformer(content)}")
    named: dict[str, Branch] = {}
    for branch in branches:
        name = branch.name if branch.name not in named else f"{branch.container}:{branch.prefix}"
        named.setdefault(name, branch)
    if wanted is None:
        name = next((name for name in dialect.branches if name in named), next(iter(named)))
    else:
        name = _called(path, wanted, named)
    chosen = named[name]
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
    for name, branch in named.items():
        if wanted in (name, branch.container, branch.prefix.rstrip(".")):
            return name
    if wanted in _AVERAGES + _TRAINED:
        alike = [name for name in named if wanted in name.lower()] or [
            name for name in named if (wanted in _AVERAGES) == bool(_AVERAGED.search(name.lower()))
        ]
        if len(alike) == 1:
            return alike[0]
    raise CheckpointError(
        f"'{path}' has no branch '{wanted}'; it holds {', '.join(named)}.{suggest(wanted, named)}"
    )


def _find(
    content: Any, landmark: str, container: str = "", depth: int = _DEPTH
) -> Iterator[Branch]:
    if not isinstance(content, Mapping):
        return
    tensors = _tensors(content)
    for key in tensors:
        if key == landmark or key.endswith(f".{landmark}"):
            yield Branch(container, key.removesuffix(landmark), tensors)
    if depth:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _find(value, landmark, f"{container}.{key}".lstrip("."), depth - 1)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _no_transformer(content: Any) -> str:
    if isinstance(content, Inert):
        return "holds a whole pickled object, not weights; save the model's state_dict() instead."
    keys = list(_all_keys(content))
    if not keys:
        return "holds no tensors under names; save the model's state_dict() instead."
    return (
        f"holds no Vision Transformer that vitprobe knows: none of its {len(keys)} tensors "
        f"({', '.join(keys[:3])}, …) is a '{DIALECTS[-1].landmark}' or its like in other dialects."
    )


def _all_keys(content: Any, depth: int = _DEPTH) -> Iterator[str]:
    if isinstance(content, Mapping):
        yield from _tensors(content)
        if depth:
            for value in content.values():
                yield from _all_keys(value, depth - 1)
