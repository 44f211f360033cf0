"""The training state on disk: written whole or not at all, read without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vitprobe.errors import CheckpointError, ResultError
from vitprobe.files import replacing


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the state at `path` in one step: tensors, numbers, strings, lists and dicts.

    Raises ResultError when it cannot be written; the state before it is then intact.
    """
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(state, file)
    except (ResultError, RuntimeError) as error:
        # torch reports a write that fails midway, as on a full disk, as a RuntimeError.
        raise ResultError(
            f"Could not write the training state {path}: {error}"
            + ("; the one before is intact." if path.exists() else ".")
        ) from error


def load_state(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU.

    Raises CheckpointError when it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"No training state {path} to resume from; start the run again with force."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises whatever the damaged bytes lead it to: zip, pickle, key and value errors.
        raise CheckpointError(
            f"The training state {path} is damaged and cannot be resumed from "
            f"({type(error).__name__}); start the run again with force."
        ) from error
    return state
