"""Images that come decoded: checked, and brought to the channels that are wanted."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitprobe.data.blocks import LUMINANCE
from vitprobe.data.parts import Arrays, Labels, Part, Split, numbered_classes
from vitprobe.errors import DataError


def arrays(images: Any, labels: Any, source: str) -> Arrays:
    """Arrays or tensors as `Arrays`; (n, height, width) is grey.

    Raises:
        DataError: not images (n, channels, height, width), uint8 or floats in [0, 1], or not one
            label from 0 on for each.
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim and not len(images):
        raise DataError(f"'{source}' holds no images: its array is {_shape(images)}")
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(
            f"images of '{source}' are {_shape(images)}; give (n, channels, height, width)"
        )
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        raise DataError(
            f"images of '{source}' are {_shape(images)}, channels last; "
            "give (n, channels, height, width)"
        )
    if images.dtype != np.uint8:
        floating = np.issubdtype(images.dtype, np.floating)
        if not (floating and images.min() >= 0 and images.max() <= 1):
            raise DataError(
                f"images of '{source}' are {images.dtype} and not all in [0, 1]; "
                "give uint8 or floats in [0, 1], not normalised"
            )
        images = images.astype(np.float32, copy=False)
    return Arrays(images, None if labels is None else _labels(labels, len(images), source))


def load_npz(path: Path) -> Split:
    """`images` and `labels`, and where held-out ones are in it `test_images` and `test_labels`.

    Raises:
        DataError: no such arrays, or not images and labels.
    """
    if not zipfile.is_zipfile(path):
        raise DataError(f"cannot read '{path}': it is no archive of arrays as numpy.savez writes")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files if key.removeprefix("test_") in _KEYS}
            keys = file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    if "images" not in held:
        raise DataError(f"'{path}' holds {', '.join(keys) or 'nothing'}; name an array 'images'")
    train = arrays(held["images"], held.get("labels"), str(path))
    test = None
    if "test_images" in held:
        test = arrays(held["test_images"], held.get("test_labels"), str(path))
    return Split(train, test, numbered_classes(train.labels, test.labels if test else None))


def with_channels(part: Part, channels: int, source: str) -> Part:
    """The same images with 1 or 3 channels: colour as ITU-R BT.601 luminance, grey repeated.

    Raises:
        DataError: there is no way from the one to the other.
    """
    have = part.images.shape[1] if isinstance(part, Arrays) else 3
    if have == channels:
        return part
    if {have, channels} != {1, 3}:
        raise DataError(f"images of '{source}' have {have} channels and cannot be given {channels}")
    if not isinstance(part, Arrays):
        return replace(part, channels=channels)
    if channels == 3:
        return replace(part, images=np.repeat(part.images, 3, axis=1))
    grey = np.einsum("c,nchw->nhw", np.asarray(LUMINANCE, np.float32), part.images)[:, None]
    if part.images.dtype == np.uint8:
        return replace(part, images=np.rint(grey).astype(np.uint8))
    return replace(part, images=grey.clip(max=1))


_KEYS = ("images", "labels")


def _labels(values: Any, count: int, source: str) -> Labels:
    labels = np.asarray(values)
    if labels.ndim != 1 or len(labels) != count:
        raise DataError(f"labels of '{source}' are {_shape(labels)} for {count:,} images")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(f"labels of '{source}' must be whole numbers from 0 on")
    return labels.astype(np.int64)


def _shape(array: NDArray[Any]) -> str:
    return f"({', '.join(map(str, array.shape))})"
