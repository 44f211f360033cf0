"""An unpickler that executes nothing: tensors and plain containers in, inert stubs for the rest."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors of one dtype are views of."""

    raw: Tensor  # of uint8, one-dimensional
    dtype: torch.dtype

    def view(
        self, offset: int, size: Iterable[int], stride: Iterable[int], dtype: torch.dtype
    ) -> Tensor:
        size, stride = tuple(size), tuple(stride)
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        whole = self.raw[: len(self.raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(size, default=1) < 0 or min(stride, default=1) < 0 or not 0 <= offset <= last:
            raise ValueError("a tensor has a negative size, stride or offset")
        if last >= len(whole):
            raise EOFError("a tensor reaches past its storage")
        return whole.as_strided(size, stride, offset)


class _Dictionary(dict[Any, Any]):
    """An ordered dictionary whose methods no pickled state can shadow."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        """Ignore the attributes of a state dict (`_metadata`)."""


class Inert:
    """What any object that is no tensor becomes: it keeps its state and does nothing."""

    __slots__ = ("items", "state")
    items: dict[Any, Any]
    state: Any

    # Not __init__, which unpickling may skip.
    def __new__(cls, *_: Any, **__: Any) -> Inert:
        stub = super().__new__(cls)
        stub.items, stub.state = {}, None
        return stub

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, _: Any) -> None:
        """Accept what a pickled subclass of list holds."""

    def extend(self, _: Any) -> None:
        """Accept what a pickled subclass of list holds."""


def as_mapping(value: Any) -> dict[str, Any]:
    """The string-keyed entries of a dictionary or of an `Inert` object (argparse.Namespace, …)."""
    if isinstance(value, Inert):
        value = {**value.items, **(value.state if isinstance(value.state, dict) else {})}
    if not isinstance(value, Mapping):
        return {}
    return {key: entry for key, entry in value.items() if isinstance(key, str)}


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    if isinstance(storage, Inert):
        return Inert()
    return storage.view(offset, size, stride, storage.dtype)


def _tensor_v3(
    storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    return storage.view(offset, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    return function(*arguments)


_REBUILD: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
}


@dataclass(frozen=True, slots=True)
class StorageType:
    dtype: torch.dtype


class Unpickler(pickle.Unpickler):
    """An unpickler for which nothing but tensors and plain containers exists."""

    def __init__(
        self, stream: Any, load_storage: Callable[[str, torch.dtype, int], Storage]
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._load_storage = load_storage
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dictionary
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) in _REBUILD:
            # A fresh object: what a pickle sets on it stays within that pickle.
            return functools.partial(_REBUILD[module, name])
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return StorageType(_DTYPES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return Inert

    def persistent_load(self, identity: Any) -> Any:
        kind, storage_type, *rest = identity
        if kind == "module":  # a class with its source code, which torch < 1.6 saved
            return storage_type
        if kind != "storage" or not isinstance(storage_type, StorageType):
            return Inert()
        key, _location, count, *view = rest
        if any(part is not None for part in view):
            raise pickle.UnpicklingError("a view of a storage, which torch < 0.4 wrote")
        if key not in self._storages:
            self._storages[key] = self._load_storage(key, storage_type.dtype, count)
        return self._storages[key]
