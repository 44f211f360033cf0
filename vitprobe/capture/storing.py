"""Where captured tensors go, batch after batch: memory, one safetensors file or one zarr folder.

A file is written beside its place and moved there when it is whole. Memory stays that of one batch:
zarr arrays grow as they are written, and for safetensors, whose layout wants every size in advance,
each tensor first goes to a file of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from vitprobe.errors import CaptureError, ResultError

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ZARR = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16"}


class Store(ABC):
    """Tensors by name, each grown along its first axis."""

    @abstractmethod
    def append(self, name: str, rows: Tensor) -> None:
        """Add rows, on the CPU, to the tensor of this name, which need not be there yet."""

    @abstractmethod
    def finish(self, about: Mapping[str, Any]) -> None:
        """Nothing more comes; `about` is JSON-able and kept beside the tensors."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A whole tensor, once all is finished."""


class Memory(Store):
    """Tensors kept in memory, with room from the start for as many rows as are expected."""

    def __init__(self, rows: int | None) -> None:
        self._expected = rows
        self._held: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def append(self, name: str, rows: Tensor) -> None:
        count = self._rows.get(name, 0)
        end = count + len(rows)
        held = self._held.get(name, rows.new_empty(0, *rows.shape[1:]))
        if end > len(held):
            held = rows.new_empty(max(end, self._expected or 2 * len(held)), *rows.shape[1:])
            held[:count] = self._held.get(name, held)[:count]
            self._held[name] = held
        held[count:end] = rows
        self._rows[name] = end

    def finish(self, about: Mapping[str, Any]) -> None:
        pass

    def read(self, name: str) -> Tensor:
        return self._held[name][: self._rows[name]]


class SafetensorsFile(Store):
    """One .safetensors file; what is said about its tensors is JSON in its metadata, "capture"."""

    def __init__(self, path: Path, work: Path) -> None:
        self._path = path
        self._work = work
        self._files: dict[str, BinaryIO] = {}
        self._shapes: dict[str, list[int]] = {}
        self._kinds: dict[str, str] = {}
        self._open = ExitStack()
        work.mkdir()

    def append(self, name: str, rows: Tensor) -> None:
        if name not in self._files:
            self._files[name] = self._open.enter_context((self._work / name).open("wb"))
            self._shapes[name] = [0, *rows.shape[1:]]
            self._kinds[name] = _SAFETENSORS[rows.dtype]
        self._files[name].write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._shapes[name][0] += len(rows)

    def finish(self, about: Mapping[str, Any]) -> None:
        self._open.close()
        header: dict[str, Any] = {"__metadata__": {"capture": json.dumps(about)}}
        end = 0
        for name, shape in self._shapes.items():
            start, end = end, end + (self._work / name).stat().st_size
            header[name] = {
                "dtype": self._kinds[name],
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        whole = self._work / "whole"
        with whole.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in self._shapes:
                with (self._work / name).open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 24)
                (self._work / name).unlink()
            file.flush()
            os.fsync(file.fileno())
        _move(whole, self._path)

    def read(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)


class ZarrFolder(Store):
    """One zarr group with an array for each tensor ("features.0" is features/0), in chunks of one
    batch; what is said about them is the group's attribute "capture"."""

    def __init__(self, path: Path, work: Path) -> None:
        try:
            import zarr
        except ImportError:
            raise CaptureError(
                f"'{path}' asks for zarr, which is not installed: pip install 'vitprobe[zarr]', or "
                "give out a name that ends in .safetensors"
            ) from None
        self._path = path
        self._work = work
        self._zarr = zarr
        self._group = zarr.create_group(str(work))
        self._arrays: dict[str, Any] = {}

    def append(self, name: str, rows: Tensor) -> None:
        if name not in self._arrays:
            self._arrays[name] = self._group.create_array(
                _inside(name),
                shape=(0, *rows.shape[1:]),
                chunks=rows.shape,
                dtype=_ZARR[rows.dtype],
            )
        self._arrays[name].append(rows.numpy())

    def finish(self, about: Mapping[str, Any]) -> None:
        self._group.attrs["capture"] = dict(about)
        _move(self._work, self._path)

    def read(self, name: str) -> Tensor:
        array = self._zarr.open_array(str(self._path), path=_inside(name), mode="r")
        return torch.from_numpy(array[:])


@contextmanager
def storing(
    out: str | os.PathLike[str] | None, dtype: torch.dtype, rows: int | None, force: bool
) -> Iterator[Store]:
    """Where tensors of `dtype` are to go; what a failure leaves half written is removed.

    out: a name ending in .safetensors or .zarr; None: memory.
    rows: how many are expected at most, where that is known.

    Raises:
        ResultError: `out` ends otherwise, exists and is not to be replaced, or cannot be written.
        CaptureError: zarr is not installed, or the format has no such dtype.
    """
    if out is None:
        yield Memory(rows)
        return
    path = Path(out)
    kinds = {".safetensors": (SafetensorsFile, _SAFETENSORS), ".zarr": (ZarrFolder, _ZARR)}
    if path.suffix not in kinds:
        raise ResultError(f"'{path}': give out a name that ends in .safetensors or .zarr")
    kind, dtypes = kinds[path.suffix]
    if dtype not in dtypes:
        known = ", ".join(str(known) for known in dtypes)
        raise CaptureError(f"'{path}' cannot hold {dtype}: give dtype as one of {known}")
    if path.exists() and not force:
        raise ResultError(f"'{path}' exists; give another out, or force=True to replace it")
    if path.exists() and not (path.is_file() if kind is SafetensorsFile else _is_zarr(path)):
        raise ResultError(f"'{path}' is no {path.suffix[1:]} to replace; give another out")
    if not path.absolute().parent.is_dir():
        raise ResultError(f"cannot write '{path}': there is no folder '{path.parent}'")
    work = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield kind(path, work)
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _inside(name: str) -> str:
    return name.replace(".", "/")


def _is_zarr(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def _move(made: Path, path: Path) -> None:
    """Put what was made in its place, in which another of its kind may lie."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(made, path)
