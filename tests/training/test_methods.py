"""The registry of training methods."""

from __future__ import annotations

from vitprobe.training.methods import METHODS
from vitprobe.training.methods.mae import MAE
from vitprobe.training.methods.supervised import Supervised


def test_methods_are_registered_under_the_names_recipes_use() -> None:
    assert {"mae": MAE, "supervised": Supervised} == METHODS
