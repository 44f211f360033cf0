"""F2: attention distance of every head by block, all systems."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import INTERVALS, counted, images_of, present, setting
from figures.heads import panels


def draw(study: Study) -> Figure:
    return panels(study, "attention_distance", "Distance (px)")


def caption(study: Study) -> str:
    return (
        "Attention distance by block, in pixels of the 28 x 28 input: how far from a patch the "
        "patches lie that it attends to. A dot is a head of one seed (mean over images), the line "
        "the mean over heads and seeds, dashed the value of uniform attention. "
        f"{INTERVALS} {counted(study, present(study))}. {images_of(study)}. {setting(study)}"
    )
