"""Training states on disk: written whole or not at all, the one before kept, read inertly."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from vitprobe.errors import CheckpointError, ResultError
from vitprobe.files import replacing

T = TypeVar("T")


def previous(path: Path) -> Path:
    """Where the state before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, strings, lists and dicts; the one before moves aside.

    Raises ResultError when it cannot be written; the state before it is then intact.
    """
    try:
        with replacing(path) as partial:
            # torch hides why a write to a file failed; one to memory does not fail.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                path.replace(previous(path))
    except ResultError as error:
        raise ResultError(
            f"Could not write the training state {path}: {error}"
            + ("; the one before is intact." if path.exists() else ".")
        ) from error


def load_state(path: Path, use: Callable[[dict[str, Any]], T]) -> tuple[T, str]:
    """Use the state at `path`, on the CPU, or the one before it where that is missing or damaged.

    use: what to do with it; KeyError, TypeError, ValueError, AttributeError and RuntimeError say
        that it is no state of this run.

    Returns what `use` returns and, where it is the one before, what was wrong with the last.

    Raises CheckpointError when neither can be used, and whatever else `use` raises.
    """
    if not path.exists() and not previous(path).exists():
        raise CheckpointError(
            f"No training state {path} to resume from; start the run again with --force."
        )
    try:
        return _used(path, use), ""
    except CheckpointError as damage:
        if not previous(path).exists():
            raise CheckpointError(f"{damage}; start the run again with --force.") from damage
        try:
            return _used(previous(path), use), f"{damage}; going on from {previous(path).name}"
        except CheckpointError as also:
            raise CheckpointError(
                f"{damage}, nor can the one before be used ({also}); start the run again with "
                "--force."
            ) from also


def _used(path: Path, use: Callable[[dict[str, Any]], T]) -> T:
    state = _read(path)
    try:
        return use(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a training state of this recipe ({type(error).__name__})"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        # torch does not look at the checksums: a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"The training state {path} is missing") from error
    except Exception as error:
        # torch raises whatever the damaged bytes lead it to: zip, pickle, key and value errors.
        raise CheckpointError(
            f"The training state {path} is damaged ({type(error).__name__})"
        ) from error
    return state
