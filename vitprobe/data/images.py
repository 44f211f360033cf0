"""Images from folders, archives, lists and arrays, each decoded once for all models.

Files are sorted by their path relative to the folder or archive (a prefix that all share is left
out, so a zip and its unpacked folder agree), then taken in the order of a seeded permutation: in
sorted order, and so by class in most data sets, blocks would hold images of few classes and
similarity over blocks would be biased.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import weakref
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitprobe.errors import DataError

EXTENSIONS: Final = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"}
    | {".webp"}
)
MINIMUM_TAIL: Final = 32
"""A last block of fewer images than this joins the block before it."""

LUMINANCE: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601


Read = Callable[[], tuple[bytes, Image.Image | Tensor]]
"""Reads one image: its bytes and what they decode to."""


class View(NamedTuple):
    """What a model is given of an image: its input's channels and size."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Block:
    """Some images, decoded, for one step of a comparison."""

    first: int
    """Index of the first image in the whole run."""
    names: tuple[str, ...]
    views: dict[View, Tensor]
    """(images, channels, height, width) float32 in [0, 1]."""


@dataclass
class Images:
    """Images in the order in which they will be processed, and what became of them.

    Iterate with `blocks`; `used`, `undecodable` and `sha256` then tell what was read.
    """

    source: str
    names: Sequence[str] | None
    """Names in processing order, or None where the source keeps its own order."""
    _open: Callable[[], Iterator[tuple[str, Read]]]
    limit: int | None = None
    seed: int | None = None
    """Of the permutation; None where the source keeps its own order."""
    undecodable: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256)

    def __repr__(self) -> str:
        known = "" if self.names is None else f", {len(self)} images"
        return f"Images('{self.source}'{known})"

    @property
    def sha256(self) -> str:
        """Hash over the names and contents of the images used so far, in order."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        """How many images a pass will give at most.

        Raises:
            TypeError: the source does not know.
        """
        if self.names is None:
            raise TypeError("the length of this source is not known in advance")
        return len(self.names) if self.limit is None else min(self.limit, len(self.names))

    def blocks(self, views: Iterable[View], size: int, *, workers: int = 2) -> Iterator[Block]:
        """The images in blocks of `size`, a short tail joined to the block before it.

        An image that cannot be decoded is named in `undecodable` and the next of the permutation
        takes its place before blocks are formed.

        Args:
            views: the inputs wanted of each image.
            size: images in a block.
            workers: threads that decode ahead.

        Raises:
            DataError: no image could be decoded, or arrays hold something else than images.
        """
        self.undecodable, self.used, self._digest = [], [], hashlib.sha256()
        wanted = list(dict.fromkeys(views))
        # A block is whole when enough follow it that what follows can stand alone. Images go
        # straight to their place in it: one large tensor a view, and none to be stacked.
        tail = min(size, MINIMUM_TAIL)
        most = size + tail if self.names is None else min(size + tail, len(self))
        held = _room(wanted, most)
        count = first = 0
        # A block ahead: the next one is decoded while the models run on this one.
        for tensors in self._decoded(wanted, workers, most_ahead=most):
            for view, tensor in tensors.items():
                held[view][count] = tensor
            count += 1
            if count == size + tail:
                whole, held = held, _room(wanted, most)
                for view, tensor in held.items():
                    tensor[:tail] = whole[view][size:]
                yield self._block(first, size, whole)
                first, count = first + size, tail
        if not self.used:
            what = f", such as '{self.undecodable[0]}'" if self.undecodable else ""
            raise DataError(f"none of the images in '{self.source}' can be decoded{what}")
        yield self._block(first, count, held)

    def _block(self, first: int, count: int, held: dict[View, Tensor]) -> Block:
        names = tuple(self.used[first : first + count])
        return Block(first, names, {view: tensor[:count] for view, tensor in held.items()})

    def _decoded(
        self, views: list[View], workers: int, most_ahead: int
    ) -> Iterator[dict[View, Tensor]]:
        def decode(read: Read) -> tuple[bytes, dict[View, Tensor]] | None:
            try:
                content, image = read()
                square = _square(image)
            except MemoryError:
                raise
            except Exception:
                # Pillow and the archive modules raise whatever damaged bytes lead them to.
                return None
            return hashlib.sha256(content).digest(), {view: resize(square, view) for view in views}

        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(max(1, workers)))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ahead: deque[tuple[str, Future[Any]]] = deque()
            items = self._open()
            exhausted = False
            while self.limit is None or len(self.used) < self.limit:
                while not exhausted and len(ahead) < most_ahead:
                    try:
                        name, read = next(items)
                    except StopIteration:
                        exhausted = True
                    else:
                        ahead.append((name, pool.submit(decode, read)))
                if not ahead:
                    return
                name, future = ahead.popleft()
                result = future.result()
                if result is None:
                    self.undecodable.append(name)
                    continue
                digest, tensors = result
                self._digest.update(name.encode() + b"\0" + digest)
                self.used.append(name)
                yield tensors


def images(source: Any, *, limit: int | None = None, seed: int | None = None) -> Images:
    """Images to compare models on.

    Args:
        source: a folder, a zip or tar archive, a text file that lists image files, one image file,
            a sequence of image files, an array or tensor (n, channels, height, width) of squares in
            [0, 1], a DataLoader of such batches, or the result of this function.
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


def resize(square: Tensor, view: View) -> Tensor:
    """A square image as a model wants it: (c, s, s) in [0, 1] → (channels, height, width).

    Bicubic with antialiasing, on floats; grey is repeated for three channels, and colour becomes
    ITU-R BT.601 luminance for one.
    """
    if square.shape[0] == 3 and view.channels == 1:
        square = (square * square.new_tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True)
    elif square.shape[0] == 1 and view.channels == 3:
        square = square.expand(3, -1, -1)
    elif square.shape[0] != view.channels:
        raise DataError(
            f"images of {square.shape[0]} channels cannot be given to a model of {view.channels}"
        )
    if square.shape[1:] == (view.height, view.width):
        return square.contiguous()
    resized = F.interpolate(
        square[None], (view.height, view.width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].clamp(0, 1)


def _square(image: Image.Image | Tensor) -> Tensor:
    """The centre square as floats in [0, 1]: (1 or 3, side, side).

    Of the pixels as stored: an EXIF orientation is not applied, as in common evaluation code.
    """
    if isinstance(image, Tensor):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.mode.startswith(("I", "F")):
        values = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
        values = values / 65535 if image.mode.startswith("I") else values
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("grey values beyond what 16 bits or floats in [0, 1] can hold")
        return values[None]
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    tensor = torch.from_numpy(pixels.copy()).float() / 255
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _room(views: list[View], count: int) -> dict[View, Tensor]:
    return {view: torch.empty(count, *view) for view in views}


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
        raise DataError(f"no images at '{path}': there is no such file or folder")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"no images at '{path}': it is neither a file nor a folder")
    try:
        if path.is_dir():
            files = _walk(path)
            return _from_files(str(path), files, lambda f: (path / f).read_bytes(), limit, seed)
        if zipfile.is_zipfile(path):
            return _from_zip(path, limit, seed)
        if path.suffix.lower() in EXTENSIONS:
            return _from_list([path], str(path), limit, seed)
        if path.suffix.lower() in (".txt", ".lst", ".list"):
            return _from_list(_listed_files(path), str(path), limit, seed)
        return _from_tar(path, limit, seed)
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


def _from_tar(path: Path, limit: int | None, seed: int) -> Images:
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(path, "r:"))
        except tarfile.ReadError:
            raise DataError(
                f"'{path}' is no source of images: give a folder, a zip, an uncompressed tar, an "
                "image, or a .txt file that lists images"
            ) from None
        files = [member.name for member in tar.getmembers() if member.isfile()]

        def extract(name: str) -> bytes:
            member = tar.extractfile(name)
            return member.read() if member is not None else b""

        found = _from_files(str(path), files, _locked(extract), limit, seed)
        weakref.finalize(found, stack.pop_all().close)
    return found


def _listed_files(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is no list of image files: it is not UTF-8 text") from None
    return [path.parent / line.strip() for line in lines if line.strip()]


def _from_list(paths: list[Path], source: str, limit: int | None, seed: int) -> Images:
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if len(set(absolute)) < len(absolute):
        twice = next(path for path in absolute if absolute.count(path) > 1)
        raise DataError(f"'{twice}' is listed twice in '{source}'; each image counts once")
    missing = next((path for path in absolute if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"no image file '{missing}', which '{source}' lists")
    root = Path(os.path.commonpath([path.parent for path in absolute])) if absolute else Path()
    files = [path.relative_to(root).as_posix() for path in absolute]
    return _ordered(source, files, lambda file: (root / file).read_bytes(), limit, seed)


def _shown(name: str) -> str:
    """A file's name as UTF-8 that can be stored and printed, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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

    def items() -> Iterator[tuple[str, Read]]:
        for name in names:
            yield name, partial(_read_file, read, by_name[name])

    return Images(source, names, items, limit, seed)


def _from_array(array: np.ndarray | Tensor, limit: int | None, seed: int) -> Images:
    tensor = _checked_batch(torch.as_tensor(array), "array")
    order = _permuted(len(tensor), seed)

    def items() -> Iterator[tuple[str, Read]]:
        for i in order:
            yield str(i), partial(_read_tensor, tensor[i])

    return Images("array", [str(i) for i in order], items, limit, seed)


def _from_loader(loader: Iterable[Any], limit: int | None) -> Images:
    def items() -> Iterator[tuple[str, Read]]:
        count = 0
        with torch.random.fork_rng(devices=[]):  # an iterator draws its seed from the global one
            batches = iter(loader)
        for batch in batches:
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            for image in _checked_batch(batch, "DataLoader"):
                yield str(count), partial(_read_tensor, image)
                count += 1

    return Images("DataLoader", None, items, limit, None)


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
