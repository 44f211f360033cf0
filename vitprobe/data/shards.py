"""Tar shards in webdataset's layout: the files of a sample share their name up to the first dot.

`key.jpg` (or another image) and `key.cls`, the number of its class as text. The headers are read
once; after that every image is read at random, by its offset, so that the order of an epoch is as
free, as exact and as resumable as with files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitprobe.data.archives import Member, Members, list_tars, read_members
from vitprobe.data.folders import HELD_OUT, is_hidden, is_image
from vitprobe.data.parts import Files, Labels, Names, Split, numbered_classes
from vitprobe.errors import DataError


def load_shards(source: str, paths: Sequence[Path]) -> Split:
    """The samples of all shards, in order.

    Shards with `val`, `valid`, `validation` or `test` as a word of their name are held out when
    there are others.

    Raises:
        DataError: a shard is missing or damaged, or samples are not as described above.
    """
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None or not paths:
        raise DataError(f"no shard '{missing or source}'")
    held = [path for path in paths if set(re.split(r"[\W\d_]+", path.stem)) & set(HELD_OUT)]
    if len(held) == len(paths):
        held = []
    train = _part(source, [path for path in paths if path not in held])
    test = _part(source, held) if held else None
    return Split(train, test, numbered_classes(train.labels, test.labels if test else None))


def is_shard(members: Sequence[Member]) -> bool:
    """Whether the members of a tar are samples with a class each."""
    return any(member.name.endswith(".cls") for member in members)


def _part(source: str, paths: Sequence[Path]) -> Files:
    images: list[tuple[int, Member]] = []
    classes: list[tuple[int, Member] | None] = []
    for number, (path, members) in enumerate(zip(paths, list_tars(paths), strict=True)):
        samples: dict[str, dict[str, Member]] = {}
        for member in members:
            if is_hidden(member.name.removeprefix("./").split("/")):
                continue
            folder, _, file = member.name.rpartition("/")
            key, _, kind = file.partition(".")
            kind = "image" if is_image(file) else kind.lower()
            sample = samples.setdefault(f"{folder}/{key}", {})
            if kind == "image" and kind in sample:
                raise DataError(f"'{path}' has several images called '{key}'")
            sample[kind] = member
        pictured = [sample for sample in samples.values() if "image" in sample]
        images += [(number, sample["image"]) for sample in pictured]
        classes += [(number, sample["cls"]) if "cls" in sample else None for sample in pictured]
    if not images:
        raise DataError(f"'{source}' holds no images in its shards")
    names = Names(f"{paths[number].name}/{member.name}" for number, member in images)
    return Files(source, names, _labels(source, paths, names, classes), read_members(paths, images))


def _labels(
    source: str, paths: Sequence[Path], names: Names, classes: list[tuple[int, Member] | None]
) -> Labels | None:
    known = [place for place in classes if place is not None]
    if not known:
        return None
    if len(known) < len(classes):
        raise DataError(f"'{names[classes.index(None)]}' of '{source}' has no class beside it")
    read: Members = read_members(paths, known)
    labels = np.empty(len(known), dtype=np.int64)
    for i in range(len(known)):
        text = read(i).strip()
        if not text.isdigit() or len(text) > 6:
            raise DataError(
                f"the class of '{names[i]}' of '{source}' is {text[:20]!r}, "
                "not a number from 0 to 999999"
            )
        labels[i] = int(text)
    return labels
