"""Training methods by name; a new one is a file here, a line below and a recipe."""

from __future__ import annotations

from vitprobe.training.methods.base import Batch, Method, MethodConfig, Moment
from vitprobe.training.methods.dino import DINO
from vitprobe.training.methods.finetune import Finetune
from vitprobe.training.methods.mae import MAE
from vitprobe.training.methods.moco_v3 import MoCoV3
from vitprobe.training.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "supervised": Supervised,
    "finetune": Finetune,
}

__all__ = ["METHODS", "Batch", "Method", "MethodConfig", "Moment"]
