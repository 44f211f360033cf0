"""Figures of a comparison, one function a figure, and of training runs.

Every function takes a `Comparison`, but `training_curves` a table of `vitprobe.runs`. Those with
`ax` draw into it under the caller's own style and return it; without `ax` they make a figure under
vitprobe's. Nothing here changes global style.
"""

from vitprobe.plots.attention import (
    attention_distance,
    attention_entropy,
    attention_overlay,
    attention_panels,
    sink_mass,
)
from vitprobe.plots.similarity import cka_grid, cka_heatmap, first_direction_share
from vitprobe.plots.style import save, style
from vitprobe.plots.training import training_curves

__all__ = [
    "attention_distance",
    "attention_entropy",
    "attention_overlay",
    "attention_panels",
    "cka_grid",
    "cka_heatmap",
    "first_direction_share",
    "save",
    "sink_mass",
    "style",
    "training_curves",
]
