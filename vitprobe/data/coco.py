"""Images with instances in COCO's format (Lin et al., "Microsoft COCO", ECCV 2014).

A set is a folder with annotations/instances_NAME.json and the images of each in NAME/ or
images/NAME/, where a NAME that begins with `train` is trained on and one that begins with `val` is
tested on; or `train=FILE.json,test=FILE.json`.

What files in this format are let do, as COCO's own tools let them: categories whose ids have gaps
or any order, images without annotations, crowds (`iscrowd`, trained on by nobody), boxes that reach
beyond the image, segmentations as polygons or run lengths. `area` and `iscrowd` may be left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from vitprobe.data.parts import Files, Names
from vitprobe.errors import DataError

_APART: Final = re.compile(r"train=(.+?),\s*test=(.+)")
_PART: Final = re.compile(r"(?:instances_)?(train|val)")


@dataclass(frozen=True)
class Category:
    """id: as the file has it. name: for people."""

    id: int
    name: str


@dataclass(frozen=True)
class _Beside:
    """Reads images of a folder."""

    root: Path
    names: Names

    def __call__(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()


class Instances:
    """Images and what is in them, in the order of the file.

    Annotations are kept as text: a million of Python's objects would be copied page by page into
    every worker process.

    Attributes:
        source: the annotation file.
        files: the images.
        ids: of the images. sizes: (height, width) of each.
        categories: in the order of their ids; label i + 1 is `categories[i]`, and 0 no object.
    """

    def __init__(
        self,
        source: str,
        files: Files,
        ids: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        annotations: Sequence[bytes],
        categories: Sequence[Category],
    ) -> None:
        self.source = source
        self.files = files
        self.ids = np.array(ids, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.categories = tuple(categories)
        self._text = b"".join(annotations)
        self._ends = np.cumsum([0, *map(len, annotations)])
        self._labels = {category.id: i + 1 for i, category in enumerate(categories)}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """A hash of the names of the images and of all annotations."""
        digest = hashlib.sha256(self._text)
        digest.update("\n".join(self.files.names).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def annotations(self, i: int) -> list[dict[str, Any]]:
        """Those of image i, as COCO's tools want them."""
        found: list[dict[str, Any]] = json.loads(self._text[self._ends[i] : self._ends[i + 1]])
        return found

    def trainable(self) -> Instances:
        """Only the images with something to learn from: an instance that is no crowd."""
        kept = [
            i
            for i in range(len(self))
            if any(_is_trained(one, *self.sizes[i]) for one in self.annotations(i))
        ]
        names = Names(self.files.names[i] for i in kept)
        read = self.files.read
        assert isinstance(read, _Beside)  # noqa: S101 - made by this module
        files = Files(
            self.files.source, names, None, _Beside(read.root, names), self.files.channels
        )
        return Instances(
            self.source,
            files,
            [int(self.ids[i]) for i in kept],
            [(int(self.sizes[i][0]), int(self.sizes[i][1])) for i in kept],
            [self._text[self._ends[i] : self._ends[i + 1]] for i in kept],
            self.categories,
        )

    def with_channels(self, channels: int) -> Instances:
        """The same, decoded to 1 or 3 channels."""
        made = object.__new__(Instances)
        made.__dict__ |= self.__dict__
        made.files = Files(self.files.source, self.files.names, None, self.files.read, channels)
        return made

    def image(self, i: int) -> Tensor:
        """Image i: (channels, height, width) uint8.

        Raises:
            DataError: it cannot be decoded, or is not of the size that the annotations are for.
        """
        image = self.files.decode(i)
        expected = tuple(int(side) for side in self.sizes[i])
        if tuple(image.shape[1:]) != expected:
            raise DataError(
                f"'{self.files.names[i]}' is {image.shape[2]} x {image.shape[1]} pixels, but "
                f"'{self.source}' was made for one of {expected[1]} x {expected[0]}; "
                "put the original image back"
            )
        return image

    def targets(self, i: int, *, masks: bool = True) -> dict[str, Tensor]:
        """What there is to learn of image i: no crowds, boxes cut off at the image's edge.

        Returns:
            boxes: (n, 4) float32, x and y of the first corner and of the last. labels: (n,) int64.
            masks: (n, height, width) uint8, where asked for.

        Raises:
            DataError: a mask is asked for and not there, or damaged.
        """
        height, width = (int(side) for side in self.sizes[i])
        kept = [one for one in self.annotations(i) if _is_trained(one, height, width)]
        corners = [_corners(one["bbox"], height, width) for one in kept]
        found = {
            "boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(
                [self._labels[one["category_id"]] for one in kept], dtype=torch.int64
            ),
        }
        if masks:
            drawn = [self._mask(one, height, width) for one in kept]
            empty = np.zeros((0, height, width), dtype=np.uint8)
            found["masks"] = torch.from_numpy(np.stack(drawn) if drawn else empty)
        return found

    def _mask(self, annotation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
        from pycocotools import mask as tools

        drawn = annotation.get("segmentation")
        if not drawn:
            raise DataError(
                f"annotation {annotation['id']} of '{self.source}' has no segmentation to learn "
                "masks from; add it, or set detector.masks=false"
            )
        self._check_size(annotation, height, width)
        try:
            if isinstance(drawn, list):
                coded = tools.merge(tools.frPyObjects(drawn, height, width))
            elif isinstance(drawn["counts"], list):
                coded = tools.frPyObjects(drawn, height, width)
            else:
                coded = drawn
            mask = decode_mask(coded)
        except Exception as error:
            # pycocotools raises whatever its C code stumbles over.
            raise DataError(
                f"the segmentation of annotation {annotation['id']} of '{self.source}' is neither "
                "polygons nor run lengths; mend or remove it"
            ) from error
        return mask

    def _check_size(self, annotation: Mapping[str, Any], height: int, width: int) -> None:
        drawn = annotation["segmentation"]
        size = drawn.get("size") if isinstance(drawn, dict) else None
        if size is not None and size != [height, width]:
            raise DataError(
                f"the segmentation of annotation {annotation['id']} of '{self.source}' is for an "
                f"image of size {size} (height, width), not {[height, width]}"
            )

    def check_masks(self) -> None:
        """Draw every mask, crowds among them: before hours of training, and not after.

        Raises:
            DataError: one that is not there, is damaged, or is for an image of another size.
        """
        for i, (height, width) in enumerate(self.sizes.tolist()):
            for one in self.annotations(i):
                self._mask(one, height, width)

    def ground_truth(self) -> dict[str, Any]:
        """The content of an annotation file, for COCO's tools."""
        return {
            "info": {},
            "images": [
                {"id": int(i), "height": int(h), "width": int(w)}
                for i, (h, w) in zip(self.ids, self.sizes, strict=True)
            ],
            "annotations": [one for i in range(len(self)) for one in self.annotations(i)],
            "categories": [{"id": one.id, "name": one.name} for one in self.categories],
        }


def decode_mask(coded: Any) -> np.ndarray:
    """(height, width) uint8 of pycocotools' run lengths."""
    from pycocotools import mask as tools

    with warnings.catch_warnings():
        # Of numpy 2, about how pycocotools hands its array over.
        warnings.simplefilter("ignore", DeprecationWarning)
        mask: np.ndarray = tools.decode(coded)
    return mask


def _corners(box: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    x, y, w, h = box
    return max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)


def _is_trained(annotation: Mapping[str, Any], height: int, width: int) -> bool:
    x1, y1, x2, y2 = _corners(annotation["bbox"], height, width)
    return not annotation["iscrowd"] and x2 > x1 and y2 > y1


@dataclass(frozen=True, eq=False)
class Detection:
    """A set to train and test detection on.

    train: images with something to learn from. test: all of theirs.
    left_out: how many training images have nothing to learn from.
    """

    source: str
    train: Instances
    test: Instances
    left_out: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories, in the order of their ids."""
        return tuple(category.name for category in self.train.categories)

    def with_channels(self, channels: int) -> Detection:
        """The same, with images decoded to RGB (3) or luminance (1)."""
        train, test = (part.with_channels(channels) for part in (self.train, self.test))
        return replace(self, train=train, test=test)


def load_coco(source: str | Path) -> Detection:
    """The set of that folder, or `train=FILE.json,test=FILE.json`.

    Args:
        source: see the module.

    Raises:
        DataError: no such file, one that is not in COCO's format, images that are not there,
            nothing to train on, or other categories among the test images.
    """
    text = str(source)
    apart = _APART.fullmatch(text)
    paths = [Path(part).expanduser() for part in apart.groups()] if apart else _found(Path(text))
    if paths[0] == paths[1]:
        raise DataError(
            f"'{text}' tests on the images that are trained on; give others after test="
        )
    train, test = (read_instances(path) for path in paths)
    if train.categories != test.categories:
        odd = sorted(
            {(one.id, one.name) for one in train.categories}
            ^ {(one.id, one.name) for one in test.categories}
        )[0]
        raise DataError(
            f"category {odd[0]} ('{odd[1]}') is in only one of '{paths[0]}' and '{paths[1]}'; "
            "both must list the same categories"
        )
    learnt = train.trainable()
    if not len(learnt):
        raise DataError(f"'{train.source}' has no image with an instance to learn from")
    if not len(test):
        raise DataError(f"'{test.source}' lists no images to test on")
    return Detection(text, learnt, test, len(train) - len(learnt))


def _found(folder: Path) -> list[Path]:
    folder = folder.expanduser()
    below = folder / "annotations"
    if not folder.is_dir():
        raise DataError(f"no folder '{folder}' with images and annotations in COCO's format")
    if not below.is_dir():
        raise DataError(
            f"'{folder}' has no annotations/; put instances_train.json and instances_val.json "
            "there, or give 'train=FILE.json,test=FILE.json'"
        )
    chosen = []
    for part in ("train", "val"):
        files = [
            path
            for path in sorted(below.glob("*.json"))
            if (match := _PART.match(path.stem)) and match[1] == part
        ]
        if not files:
            raise DataError(
                f"'{below}' has no instances_{part}….json; "
                "put it there, or give 'train=FILE.json,test=FILE.json'"
            )
        if len(files) > 1:
            raise DataError(
                f"'{below}' has both '{files[0].name}' and '{files[1].name}'; "
                "say which with 'train=FILE.json,test=FILE.json'"
            )
        chosen += files
    return chosen


def read_instances(path: Path) -> Instances:
    """What an annotation file says, checked, and the images it is about.

    Raises:
        DataError: see `load_coco`.
    """
    content = _parsed(path)
    categories = _categories(content, path)
    known = {category.id for category in categories}
    listed: dict[int, tuple[str, int, int]] = {}
    for entry in content["images"]:
        try:
            number = int(entry["id"])
            sides = int(entry["height"]), int(entry["width"])
            name = str(entry["file_name"])
            if min(sides) < 1 or not 0 <= number < 1 << 63:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"an image of '{path}' lacks a whole id, height or width of at least 1, or a "
                "file_name: "
                f"{str(entry)[:80]}"
            ) from error
        if number in listed:
            raise DataError(f"'{path}' lists image {number} twice; an id must be one image's")
        listed[number] = (name, *sides)
    below: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for count, entry in enumerate(content["annotations"], start=1):
        one = _annotation(entry, count, path)
        if one["image_id"] not in listed:
            raise DataError(
                f"annotation {entry.get('id')} of '{path}' is of image {one['image_id']}, "
                "which the file does not list"
            )
        if one["category_id"] not in known:
            raise DataError(
                f"annotation {entry.get('id')} of '{path}' is of category {one['category_id']}, "
                "which the file does not list"
            )
        below[one["image_id"]].append(one)
    names = Names(name for name, _, _ in listed.values())
    root = _images_of(path, names)
    _check_there(root, names, path)
    files = Files(str(root), names, None, _Beside(root, names))
    sizes = [(height, width) for _, height, width in listed.values()]
    texts = [json.dumps(below[number]).encode() for number in listed]
    return Instances(str(path), files, list(listed), sizes, texts, categories)


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no annotation file '{path}'") from error
    except OSError as error:
        raise DataError(f"cannot read annotations from '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is no JSON ({error}); fetch it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(
                f"'{path}' has no list of {key}, so it is no file of instances in COCO's format"
            )
    return content


def _categories(content: Mapping[str, Any], path: Path) -> list[Category]:
    try:
        found = [Category(int(one["id"]), str(one["name"])) for one in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a category of '{path}' lacks a whole id or a name") from error
    ids = [category.id for category in found]
    if not found or len(set(ids)) < len(ids):
        what = "lists a category id twice" if found else "lists no categories"
        raise DataError(f"'{path}' {what}; each class needs an id of its own")
    return sorted(found, key=lambda category: category.id)


def _annotation(entry: Any, number: int, path: Path) -> dict[str, Any]:
    """What COCO's tools want of an annotation.

    Numbered anew from 1: COCOeval takes an instance of id 0 for none.
    """
    try:
        box = [float(value) for value in entry["bbox"]]
        x, y, w, h = box
        # Absent and null alike: files of many tools have either.
        area = w * h if entry.get("area") is None else float(entry["area"])
        made = {
            "id": number,
            "image_id": int(entry["image_id"]),
            "category_id": int(entry["category_id"]),
            "bbox": box,
            "iscrowd": int(entry.get("iscrowd") or 0),
            "area": area,
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"annotation {number} of '{path}' lacks an image_id, a category_id or a bbox of four "
            f"numbers: {str(entry)[:80]}"
        ) from error
    if not all(map(math.isfinite, (x, y, w, h, area))):
        raise DataError(
            f"the bbox or area of annotation {entry.get('id')} of '{path}' is not finite"
        )
    if entry.get("segmentation"):
        made["segmentation"] = entry["segmentation"]
    return made


def _images_of(path: Path, names: Sequence[str]) -> Path:
    """The folder that holds the first image: NAME/, images/NAME/, images/ or beside the file."""
    part = path.stem.removeprefix("instances_")
    base = path.parent.parent if path.parent.name == "annotations" else path.parent
    places = [base / part, base / "images" / part, base / "images", base, path.parent]
    if len(names):
        for place in places:
            if (place / names[0]).is_file():
                return place
    return next((place for place in places if place.is_dir()), base)


def _check_there(root: Path, names: Sequence[str], path: Path) -> None:
    absent = [name for name in names if not (root / name).is_file()]
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(names)} images of '{path}' are not in '{root}', the first "
            f"being '{absent[0]}'; put them there"
        )
