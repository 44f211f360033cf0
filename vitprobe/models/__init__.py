"""From a string to a described, runnable Vision Transformer.

>>> import vitprobe as vp
>>> mae = vp.load("mae_tiny_400e.pth.tar", name="MAE-Tiny", heads=12)
>>> own = vp.wrap(module, name="mine", input_size=(3, 224, 224))

The names resolve on first use, so that reading a spec (`parse_spec`) imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitprobe.models.sources import ModelSpec, parse_spec

if TYPE_CHECKING:
    from vitprobe.models.anatomy import Anatomy
    from vitprobe.models.loading import load, wrap
    from vitprobe.models.model import Fact, LoadReport, Model

_HOMES = {
    "Anatomy": "anatomy",
    "Fact": "model",
    "LoadReport": "model",
    "Model": "model",
    "load": "loading",
    "wrap": "loading",
}

__all__ = [
    "Anatomy",
    "Fact",
    "LoadReport",
    "Model",
    "ModelSpec",
    "load",
    "parse_spec",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
