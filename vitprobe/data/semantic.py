"""Images with a class for every pixel, in the layouts of PASCAL VOC and ADE20K.

VOC (Everingham et al. 2010): JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/train.txt
and val.txt; value 0 is the background, a class like others. ADE (Zhou et al. 2017): images/ and
annotations/, each with training/ and validation/; value 0 is "other" and ignored, and class i is
value i + 1. Value 255 is ignored in both. A classes.txt in the folder, one name a line, says how
many classes there are; without it VOC has 21 and ADE 150.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitprobe.data.images import EXTENSIONS
from vitprobe.data.parts import Files, Names
from vitprobe.errors import DataError

IGNORED: Final = 255
"""In a map of classes: pixels that count for nothing."""

_VOC: Final = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa",
    "train", "tv monitor",
)  # fmt: skip


@dataclass(frozen=True)
class _Paths:
    """Reads files of these paths below a folder."""

    root: Path
    names: Names

    def __call__(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()


@dataclass(frozen=True, eq=False)
class Maps:
    """Images and their maps of classes.

    files: the images. maps: of each, the path of its map below `root`.
    classes: how many. shifted: whether 0 is ignored and class i is i + 1, as in ADE.
    """

    root: Path
    files: Files
    maps: Names
    classes: int
    shifted: bool

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """A hash of the names of images and maps."""
        names = "\n".join([*self.files.names, *self.maps])
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def check_sizes(self) -> None:
        """Look at the head of every file: before hours of training, and not after.

        Raises:
            DataError: a map is in colour, or of another size than its image, or a file is damaged.
        """
        for image, path in zip(self.files.names, self.maps, strict=True):
            size, _ = _head(self.root / image, "image")
            of_map, mode = _head(self.root / path, "map of classes")
            _check_mode(self.root / path, mode)
            if size != of_map:
                raise DataError(
                    f"'{image}' is {size[0]} x {size[1]} pixels, but its map of classes "
                    f"{of_map[0]} x {of_map[1]}"
                )

    def check_classes(self) -> None:
        """Read every map for classes that are none: before hours of training, and not after.

        Raises:
            DataError: as `targets`.
        """
        for i in range(len(self)):
            self.targets(i)

    def image(self, i: int) -> Tensor:
        """Image i: (channels, height, width) uint8. Raises DataError where it cannot be decoded."""
        return self.files.decode(i)

    def targets(self, i: int) -> Tensor:
        """The class of each pixel of image i: (height, width) uint8, or `IGNORED`.

        Raises:
            DataError: the map cannot be read, is in colour, or holds a class that is none.
        """
        path = self.root / self.maps[i]
        try:
            with Image.open(path) as image:
                _check_mode(path, image.mode)
                values = np.array(image).astype(np.int64)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read the map of classes '{path}': {error}") from error
        if self.shifted:
            values = np.where((values == 0) | (values == IGNORED), IGNORED + 1, values) - 1
        wrong = values[(values != IGNORED) & ((values < 0) | (values >= self.classes))]
        if len(wrong):
            raise DataError(
                f"'{path}' has a pixel of class {wrong[0] + self.shifted}, but there are "
                f"{self.classes} classes; list all of them in classes.txt"
            )
        return torch.from_numpy(values.astype(np.uint8))


def _head(path: Path, what: str) -> tuple[tuple[int, int], str]:
    """(width, height) and mode of an image, of which only the head is read."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the {what} '{path}'; replace or remove it") from error


def _check_mode(path: Path, mode: str) -> None:
    if mode not in ("P", "L", "I", "I;16", "1"):
        raise DataError(
            f"'{path}' is in colour ({mode}); a map of classes has one number a pixel, so convert "
            "it to indices"
        )


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A set to train and test segmentation on."""

    source: str
    train: Maps
    test: Maps
    classes: tuple[str, ...]

    def with_channels(self, channels: int) -> Segmentation:
        """The same, with images decoded to RGB (3) or luminance (1)."""
        train, test = (
            replace(part, files=replace(part.files, channels=channels))
            for part in (self.train, self.test)
        )
        return replace(self, train=train, test=test)


def load_semantic(source: str | Path) -> Segmentation:
    """The set of a folder in VOC's or ADE's layout.

    Args:
        source: the folder.

    Raises:
        DataError: no such folder, neither layout, or images or maps that are not there.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder '{root}' with images and maps of classes")
    names: tuple[str, ...]
    if (root / "SegmentationClass").is_dir():
        pairs, names, shifted = [_voc(root, part) for part in ("train", "val")], _VOC, False
    elif (root / "annotations" / "training").is_dir():
        parts = ("training", "validation")
        pairs = [_ade(root, part) for part in parts]
        names, shifted = tuple(f"class {i + 1}" for i in range(150)), True
    else:
        raise DataError(
            f"'{root}' has neither SegmentationClass/ (as VOC has) nor annotations/training/ (as "
            "ADE has)"
        )
    if set(pairs[0][0]) == set(pairs[1][0]):
        raise DataError(f"'{root}' lists the same images to train and to test on")
    classes = _classes(root) or names
    train, test = (
        Maps(
            root,
            Files(str(root), Names(images), None, _Paths(root, Names(images))),
            Names(maps),
            len(classes),
            shifted,
        )
        for images, maps in pairs
    )
    return Segmentation(str(source), train, test, classes)


def _classes(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not in UTF-8; convert it") from error
    names = tuple(name for name in names if name)
    if not 2 <= len(names) < IGNORED:
        raise DataError(f"'{path}' names {len(names)} classes; there must be 2 to {IGNORED - 1}")
    return names


def _voc(root: Path, part: str) -> tuple[list[str], list[str]]:
    listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
    try:
        stems = listing.read_text(encoding="utf-8").split()
    except FileNotFoundError as error:
        raise DataError(f"no '{listing}', which lists the images to {part} on") from error
    if not stems:
        raise DataError(f"'{listing}' lists no images")
    found = _by_stem(root, "JPEGImages")
    return _paired(root, stems, found, _by_stem(root, "SegmentationClass"), str(listing))


def _ade(root: Path, part: str) -> tuple[list[str], list[str]]:
    found = _by_stem(root, f"images/{part}")
    if not found:
        raise DataError(f"'{root / 'images' / part}' holds no images")
    where = f"images/{part}"
    return _paired(root, sorted(found), found, _by_stem(root, f"annotations/{part}"), where)


def _by_stem(root: Path, folder: str) -> dict[str, str]:
    if not (root / folder).is_dir():
        raise DataError(f"'{root}' has no folder {folder}/")
    return {
        path.stem: f"{folder}/{path.name}"
        for path in sorted((root / folder).iterdir())
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    }


def _paired(
    root: Path, stems: Sequence[str], images: dict[str, str], maps: dict[str, str], where: str
) -> tuple[list[str], list[str]]:
    for found, what in ((images, "image"), (maps, "map of classes")):
        absent = [stem for stem in stems if stem not in found]
        if absent:
            raise DataError(
                f"{len(absent)} of the {len(stems)} images of '{where}' have no {what} in "
                f"'{root}', the first being '{absent[0]}'; put them there"
            )
    return [images[stem] for stem in stems], [maps[stem] for stem in stems]
