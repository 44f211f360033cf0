"""Images in folders, where the folder of an image is its class: on disk, in a zip or in a tar.

What is read, of the images of a source (hidden files and other files count for nothing):

- folders `train` and one of `val`, `valid`, `validation`, `test`: the two parts; where there are
  several held-out ones, the first of that list;
- else a folder for each class, and no held-out part;
- else images in no folder: no labels.

A folder that everything lies in is skipped, as archives have one, unless it is called `train` or
like a held-out part. A single class is therefore none: its images have no labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from vitprobe.data.archives import Member, read_members
from vitprobe.data.images import EXTENSIONS
from vitprobe.data.parts import Files, Names, Split, same_classes
from vitprobe.errors import DataError

HELD_OUT: Final = ("val", "valid", "validation", "test")
_PARTS: Final = ("train", *HELD_OUT)

_Parts = tuple[str, ...]


@dataclass(frozen=True)
class _Listing:
    """The files and folders of a source, in any order; `read` gives a reader of some files."""

    source: str
    files: list[str]
    folders: list[str]
    read: Callable[[Sequence[int]], Callable[[int], bytes]]


@dataclass(frozen=True)
class Loose:
    """Reads files below a folder."""

    root: Path
    names: Names

    def __call__(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()


def load_folder(path: Path) -> Split:
    """Images below a folder; links are followed.

    Raises:
        DataError: no images, or not laid out as this module describes.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read '{error.filename}': {error.strerror}") from error

    files, folders = [], []
    entered = set()
    for parent, below, names in os.walk(path, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            # A link back to where we were would go round for ever.
            below.clear()
            continue
        entered.add(real)
        prefix = os.path.relpath(parent, path) + "/" if parent != str(path) else ""
        files += [prefix + name for name in names]
        folders += [prefix + name for name in below]

    def read(chosen: Sequence[int]) -> Callable[[int], bytes]:
        return Loose(path, Names(files[i] for i in chosen))

    return _split(_Listing(str(path), files, folders, read))


def load_archive(path: Path, members: Sequence[Member], folders: Sequence[str]) -> Split:
    """Images in an archive that holds these files and folders.

    Raises:
        DataError: no images, or not laid out as this module describes.
    """

    def read(chosen: Sequence[int]) -> Callable[[int], bytes]:
        return read_members([path], [(0, members[i]) for i in chosen])

    return _split(_Listing(str(path), [member.name for member in members], list(folders), read))


def is_image(name: str) -> bool:
    """Whether a file's ending is that of an image."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether a file or a folder that it lies in is one that systems leave behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _parts(name: str) -> _Parts:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _split(listing: _Listing) -> Split:
    images = {i: _parts(name) for i, name in enumerate(listing.files) if is_image(name)}
    images = {i: parts for i, parts in images.items() if not is_hidden(parts)}
    if not images:
        raise DataError(f"'{listing.source}' holds no images ({', '.join(sorted(EXTENSIONS))})")
    folders = {parts for name in listing.folders if not is_hidden(parts := _parts(name))}
    folders |= {parts[:-1] for parts in images.values()}
    while len(tops := _tops(images.values(), folders)) == 1 and all(
        len(parts) > 1 for parts in images.values()
    ):
        if tops <= set(_PARTS):
            break
        images = {i: parts[1:] for i, parts in images.items()}
        folders = {parts[1:] for parts in folders}

    holding = {parts[0] for parts in images.values()}
    named = [part for part in _PARTS if part in holding]
    others = sorted(holding.difference(named))
    if not named or (others and not ("train" in named and len(named) > 1)):
        train, classes = _labelled(listing, images, folders)
        return Split(train, None, classes)
    if others:
        raise DataError(
            f"'{listing.source}' holds images in '{others[0]}' beside '{named[0]}' and "
            f"'{named[1]}'; move it away"
        )
    first, classes = _part(listing, images, folders, "train")
    test, test_classes = _part(
        listing, images, folders, next((p for p in named if p != "train"), "")
    )
    if first is not None and test is not None:
        held_out = same_classes(listing.source, classes, test_classes, test)
        return Split(first, held_out, classes)
    return Split(first, test, classes or test_classes)


def _part(
    listing: _Listing, images: dict[int, _Parts], folders: set[_Parts], name: str
) -> tuple[Files | None, _Parts]:
    """What lies in the folder of that name."""
    below = {i: parts[1:] for i, parts in images.items() if parts[0] == name}
    if not below:
        return None, ()
    return _labelled(listing, below, {parts[1:] for parts in folders if parts[:1] == (name,)})


def _tops(images: Iterable[_Parts], folders: Iterable[_Parts]) -> set[str]:
    return {parts[0] for names in (images, folders) for parts in names if parts}


def _labelled(
    listing: _Listing, images: dict[int, _Parts], folders: set[_Parts]
) -> tuple[Files, tuple[str, ...]]:
    """The images of one part with the classes that their first folders are."""
    chosen = sorted(images, key=images.__getitem__)
    classes: list[str] = []
    labels = None
    if any(len(parts) > 1 for parts in images.values()):
        classes = sorted({parts[0] for parts in folders if parts})
        stray = next((i for i in chosen if len(images[i]) == 1), None)
        if stray is not None:
            raise DataError(
                f"'{listing.files[stray]}' of '{listing.source}' lies in the folder of no class "
                "while there are some; move it"
            )
        number = {name: k for k, name in enumerate(classes)}
        labels = np.array([number[images[i][0]] for i in chosen], dtype=np.int64)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
        if len(empty):
            raise DataError(
                f"class '{classes[empty[0]]}' of '{listing.source}' has no images; "
                "remove its folder or fill it"
            )
    names = Names(listing.files[i] for i in chosen)
    return Files(listing.source, names, labels, listing.read(chosen)), tuple(classes)
