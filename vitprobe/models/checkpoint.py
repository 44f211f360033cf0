"""Read a checkpoint file without executing anything in it.

Three containers are understood: safetensors, files of `torch.save` (the zip archive of
torch >= 1.6 and the pickle stream before it), and numpy's `.npz` without pickled objects. Pickles
are read by an unpickler that knows how to rebuild tensors and ordered dictionaries and turns every
other object into an inert stub: a stub keeps the state it was given, so that `args` saved beside
the weights can still be read, and does nothing. Folders are `vitprobe.models.folders`'.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitprobe.errors import CheckpointError
from vitprobe.models.inert import Storage, Unpickler
from vitprobe.models.sources import no_checkpoint

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds.

    container: "safetensors", "torch zip", "torch legacy", "npz" or "folder".
    content: the saved object: nested containers, tensors, and `Inert` stubs.
    metadata: the safetensors header's strings; empty for the other containers.
    sha256: of the whole file; of a folder see `vitprobe.models.folders.read_folder`.
    """

    path: Path
    container: str
    content: Any
    metadata: dict[str, str]
    sha256: str


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read a checkpoint of any supported container; its tensors are on the CPU.

    Raises CheckpointError, naming the path, for a file that is missing, unreadable, empty,
    truncated, a TorchScript archive, or no checkpoint at all.
    """
    path = Path(path)
    try:
        if stat.S_ISFIFO(mode := path.stat().st_mode) or stat.S_ISCHR(mode):
            raise CheckpointError(f"'{path}' is a device or a pipe; give a checkpoint file.")
        with path.open("rb") as stream:
            head = stream.read(9)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            container, content, metadata = _read(path, stream, head)
    except (FileNotFoundError, ValueError):  # no path has a null byte
        raise no_checkpoint(path) from None
    except IsADirectoryError:
        raise CheckpointError(
            f"'{path}' is a directory; give the checkpoint file in it, or run:DIR for a run of "
            "vitprobe pretrain."
        ) from None
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    return CheckpointFile(path, container, content, metadata, sha256)


def _read(path: Path, stream: BufferedReader, head: bytes) -> tuple[str, Any, dict[str, str]]:
    if not head:
        raise CheckpointError(f"'{path}' is empty.")
    try:
        if head.startswith(b"PK"):
            return *_read_zip(path, stream), {}
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            return "safetensors", *_read_safetensors(path)
        if head.startswith(b"\x80"):
            return "torch legacy", _read_legacy(path, stream), {}
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged or hostile file can make a reader raise anything
        raise CheckpointError(
            f"'{path}' is a damaged or truncated checkpoint ({_first_line(error)})."
        ) from error
    raise CheckpointError(
        f"'{path}' is not a checkpoint: it is neither a safetensors file, nor one of torch.save, "
        "nor an npz archive."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"'{path}' is no whole safetensors file ({_first_line(error)})."
        ) from error


def _read_zip(path: Path, stream: BufferedReader) -> tuple[str, Any]:
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"'{path}' is a truncated checkpoint: the end of its zip archive is missing."
        ) from None
    with archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise CheckpointError(
                f"'{path}' is a TorchScript archive, which holds code; save the model's "
                "state_dict() instead."
            )
        # Neither torch.save nor numpy.savez compresses: refusing what is compressed keeps out
        # archives that explode.
        compressed = any(entry.compress_type for entry in archive.infolist())
        if names and all(name.endswith(".npy") for name in names):
            if compressed:
                raise CheckpointError(
                    f"'{path}' is a compressed npz archive; save it with numpy.savez instead."
                )
            return "npz", {_npz_key(name): _array(path, archive, name) for name in names}
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if not pickles or compressed:
            raise CheckpointError(
                f"'{path}' is a zip archive, but not a checkpoint of torch.save; unpack it first."
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"'{path}' was saved on a big-endian machine; save it again.")

        def load_storage(key: str, dtype: torch.dtype, count: int) -> Storage:
            data = archive.read(f"{root}data/{key}")
            if len(data) < count * dtype.itemsize:
                raise EOFError(f"storage {key} is too short")
            raw = torch.empty(len(data), dtype=torch.uint8)
            raw.numpy()[:] = np.frombuffer(data, np.uint8)
            return Storage(raw, dtype)

        return "torch zip", Unpickler(BytesIO(archive.read(f"{root}data.pkl")), load_storage).load()


def _npz_key(name: str) -> str:
    """Flax separates the parts of a name by "/", where torch has "."."""
    return name.removesuffix(".npy").replace("/", ".")


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor:
    data = BytesIO(archive.read(name))
    shape, fortran, dtype = _array_header(data)
    if dtype.hasobject:
        raise CheckpointError(
            f"'{path}' holds Python objects as '{name}'; save plain arrays, with numpy.savez."
        )
    values = np.frombuffer(data.read(), dtype)
    array = values.reshape(shape, order="F" if fortran else "C")
    if array.dtype == np.dtype("V2"):  # how numpy writes JAX's bfloat16
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _array_header(data: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(data)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(data)


def _read_legacy(path: Path, stream: BufferedReader) -> Any:
    """Magic number, protocol, system, the object, its storage keys, then each storage's bytes."""
    size = path.stat().st_size
    storages: dict[str, Storage] = {}

    def load_storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if count * dtype.itemsize > size:
            raise EOFError(f"storage {key} is longer than the file")
        return storages.setdefault(
            key, Storage(torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype)
        )

    def load_pickle() -> Any:
        return Unpickler(stream, load_storage).load()

    if load_pickle() != _LEGACY_MAGIC:
        raise CheckpointError(
            f"'{path}' is a bare pickle, not a checkpoint; save the model's state_dict() with "
            "torch.save."
        )
    load_pickle()
    if not load_pickle()["little_endian"]:
        raise CheckpointError(f"'{path}' was saved on a big-endian machine; save it again.")
    content = load_pickle()
    for key in load_pickle():
        (count,) = struct.unpack("<q", stream.read(8))
        storage = storages[key]
        whole = count * storage.dtype.itemsize == len(storage.raw)
        if not whole or stream.readinto(storage.raw.numpy().data) != len(storage.raw):
            raise EOFError(f"storage {key} is too short")
    return content
