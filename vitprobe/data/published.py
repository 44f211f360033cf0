"""Published sets of labelled images in the folders that torchvision keeps them in.

`NAME:PATH`, where PATH is the folder that torchvision calls the root. The official splits: CIFAR-10
and CIFAR-100 (Krizhevsky 2009), Oxford Flowers-102 (Nilsback & Zisserman 2008; training and
validation images together are trained on, as in transfer learning), Oxford-IIIT Pet (Parkhi et al.
2012), FGVC-Aircraft (Maji et al. 2013, variants; training and validation images together), Stanford
Cars (Krause et al. 2013) and iNaturalist 2018 (Van Horn et al. 2018; its validation images are the
test, as test labels are not public).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from torchvision import datasets

from vitprobe.data.cifar import cifar_kind, load_cifar
from vitprobe.data.folders import Loose
from vitprobe.data.parts import Files, Names, Split
from vitprobe.errors import DataError


class _Set(NamedTuple):
    """title: its name. layout: what is expected below the root. read: of a root, as a split.
    download: into a root; None where torchvision cannot."""

    title: str
    layout: str
    read: Callable[[Path], Split]
    download: Callable[[Path], Any] | None


def published_name(source: str) -> str:
    """NAME of `NAME:PATH`; "" for any other source."""
    name, colon, _ = source.partition(":")
    return name if colon and name in PUBLISHED else ""


def load_published(source: str) -> Split:
    """The images of `NAME:PATH`.

    Raises:
        DataError: they are not there, or not as published; the layout that was expected is said.
    """
    name = published_name(source)
    root, known = _root(source), PUBLISHED[name]
    try:
        return known.read(root)
    except MemoryError:
        raise
    except Exception as error:
        # torchvision and the readers below raise errors of their own.
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        how = "or download them" if known.download else "which torchvision cannot download"
        raise DataError(
            f"cannot read {known.title} from '{root}' ({why}): put {known.layout} there, {how}"
        ) from error


def download(source: str) -> None:
    """Have torchvision download the images of `NAME:PATH` into PATH, where they are not there yet.

    Raises:
        DataError: the source is none of these, has no public download, or cannot be fetched.
    """
    name = published_name(source)
    if not name:
        raise DataError(
            f"'{source}' is not to be downloaded; give one of {', '.join(PUBLISHED)} as NAME:PATH"
        )
    root, known = _root(source), PUBLISHED[name]
    if known.download is None:
        raise DataError(
            f"torchvision cannot download {known.title}; get it from its authors and put "
            f"{known.layout} into '{root}'"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        known.download(root)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"cannot download {known.title} into '{root}': {why}") from error


def _root(source: str) -> Path:
    name, _, path = source.partition(":")
    if not path:
        raise DataError(f"'{source}' names no folder; write {name}:PATH")
    return Path(path).expanduser()


def _files(root: Path, paths: Sequence[str | os.PathLike[str]], labels: Sequence[int]) -> Files:
    """paths: below the root, or relative to it."""
    names = Names(
        os.path.relpath(path, root)
        if os.path.isabs(path) or str(path).startswith(str(root))
        else str(path)
        for path in paths
    )
    return Files(str(root), names, np.asarray(labels, dtype=np.int64), Loose(root, names))


def _cifar(folder: str) -> Callable[[Path], Split]:
    def read(root: Path) -> Split:
        if not root.is_dir() or cifar_kind(root) != folder:
            raise DataError("not found")
        return load_cifar(root)

    return read


def _flowers(root: Path) -> Split:
    train, val, test = (datasets.Flowers102(root, split) for split in ("train", "val", "test"))
    labels = [*train._labels, *val._labels]
    classes = tuple(str(k + 1) for k in range(1 + max(*labels, *test._labels)))
    return Split(
        _files(root, [*train._image_files, *val._image_files], labels),
        _files(root, test._image_files, test._labels),
        classes,
    )


def _pets(root: Path) -> Split:
    train, test = (datasets.OxfordIIITPet(root, split) for split in ("trainval", "test"))
    return Split(
        _files(root, train._images, train._labels),
        _files(root, test._images, test._labels),
        tuple(train.classes),
    )


def _aircraft(root: Path) -> Split:
    train, test = (datasets.FGVCAircraft(root, split) for split in ("trainval", "test"))
    return Split(
        _files(root, train._image_files, train._labels),
        _files(root, test._image_files, test._labels),
        tuple(train.classes),
    )


def _cars(root: Path) -> Split:
    train, test = (datasets.StanfordCars(root, split) for split in ("train", "test"))
    return Split(
        _files(root, *zip(*train._samples, strict=True)),
        _files(root, *zip(*test._samples, strict=True)),
        tuple(train.classes),
    )


def _inaturalist(root: Path) -> Split:
    parts = []
    categories: dict[int, str] = {}
    for name in ("train2018.json", "val2018.json"):
        with (root / name).open(encoding="utf-8") as file:
            listed = json.load(file)
        of_image = {one["image_id"]: one["category_id"] for one in listed["annotations"]}
        parts.append([(one["file_name"], of_image[one["id"]]) for one in listed["images"]])
        categories |= {one["id"]: str(one["name"]) for one in listed["categories"]}
    number = {category: k for k, category in enumerate(sorted(categories))}
    train, test = (
        _files(root, [name for name, _ in part], [number[kind] for _, kind in part])
        for part in parts
    )
    return Split(train, test, tuple(categories[category] for category in number))


def _fetch(kind: Any, **options: Any) -> Callable[[Path], Any]:
    def fetch(root: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind(root, download=True, **options)

    return fetch


PUBLISHED: Final = {
    "cifar10": _Set(
        "CIFAR-10",
        "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
        _cifar("cifar-10-batches-py"),
        _fetch(datasets.CIFAR10),
    ),
    "cifar100": _Set(
        "CIFAR-100",
        "cifar-100-python/ with train, test and meta",
        _cifar("cifar-100-python"),
        _fetch(datasets.CIFAR100),
    ),
    "flowers102": _Set(
        "Flowers-102",
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        _flowers,
        _fetch(datasets.Flowers102),
    ),
    "pets": _Set(
        "Oxford-IIIT Pet",
        "oxford-iiit-pet/ with images/ and annotations/",
        _pets,
        _fetch(datasets.OxfordIIITPet),
    ),
    "aircraft": _Set(
        "FGVC-Aircraft",
        "fgvc-aircraft-2013b/ with data/",
        _aircraft,
        _fetch(datasets.FGVCAircraft, split="trainval"),
    ),
    "cars": _Set(
        "Stanford Cars",
        "stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat and devkit/",
        _cars,
        None,
    ),
    "inat18": _Set(
        "iNaturalist 2018",
        "train_val2018/, train2018.json and val2018.json",
        _inaturalist,
        None,
    ),
}
