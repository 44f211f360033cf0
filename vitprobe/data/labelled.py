"""Labelled images from wherever they are, for the training recipes."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vitprobe.data.archives import expand, is_pattern, list_tar, list_zip
from vitprobe.data.arrays import arrays, load_npz, with_channels
from vitprobe.data.cifar import cifar_kind, load_cifar
from vitprobe.data.folders import load_archive, load_folder
from vitprobe.data.huggingface import load_huggingface
from vitprobe.data.idx import holds_idx, load_fashion_mnist, load_idx
from vitprobe.data.parts import (
    Arrays,
    Files,
    Labelled,
    Split,
    numbered_classes,
    same_classes,
)
from vitprobe.data.published import load_published, published_name
from vitprobe.data.shards import is_shard, load_shards
from vitprobe.errors import DataError, suggest

__all__ = ["Arrays", "Files", "Labelled", "load_labelled"]

_DIGITS_TRAINING_IMAGES: Final = 1437
_APART: Final = re.compile(r"train=(.+?),\s*test=(.+)")


def load_labelled(source: Any, *, channels: int | None = None) -> Labelled:
    """Images to train on and, where the source has them, held-out ones.

    Args:
        source: one of

            - `digits`, scikit-learn's; `fashion-mnist`, where it is installed;
            - a folder with idx files; a CIFAR archive for Python or its folder;
            - a folder, zip or uncompressed tar of images, see `vitprobe.data.folders`;
            - tar shards, as a pattern `shards-{0000..0099}.tar` or their folder, see
              `vitprobe.data.shards`;
            - `hf:` and the name or folder of a Hugging Face data set;
            - `cifar10:`, `cifar100:`, `flowers102:`, `pets:`, `aircraft:`, `cars:` or `inat18:` and
              the folder that torchvision keeps it in, see `vitprobe.data.published`;
            - an .npz with `images`, `labels`, `test_images`, `test_labels`;
            - `train=` one of these `,test=` another;
            - a pair of arrays (images, labels), images (n, channels, height, width) uint8 or floats
              in [0, 1], labels (n,) or None;
            - what this function returned.
        channels: 1 or 3, to have colour turned into ITU-R BT.601 luminance and grey repeated. As
            stored where it is None, except for encoded images, which are then decoded to 3.

    Raises:
        DataError: no such source, nothing to train on in it, damaged data, or other classes among
            the held-out images.
    """
    found = source if isinstance(source, Labelled) else _load(source)
    if channels is None:
        return found
    train, test = with_channels(found.train, channels, found.source), found.test
    if test is not None:
        test = with_channels(test, channels, found.source)
    return replace(found, train=train, test=test)


def _load(source: Any) -> Labelled:
    if isinstance(source, tuple) and len(source) == 2:
        part = arrays(*source, "the arrays given")
        return Labelled("arrays", part, None, numbered_classes(part.labels))
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"cannot read labelled images from {type(source).__name__}; "
            "give a source's name, a path, or a pair (images, labels)"
        )
    text = os.fspath(source)
    apart = _APART.fullmatch(text)
    split = _apart(text, *apart.groups()) if apart else _split(text)
    if split.train is None:
        raise DataError(
            f"'{text}' holds held-out images only; give 'train=…,test={text}' with some to train on"
        )
    return Labelled(text, split.train, split.test, split.classes)


def _apart(source: str, train: str, test: str) -> Split:
    first, second = _split(train), _split(test)
    if first.train is None:
        raise DataError(f"'{train}' holds held-out images only, nothing to train on")
    held_out = second.test or second.train
    if held_out is None:
        raise DataError(f"'{test}' holds no images")
    if train == test and second.test is None:
        raise DataError(
            f"'{source}' tests on the images that are trained on; give others after test="
        )
    held_out = same_classes(source, first.classes, second.classes, held_out)
    return Split(first.train, held_out, first.classes)


def _split(source: str) -> Split:
    if source in _NAMED:
        return _NAMED[source]()
    if source.startswith("hf:"):
        return load_huggingface(source.removeprefix("hf:"))
    if published_name(source):
        return load_published(source)
    if is_pattern(source):
        return load_shards(source, expand(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    raise DataError(
        f"no labelled images '{source}': there is no such file or folder, and it is none of "
        f"{', '.join(_NAMED)}, hf:NAME, cifar10:FOLDER and its like.{suggest(source, _NAMED)}"
    )


def _from_folder(path: Path) -> Split:
    if holds_idx(path):
        return load_idx(path)
    if cifar_kind(path):
        return load_cifar(path)
    shards = sorted(path.glob("*.tar"))
    return load_shards(str(path), shards) if shards else load_folder(path)


def _from_file(path: Path) -> Split:
    if path.suffix == ".npz":
        return load_npz(path)
    if zipfile.is_zipfile(path):
        return load_archive(path, *list_zip(path))
    if cifar_kind(path):
        return load_cifar(path)
    if path.suffix == ".tar" or tarfile.is_tarfile(path):
        members, folders = list_tar(path)
        if is_shard(members):
            return load_shards(str(path), [path])
        return load_archive(path, members, folders)
    raise DataError(
        f"'{path}' is no source of labelled images; "
        "give a folder, a zip, an uncompressed tar, a CIFAR archive or an .npz"
    )


def _digits() -> Split:
    """1,797 handwritten digits, 8 x 8 grey, 0..16 in the source (Alpaydin & Kaynak, UCI, 1998).

    The split is the same in every run whatever its seed, so that test accuracies compare.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    train, test = (
        arrays(bunch.images[part, None] / 16, bunch.target[part], "digits")
        for part in (order[:_DIGITS_TRAINING_IMAGES], order[_DIGITS_TRAINING_IMAGES:])
    )
    return Split(train, test, tuple(str(name) for name in bunch.target_names))


_NAMED: Final = {"digits": _digits, "fashion-mnist": load_fashion_mnist}
