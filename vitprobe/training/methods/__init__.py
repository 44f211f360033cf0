"""Training methods by name; a new one is a file here, a line below and a recipe."""

from __future__ import annotations

from vitprobe.training.methods.base import Batch, Method, MethodConfig
from vitprobe.training.methods.mae import MAE
from vitprobe.training.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"mae": MAE, "supervised": Supervised}

__all__ = ["METHODS", "Batch", "Method", "MethodConfig"]
