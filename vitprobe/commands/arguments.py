"""What commands do with their arguments before anything heavy is imported."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from vitprobe.errors import ResultError, SourceError, no_images
from vitprobe.models.sources import OPTIONS, ModelSpec, no_checkpoint, parse_spec


def named(text: str) -> tuple[str | None, str]:
    """NAME=SPEC, or a spec alone; an = behind a comma, colon or slash belongs to the spec."""
    name, equals, spec = text.partition("=")
    if not equals or re.search(r"[,:/\\]", name):
        return None, text
    if not name or not spec:
        raise SourceError(f"'{text}' is no NAME=SPEC; write it as MAE=mae.pth")
    if name in OPTIONS:
        raise SourceError(
            f"'{text}' is an option of a model: join it to its spec by a comma, as in "
            f"MAE=mae.pth,{text}"
        )
    return name, spec


def spec_of(text: str, **options: Any) -> ModelSpec:
    """A spec, read; what is plainly wrong with it is told before torch is imported.

    Raises as `parse_spec`, and CheckpointError where no file is at its path.
    """
    spec = parse_spec(text, **options)
    if spec.kind == "file" and not os.path.lexists(spec.target):
        raise no_checkpoint(spec.target)
    return spec


def check_images(path: Path) -> None:
    """Raise DataError, before torch is imported, where there are no images at a path."""
    from vitprobe.data.archives import is_pattern  # numpy is too heavy for help

    if not os.path.lexists(path) and not is_pattern(str(path)):
        raise no_images(path)


def override(text: str) -> tuple[str, Any]:
    """KEY=VALUE of a recipe, the value as TOML reads it, or else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SourceError(f"'{text}' is no KEY=VALUE; write it as epochs=3")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def check_output(out: Path, force: bool) -> None:
    """Raise ResultError, before torch is imported, where a result plainly cannot go to `out`."""
    if out.exists() and not force:
        raise ResultError(f"'{out}' exists; give another --out, or --force to replace it")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ResultError(f"cannot write '{out}': '{parent}' is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResultError(f"cannot write '{out}': no permission to write in '{parent}'")
