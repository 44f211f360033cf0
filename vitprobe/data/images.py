"""Images from folders, archives, lists and arrays, each decoded once for all models.

Files are sorted by their path relative to the folder or archive (a prefix that all share is left
out, so a zip and its unpacked folder agree), then taken in the order of a seeded permutation: in
sorted order, and so by class in most data sets, blocks would hold images of few classes and
similarity over blocks would be biased.
"""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitprobe.data.archives import expand, is_pattern, list_tars, read_members
from vitprobe.data.blocks import Block, Blocks, Listing, Read, Source, View, decode
from vitprobe.distributed import ALONE, Team
from vitprobe.errors import DataError, no_images

EXTENSIONS: Final = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"}
    | {".webp"}
)


@dataclass
class Images:
    """Images in the order in which they will be processed, and what became of them.

    Iterate with `blocks`; `used`, `undecodable` and `sha256` then tell what was read.
    """

    source: str
    names: Sequence[str] | None
    """Names in processing order, or None where the source keeps its own order."""
    _open: Callable[[], Source]
    limit: int | None = None
    seed: int | None = None
    """Of the permutation; None where the source keeps its own order."""
    _listing: Listing = field(default_factory=Listing)

    def __repr__(self) -> str:
        known = "" if self.names is None else f", {len(self)} images"
        return f"Images('{self.source}'{known})"

    @property
    def used(self) -> list[str]:
        """Names of the images used so far, in order."""
        return self._listing.names

    @property
    def digests(self) -> list[bytes]:
        """SHA-256 of the contents of each image used so far."""
        return self._listing.digests

    @property
    def undecodable(self) -> list[str]:
        """Names of the images so far that cannot be decoded."""
        return self._listing.undecodable

    @property
    def sha256(self) -> str:
        """Hash over the names and contents of the images used so far, in order."""
        return self._listing.sha256

    def __len__(self) -> int:
        """How many images a pass will give at most.

        Raises:
            TypeError: the source does not know.
        """
        if self.names is None:
            raise TypeError("the length of this source is not known in advance")
        return len(self.names) if self.limit is None else min(self.limit, len(self.names))

    def blocks(
        self,
        views: Iterable[View],
        size: int,
        *,
        workers: int = 2,
        done: Sequence[tuple[str, bytes]] = (),
        team: Team = ALONE,
    ) -> Iterator[Block]:
        """The images in blocks of `size`, a short tail joined to the block before it.

        An image that cannot be decoded is named in `undecodable` and the next of the permutation
        takes its place before blocks are formed.

        Args:
            views: the inputs wanted of each image.
            size: images in a block.
            workers: threads that decode ahead.
            done: name and digest of the images of whole blocks that an earlier pass has given;
                they are not decoded again, and this pass goes on behind them.
            team: the processes that share the blocks: this one is given its own only, while
                `used`, `undecodable` and `sha256` are of all.

        Raises:
            DataError: no image could be decoded, or arrays hold something else than images; `done`
                is not how these images begin, or not whole blocks of them; the processes of a team
                find different images.
        """
        self._check_shared(team)
        self._listing = self._begun(done)
        length = None if self.names is None else len(self.names)
        wanted = list(dict.fromkeys(views))
        listing, source = self._listing, self._open()
        self._check_last(source)
        found = Blocks(source, listing, wanted, size, length, self.limit, team)
        yield from found.read(max(1, workers))
        if not self.used:
            what = f", such as '{self.undecodable[0]}'" if self.undecodable else ""
            raise DataError(f"none of the images in '{self.source}' can be decoded{what}")

    def check_begin(self, done: Sequence[tuple[str, bytes]]) -> None:
        """Raise DataError unless these begin with images of an earlier pass, by name and digest."""
        self._listing = self._begun(done)
        self._check_last(self._open())

    def _check_last(self, source: Source) -> None:
        """Raise DataError unless the last image that an earlier pass has used is what it was.

        One is read again, since an array or a DataLoader has no names that tell it from another.
        """
        known = self._listing
        if not known.names:
            return
        item = source(known.positions[-1])
        found = None if item is None else decode(item[1], [])
        if found is None or found.digest != known.digests[-1]:
            raise DataError(
                f"'{known.names[-1]}' in '{self.source}' is not what an earlier pass was given; "
                "give the same images, or start again without what that pass has left"
            )

    def _check_shared(self, team: Team) -> None:
        names = None if self.names is None else sha256("\0".join(self.names).encode()).digest()
        of_all = team.exchange((names, self.limit))
        other = next((i for i, given in enumerate(of_all) if given != of_all[0]), None)
        if other is not None:
            raise DataError(
                f"process {other} of this run is given other images than process 0, in "
                f"'{self.source}'; give all of them the same"
            )

    def _begun(self, done: Sequence[tuple[str, bytes]]) -> Listing:
        """What is known after the images of an earlier pass."""
        listing = Listing()
        for name, digest in done:
            if self.names is not None:
                while listing.position < len(self.names) and self.names[listing.position] != name:
                    listing.add(self.names[listing.position], None)
            if self.names is not None and listing.position == len(self.names):
                raise DataError(
                    f"'{name}', which an earlier pass has used, is not where it was in "
                    f"'{self.source}'; start again without what that pass has left"
                )
            listing.add(name, digest)
        return listing


def images(source: Any, *, limit: int | None = None, seed: int | None = None) -> Images:
    """Images to compare models on.

    Args:
        source: a folder, a zip or tar archive, tar shards (`val-{000..007}.tar`, a folder of tars
            or a sequence of them), a text file that lists image files, one image file, a sequence
            of image files, an array or tensor (n, channels, height, width) of squares in [0, 1], a
            DataLoader of such batches, or the result of this function.
        limit: take the first so many of the permutation.
        seed: of the permutation, 0 unless given. A DataLoader keeps its own order.

    Returns:
        The images; nothing is decoded yet.

    Raises:
        DataError: no such file, no images in it, or not a source of images; a limit or seed for a
            source that has its own already.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images leaves none; give 1 or more")
    if seed is not None and seed < 0:
        raise DataError(f"a seed of {seed} is none; give 0 or more")
    if isinstance(source, Images):
        if limit is not None or seed is not None:
            raise DataError("these images have their limit and seed already; give them to 'images'")
        return source
    if isinstance(source, torch.utils.data.DataLoader):
        if seed is not None:
            raise DataError("a DataLoader keeps its own order, so a seed has no meaning for it")
        return _from_loader(source, limit)
    seed = seed or 0
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source), limit, seed)
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source, limit, seed)
    if (
        isinstance(source, Sequence)
        and source
        and all(isinstance(item, (str, os.PathLike)) for item in source)
    ):
        return _from_list([Path(item) for item in source], "list of files", limit, seed)
    raise DataError(
        f"cannot read images from {type(source).__name__}: give a folder, an archive, files, an "
        "array (n, channels, height, width) or a DataLoader"
    )


def _permuted(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()


def _read_file(read: Callable[[str], bytes], name: str) -> tuple[bytes, Image.Image]:
    content = read(name)
    image = Image.open(io.BytesIO(content))
    image.load()
    return content, image


def _read_tensor(image: Tensor) -> tuple[bytes, Tensor]:
    return image.numpy().tobytes(), image


def _from_path(path: Path, limit: int | None, seed: int) -> Images:
    if not path.exists():
        if is_pattern(str(path)):
            return _from_tars(str(path), expand(str(path)), limit, seed)
        raise no_images(path)
    if not path.is_file() and not path.is_dir():
        raise DataError(f"no images at '{path}': it is neither a file nor a folder")
    try:
        if path.is_dir():
            files = _walk(path)
            tars = sorted(path / file for file in files if _is_tar(file))
            if tars and not any(map(_is_image, files)):
                return _from_tars(str(path), tars, limit, seed)
            return _from_files(str(path), files, lambda f: (path / f).read_bytes(), limit, seed)
        if zipfile.is_zipfile(path):
            return _from_zip(path, limit, seed)
        if path.suffix.lower() in EXTENSIONS:
            return _from_list([path], str(path), limit, seed)
        if path.suffix.lower() in (".txt", ".lst", ".list"):
            return _from_list(_listed_files(path), str(path), limit, seed)
        return _from_tars(str(path), [path], limit, seed)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"cannot read images from '{path}': {error}") from error


def _walk(folder: Path) -> list[str]:
    """Paths of all files below a folder, links to folders followed, none of them twice over."""

    def refuse(error: OSError) -> None:
        raise error

    found, entered = [], set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        entered.add(os.path.realpath(parent))
        folders[:] = [
            name for name in folders if os.path.realpath(os.path.join(parent, name)) not in entered
        ]
        below = Path(parent).relative_to(folder)
        # A pipe or a device would be waited for; a link to nothing is named as undecodable.
        found += [
            (below / name).as_posix()
            for name in files
            if (path := Path(parent, name)).is_file() or path.is_symlink()
        ]
    return found


def _from_zip(path: Path, limit: int | None, seed: int) -> Images:
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [info.filename for info in archive.infolist() if not info.is_dir()]
        found = _from_files(str(path), members, _locked(archive.read), limit, seed)
        # Open for as long as the images are.
        weakref.finalize(found, stack.pop_all().close)
    return found


def _from_tars(source: str, paths: Sequence[Path], limit: int | None, seed: int) -> Images:
    if not paths:
        raise DataError(f"'{source}' names no tar shards")
    for path in paths:
        if not path.is_file():
            raise DataError(f"no tar shard '{path}', which '{source}' names")
        try:
            tarfile.open(path, "r:").close()
        except tarfile.ReadError:
            raise DataError(
                f"'{path}' is no source of images: give a folder, a zip, uncompressed tars, an "
                "image, or a .txt file that lists images"
            ) from None
    listed = list_tars(paths)
    names = [posixpath.normpath(member.name) for members in listed for member in members]
    # Sharding cuts a data set's files into pieces and leaves their names alone; where each shard
    # numbers its own, the shard is part of the name.
    if len(set(names)) < len(names):
        shards = _below_their_folder(source, paths)
        names = [
            f"{shard}/{posixpath.normpath(member.name)}"
            for shard, members in zip(shards, listed, strict=True)
            for member in members
        ]
    places = [(number, member) for number, members in enumerate(listed) for member in members]
    read = read_members(paths, places)
    index = {name: i for i, name in enumerate(names)}
    return _from_files(source, names, lambda name: read(index[name]), limit, seed)


def _listed_files(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is no list of image files: it is not UTF-8 text") from None
    return [path.parent / line.strip() for line in lines if line.strip()]


def _from_list(paths: list[Path], source: str, limit: int | None, seed: int) -> Images:
    tars = [path for path in paths if _is_tar(path.name)]
    if tars and len(tars) < len(paths):
        other = next(path for path in paths if path not in tars)
        raise DataError(
            f"'{source}' lists tars, such as '{tars[0]}', and other files, such as '{other}'; list "
            "either"
        )
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"no image file '{os.path.abspath(missing)}', which '{source}' lists")
    files = _below_their_folder(source, paths)
    if tars:
        return _from_tars(source, paths, limit, seed)
    by_file = dict(zip(files, paths, strict=True))
    return _ordered(source, files, lambda file: by_file[file].read_bytes(), limit, seed)


def _below_their_folder(source: str, paths: Sequence[Path]) -> list[str]:
    """Paths relative to the folder that all of them lie in.

    Raises:
        DataError: a path that is given twice.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if len(set(absolute)) < len(absolute):
        twice = next(path for path in absolute if absolute.count(path) > 1)
        raise DataError(f"'{twice}' is listed twice in '{source}'; each image counts once")
    root = Path(os.path.commonpath([path.parent for path in absolute])) if absolute else Path()
    return [path.relative_to(root).as_posix() for path in absolute]


def _shown(name: str) -> str:
    """A file's name as UTF-8 that can be stored and printed, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_tar(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() == ".tar" and not path.name.startswith(".")


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and PurePosixPath(name).suffix.lower() in EXTENSIONS


def _locked(read: Callable[[str], bytes]) -> Callable[[str], bytes]:
    lock = threading.Lock()

    def locked(name: str) -> bytes:
        with lock:
            return read(name)

    return locked


def _from_files(
    source: str, files: Iterable[str], read: Callable[[str], bytes], limit: int | None, seed: int
) -> Images:
    members = [name for name in files if _is_image(name)]
    if not members:
        raise DataError(f"'{source}' holds no image files ({', '.join(sorted(EXTENSIONS))})")
    return _ordered(source, members, read, limit, seed)


def _ordered(
    source: str, members: list[str], read: Callable[[str], bytes], limit: int | None, seed: int
) -> Images:
    """Images of these files, in the seeded permutation of their sorted relative paths."""
    # An archive may mix absolute names and relative ones; all are taken from its root.
    shared = os.path.commonpath([f"/{name}".rpartition("/")[0] or "/" for name in members])
    by_name: dict[str, str] = {}
    for member in members:
        name = _shown(os.path.relpath(f"/{member}", shared))
        if name in by_name:
            raise DataError(
                f"'{source}' holds two images by the name of '{name}'; each counts once"
            )
        by_name[name] = member
    ordered = sorted(by_name)
    names = [ordered[i] for i in _permuted(len(ordered), seed)]

    def at(position: int) -> tuple[str, Read] | None:
        if position >= len(names):
            return None
        return names[position], partial(_read_file, read, by_name[names[position]])

    return Images(source, names, lambda: at, limit, seed)


def _from_array(array: np.ndarray | Tensor, limit: int | None, seed: int) -> Images:
    tensor = _checked_batch(torch.as_tensor(array), "array")
    order = _permuted(len(tensor), seed)

    def at(position: int) -> tuple[str, Read] | None:
        if position >= len(order):
            return None
        return str(order[position]), partial(_read_tensor, tensor[order[position]])

    return Images("array", [str(i) for i in order], lambda: at, limit, seed)


def _from_loader(loader: Iterable[Any], limit: int | None) -> Images:
    def squares() -> Iterator[tuple[int, Tensor]]:
        with torch.random.fork_rng(devices=[]):  # an iterator draws its seed from the global one
            batches = iter(loader)
        position = 0
        for batch in batches:
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            for image in _checked_batch(batch, "DataLoader"):
                yield position, image
                position += 1

    def opened() -> Source:
        images = squares()

        def at(position: int) -> tuple[str, Read] | None:
            image = next((image for number, image in images if number == position), None)
            return None if image is None else (str(position), partial(_read_tensor, image))

        return at

    return Images("DataLoader", None, opened, limit, None)


def _checked_batch(batch: Any, source: str) -> Tensor:
    if not isinstance(batch, Tensor) or batch.ndim != 4 or batch.shape[1] not in (1, 3):
        what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise DataError(
            f"the {source} gives {what}: images are (n, 1 or 3 channels, height, width)"
        )
    if batch.shape[2] != batch.shape[3]:
        raise DataError(
            f"the {source} gives images of {batch.shape[2]} x {batch.shape[3]} pixels: crop them "
            "to the square that all models are to see"
        )
    if len(batch) == 0:
        raise DataError(f"the {source} gives no images")
    if not batch.is_floating_point() or batch.isnan().any() or batch.min() < 0 or batch.max() > 1:
        raise DataError(
            f"the {source} gives {batch.dtype} values from {float(batch.min()):g} to "
            f"{float(batch.max()):g}: give floats in [0, 1], not normalised"
        )
    return batch.detach().cpu().float().contiguous()
