"""The registry of training methods."""

from __future__ import annotations

from vitprobe.training.methods import METHODS
from vitprobe.training.methods.dino import DINO
from vitprobe.training.methods.finetune import Finetune
from vitprobe.training.methods.mae import MAE
from vitprobe.training.methods.moco_v3 import MoCoV3
from vitprobe.training.methods.supervised import Supervised


def test_methods_are_registered_under_the_names_recipes_use() -> None:
    assert {
        "mae": MAE,
        "moco_v3": MoCoV3,
        "dino": DINO,
        "supervised": Supervised,
        "finetune": Finetune,
    } == METHODS
