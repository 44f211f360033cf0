"""Pre-training of the encoders that vitprobe compares."""

from __future__ import annotations

from vitprobe.training.loop import Terminated, pretrain
from vitprobe.training.plan import Plan, plan
from vitprobe.training.recipe import Recipe, bundled_recipes, load_recipe

__all__ = [
    "Plan",
    "Recipe",
    "Terminated",
    "bundled_recipes",
    "load_recipe",
    "plan",
    "pretrain",
]
