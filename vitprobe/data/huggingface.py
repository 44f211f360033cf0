"""Data sets of Hugging Face's `datasets`, from its hub or from a folder that it saved."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vitprobe.data.folders import HELD_OUT
from vitprobe.data.parts import Files, Names, Split, numbered_classes
from vitprobe.errors import DataError

_LABELS: Final = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class _Rows:
    """Reads the encoded images of a data set with one column."""

    rows: Any

    def __call__(self, i: int) -> bytes:
        (image,) = self.rows[i].values()
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()


def load_huggingface(name: str) -> Split:
    """The data set of that name, or in the folder of that name if there is one.

    Its split `train`, or the only one it has, is trained on; `validation` or `test` is held out.

    Raises:
        DataError: `datasets` is not installed, no such data set, or not one column of images and at
            most one of labels in it.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"'hf:{name}' needs the package datasets; install vitprobe[hf]") from None
    try:
        local = os.path.isdir(name) and _was_saved(name)
        found = datasets.load_from_disk(name) if local else datasets.load_dataset(name)
    except Exception as error:
        # The hub, the file systems and the readers below raise errors of their own.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot load 'hf:{name}': {why}") from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    train = splits.get("train") if len(splits) > 1 else next(iter(splits.values()))
    if train is None:
        raise DataError(f"'hf:{name}' has no split 'train' among {', '.join(splits)}")
    held_out = next((splits[part] for part in HELD_OUT if part in splits), None)
    if held_out is train:
        held_out = None
    parts = [_part(datasets, name, part) for part in (train, held_out) if part is not None]
    classes = _classes(train) or numbered_classes(*(part.labels for part in parts))
    return Split(parts[0], parts[1] if len(parts) > 1 else None, classes)


def _was_saved(folder: str) -> bool:
    marks = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, mark)) for mark in marks)


def _columns(part: Any) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in part.features.items())


def _label_column(part: Any) -> str | None:
    named = [name for name, kind in part.features.items() if type(kind).__name__ == "ClassLabel"]
    preferred = next((name for name in _LABELS if name in part.features), None)
    return preferred or (named[0] if len(named) == 1 else None)


def _classes(part: Any) -> tuple[str, ...]:
    column = _label_column(part)
    return tuple(getattr(part.features[column], "names", None) or ()) if column else ()


def _part(datasets: Any, name: str, part: Any) -> Files:
    images = [key for key, kind in part.features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise DataError(
            f"'hf:{name}' must have one column of images; its columns are {_columns(part)}"
        )
    column = _label_column(part)
    if column is None and any(type(k).__name__ == "ClassLabel" for k in part.features.values()):
        raise DataError(
            f"'hf:{name}' has several columns of classes; its columns are {_columns(part)}"
        )
    labels = None
    if column is not None:
        values = np.asarray(part.with_format("numpy")[column][:])
        if not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
            raise DataError(
                f"column '{column}' of 'hf:{name}' must hold numbers from 0 on for every image; "
                f"its columns are {_columns(part)}"
            )
        labels = values.astype(np.int64)
    rows = part.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    names = Names(f"row {i}" for i in range(len(part)))
    return Files(f"hf:{name}", names, labels, _Rows(rows))
