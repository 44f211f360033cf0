"""F3: attention entropy of every head by block, all systems."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import INTERVALS, counted, images_of, present, setting
from figures.heads import panels


def draw(study: Study) -> Figure:
    return panels(study, "attention_entropy", "Entropy (nats)")


def caption(study: Study) -> str:
    return (
        "Attention entropy by block: over how many patches a patch spreads its attention. A dot is "
        "a head of one seed (mean over images), the line the mean over heads and seeds, dashed the "
        f"value of uniform attention. {INTERVALS} {counted(study, present(study))}. "
        f"{images_of(study)}. {setting(study)}"
    )
