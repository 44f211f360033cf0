"""CIFAR-10 and CIFAR-100 as published for Python: pickled batches, read without running them.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from vitprobe.data.arrays import arrays
from vitprobe.data.parts import Split
from vitprobe.errors import DataError


class _Kind(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    meta: str
    classes: bytes


_KINDS: Final = (
    _Kind(
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
        b"labels", "batches.meta", b"label_names",
    ),
    _Kind("cifar-100-python", ("train",), "test", b"fine_labels", "meta", b"fine_label_names"),
)  # fmt: skip


def cifar_kind(path: Path) -> str:
    """The folder that an archive opens with, or that `path` is or holds; "" for other data."""
    if path.is_file():
        try:
            with tarfile.open(path) as tar:
                first = tar.next()
        except (tarfile.TarError, OSError, EOFError):
            return ""
        top = first.name.split("/")[0] if first else ""
        return top if any(kind.folder == top for kind in _KINDS) else ""
    for kind in _KINDS:
        files = (kind.meta, kind.test, kind.train[0])
        if any(all((at / name).is_file() for name in files) for at in (path, path / kind.folder)):
            return kind.folder
    return ""


def load_cifar(path: Path) -> Split:
    """The images, (n, 3, 32, 32) uint8, of the archive or unpacked folder.

    Raises:
        DataError: a file is missing, damaged, or holds something else than arrays.
    """
    kind = next(kind for kind in _KINDS if kind.folder == cifar_kind(path))
    read = _from_archive(path, kind) if path.is_file() else _from_folder(path, kind)
    batches = [_batch(path, name, read(name), kind) for name in kind.train]
    images, labels = (np.concatenate(pieces) for pieces in zip(*batches, strict=True))
    meta = _unpickle(path, kind.meta, read(kind.meta))
    try:
        classes = tuple(name.decode() for name in meta[kind.classes])
    except (KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{kind.meta} of '{path}' names no classes") from error
    held_out = _batch(path, kind.test, read(kind.test), kind)
    train, test = arrays(images, labels, str(path)), arrays(*held_out, str(path))
    if max(labels.max(), held_out[1].max()) >= len(classes):
        raise DataError(f"labels of '{path}' go beyond its {len(classes)} classes")
    return Split(train, test, classes)


def _from_folder(path: Path, kind: _Kind) -> Callable[[str], bytes]:
    folder = path if (path / kind.meta).is_file() else path / kind.folder

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read '{folder / name}': {error.strerror}") from error

    return read


def _from_archive(path: Path, kind: _Kind) -> Callable[[str], bytes]:
    wanted = (*kind.train, kind.test, kind.meta)
    contents = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.partition("/")
                file = tar.extractfile(member) if name in wanted else None
                if folder == kind.folder and file is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"cannot read '{path}': {error}; get it again") from error

    def read(name: str) -> bytes:
        if name not in contents:
            raise DataError(f"'{path}' holds no {name}; get it again")
        return contents[name]

    return read


def _batch(path: Path, name: str, content: bytes, kind: _Kind) -> tuple[Any, Any]:
    batch = _unpickle(path, name, content)
    try:
        images, labels = batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[kind.labels])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{name} of '{path}' holds no CIFAR images with labels") from error
    part = arrays(images, labels, f"{path}: {name}")
    return part.images, part.labels


def _unpickle(path: Path, name: str, content: bytes) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # The bytes of a damaged pickle can be any instruction to the machine that reads them.
        raise DataError(
            f"cannot read {name} of '{path}' ({type(error).__name__}: {error}); get it again"
        ) from error


def _dtype(name: Any, *_: Any) -> np.dtype[Any]:
    # Pickles of the time also state alignment and copying, as integers that NumPy warns of.
    return np.dtype(name)


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")


_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _ArraysOnly(pickle.Unpickler):
    """Reads containers, numbers, text and arrays; anything else that a pickle could call, not."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of CIFAR")
        return _ALLOWED[module, name]
