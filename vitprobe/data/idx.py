"""The idx files of MNIST and its successors: LeCun, "The MNIST database of handwritten digits".

Two zero bytes, the type of the values (8 for unsigned bytes), the number of axes, the length of
each axis as a big-endian 32-bit integer, and then the values.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vitprobe.data.arrays import arrays
from vitprobe.data.parts import Arrays, Split, numbered_classes
from vitprobe.errors import DataError

FASHION_CLASSES: Final = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_FOLDERS: Final = (
    "/usr/share/datasets/fashion-mnist",  # Debian's package
    "~/.keras/datasets/fashion-mnist",
    "data/FashionMNIST/raw",  # torchvision's, from where it is usually told to
)
_NAME: Final = re.compile(r"(train|t10k|test)-(images|labels)[.-]idx[13]-ubyte(?:\.gz)?")


def load_fashion_mnist() -> Split:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017) from where it is usually installed.

    Raises:
        DataError: it is in none of these places.
    """
    for folder in _FASHION_FOLDERS:
        if holds_idx(Path(folder).expanduser()):
            return load_idx(Path(folder).expanduser())._replace(classes=FASHION_CLASSES)
    raise DataError(
        f"fashion-mnist is not in {', '.join(_FASHION_FOLDERS)}; install Debian's package "
        "dataset-fashion-mnist, or name a folder with its four idx files instead"
    )


def holds_idx(folder: Path) -> bool:
    """Whether training images lie in the folder as idx."""
    return folder.is_dir() and ("train", "images") in _files(folder)


def load_idx(folder: Path) -> Split:
    """The images and labels `train-…-idx…-ubyte` and `t10k-…` or `test-…`, plain or as .gz.

    Raises:
        DataError: labels are missing, or a file is damaged or none of its kind.
    """
    files = _files(folder)
    train = _part(folder, files, "train")
    test = _part(folder, files, "test") if ("test", "images") in files else None
    return Split(train, test, numbered_classes(train.labels, test.labels if test else None))


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    # In reverse, so that of x and x.gz the first one, which opens faster, is what stays.
    names = sorted(folder.iterdir(), reverse=True)
    found = [(_NAME.fullmatch(path.name), path) for path in names]
    return {
        ("train" if match[1] == "train" else "test", match[2]): path
        for match, path in found
        if match
    }


def _part(folder: Path, files: dict[tuple[str, str], Path], part: str) -> Arrays:
    if (part, "labels") not in files:
        raise DataError(f"'{folder}' holds {files[part, 'images'].name} without its labels")
    images, labels = read_idx(files[part, "images"], 3), read_idx(files[part, "labels"], 1)
    if len(images) != len(labels):
        raise DataError(
            f"'{files[part, 'images']}' holds {len(images):,} images and "
            f"'{files[part, 'labels'].name}' {len(labels):,} labels; they must be as many"
        )
    return arrays(images, labels, str(folder))


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The unsigned bytes of one file, which must have so many axes.

    Raises:
        DataError: the file is damaged, cut short, or something else.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    magic = bytes([0, 0, 8, axes])
    if content[:4] != magic:
        raise DataError(
            f"'{path}' begins with {content[:4].hex(' ') or 'nothing'} where idx data of {axes} "
            f"axes begin with {magic.hex(' ')}"
        )
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"'{path}' ends within its header; get it again")
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    wanted = start + math.prod(shape)
    if len(content) != wanted:
        raise DataError(
            f"'{path}' has {len(content):,} bytes where its header announces {wanted:,}; "
            "get it again"
        )
    # A copy: an array on the bytes themselves could not be written to, which torch warns of.
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
