"""Read a model that was saved as a folder: its weights, whole or in shards, and its config.

So save transformers' `save_pretrained` and the repositories of the Hugging Face hub, timm's and
open_clip's among them. Nothing in the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitprobe.errors import CheckpointError
from vitprobe.models.checkpoint import CheckpointFile, read_checkpoint

# Names of the weights in the order of preference, each whole or as an index of shards.
_WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_INDEX = ".index.json"
# Later ones win where both state a fact.
_CONFIGS = {
    "preprocessor_config": ("preprocessor_config.json", "processor_config.json"),
    "config": ("config.json", "open_clip_config.json"),
}


def read_saved(path: str | Path) -> CheckpointFile:
    """Read a checkpoint file, or a folder that a library saved a model in.

    Raises CheckpointError as `read_checkpoint` and `read_folder` do.
    """
    path = Path(path)
    # os.path's tests, unlike those of Path, are False for names that no file can have.
    if os.path.isdir(path):
        return read_folder(path)
    beside = (path.parent / name for name in _CONFIGS["config"])
    if path.name in _WEIGHTS and any(map(os.path.isfile, beside)):
        return read_folder(path.parent, (path.name,))
    return read_checkpoint(path)


def read_folder(path: str | Path, weights: Iterable[str] = _WEIGHTS) -> CheckpointFile:
    """Read the first of these weights in a folder, and the configs beside them.

    `content` is {"model": what the weights' file holds, or all shards' tensors, "config": …,
    "preprocessor_config": …}. `sha256` is that of the weights' file; of shards, that of their
    hexadecimal sha256 in the order of their names, joined.

    Raises CheckpointError, naming the file, for a folder without weights, an index that does not
    name each tensor's shard, a missing or damaged shard, and a config that is no JSON object.
    """
    path = Path(path)
    configs = {key: config for key in _CONFIGS if (config := read_config(path, key))}
    file = _weights(path, weights)
    if file.name.endswith(_INDEX):
        tensors, sha256 = _shards(file)
        return CheckpointFile(path, "folder", {"model": tensors, **configs}, {}, sha256)
    whole = read_checkpoint(file)
    content = {"model": whole.content, **configs}
    return CheckpointFile(path, "folder", content, whole.metadata, whole.sha256)


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """What a folder states as "config" or "preprocessor_config"; empty where it has none.

    Raises CheckpointError where that is no JSON object.
    """
    names = (folder / name for name in _CONFIGS[kind])
    stated = next((_object(path) for path in names if path.is_file()), {})
    # Where images and text have one processor, its file holds that of the images.
    nested = stated.get("image_processor")
    return nested if isinstance(nested, dict) else stated


def folder_sha256(folder: Path, weights: Iterable[str] = _WEIGHTS) -> str:
    """Of the file of weights, or of the shards, as `read_folder` has it, which is not read.

    Raises CheckpointError for a folder without weights.
    """
    file = _weights(folder, weights)
    if not file.name.endswith(_INDEX):
        return _sha256(file)
    return _joined(_sha256(folder / name) for name in sorted({*_places(file).values()}))


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights, or an index of shards."""
    return any((folder / (name + end)).is_file() for name in _WEIGHTS for end in ("", _INDEX))


def _joined(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _weights(path: Path, names: Iterable[str]) -> Path:
    """The first of these files, or of their indices, that the folder has."""
    for name in names:
        for file in (path / name, path / (name + _INDEX)):
            if file.is_file():
                return file
    raise CheckpointError(
        f"'{path}' is a directory without weights ({', '.join(_WEIGHTS)}, or shards of one); give "
        "the checkpoint file in it, or run:DIR for a run of vitprobe pretrain."
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' is no JSON object; save the model again.")
    return value


def _places(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_name, places.values())):
        raise CheckpointError(
            f"'{index}' does not name the shard of each tensor; save the model again."
        )
    return places


def _is_name(value: Any) -> bool:
    """Whether it is the bare name of a file, which cannot lead out of the folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value


def _shards(index: Path) -> tuple[dict[str, Any], str]:
    places = _places(index)
    shards = {name: read_checkpoint(index.parent / name) for name in sorted({*places.values()})}
    tensors = {}
    for key, name in places.items():
        content = shards[name].content
        if not isinstance(content, Mapping) or key not in content:
            raise CheckpointError(
                f"'{index.parent / name}' lacks {key}, which '{index.name}' places there; copy the "
                "folder again."
            )
        tensors[key] = content[key]
    return tensors, _joined(shard.sha256 for shard in shards.values())


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
