"""Figures of a comparison, one function a figure, and of training runs.

Every function takes a `Comparison`; `accuracy` and `probes_by_depth` take `Scores` as well, and
`training_curves` a table of `vitprobe.runs`. Those with
`ax` draw into it under the caller's own style and return it; without `ax` they make a figure under
vitprobe's. Nothing here changes global style.
"""

from vitprobe.plots.accuracy import accuracy, probes_by_depth
from vitprobe.plots.accuracy_panels import accuracy_panels
from vitprobe.plots.attention import (
    attention_distance,
    attention_entropy,
    attention_overlay,
    attention_panels,
    sink_mass,
)
from vitprobe.plots.curves import first_direction_share, fourier_curves, token_curves
from vitprobe.plots.depth import depth_view
from vitprobe.plots.differences import differences, group_spread
from vitprobe.plots.models import model_map
from vitprobe.plots.pictures import attention_maps, head_maps
from vitprobe.plots.similarity import (
    cka_grid,
    cka_heatmap,
    interval_width,
    similarity_grid,
    similarity_heatmap,
)
from vitprobe.plots.style import paper_style, save
from vitprobe.plots.training import training_curves

__all__ = [
    "accuracy",
    "accuracy_panels",
    "attention_distance",
    "attention_entropy",
    "attention_maps",
    "attention_overlay",
    "attention_panels",
    "cka_grid",
    "cka_heatmap",
    "depth_view",
    "differences",
    "first_direction_share",
    "fourier_curves",
    "group_spread",
    "head_maps",
    "interval_width",
    "model_map",
    "paper_style",
    "probes_by_depth",
    "save",
    "similarity_grid",
    "similarity_heatmap",
    "sink_mass",
    "token_curves",
    "training_curves",
]
