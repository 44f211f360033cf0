"""Modules without numbers: their shapes, at no cost in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _WithNumbers(TorchFunctionMode):
    """Keeps linspace off the meta device: timm reads numbers from what it gives."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        where = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **where})


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made within have shapes and no numbers."""
    with torch.device("meta"), _WithNumbers():
        yield
