"""F4: what distillation changes: D-MAE against MAE."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study, same_layers
from figures.common import (
    BLOCKS,
    INTERVALS,
    LAYERS,
    counted,
    grid,
    images_of,
    layered,
    legend,
    letters,
    line,
    look,
    present,
    setting,
)

METHODS = ("Random", "MAE", "D-MAE")


def draw(study: Study) -> Figure:
    methods, everyone = present(study, METHODS), present(study, (*METHODS, "Teacher"))
    figure, axes = grid(3, 1, 4.3)
    cka, distance, entropy = axes[:, 0]
    for method in methods:
        line(cka, LAYERS, same_layers(study.cka(method, "Teacher")).mean(1), look(method))
    for method in everyone:
        for ax, measure in ((distance, "attention_distance"), (entropy, "attention_entropy")):
            values = study.attention(measure, method, relative=True).mean(2)
            line(ax, BLOCKS, values, look(method))
    letters((cka, distance, entropy), ("Similarity to the teacher", "Distance", "Entropy"))
    layered(cka, LAYERS, "Layer")
    cka.set_ylabel("CKA with the same\nlayer of the teacher")
    for ax, noun in ((distance, "distance"), (entropy, "entropy")):
        layered(ax, BLOCKS, "Block")
        ax.set_ylabel(f"Attention {noun}\n(relative to uniform)")
    legend(figure, {name: look(name) for name in everyone}, 4)
    return figure


def caption(study: Study) -> str:
    methods = present(study, (*METHODS, "Teacher"))
    return (
        "What distilling the attention of the teacher's last block changes. (a) Debiased CKA of "
        "each layer with the same layer of the teacher. (b, c) Attention distance and entropy, "
        "mean over heads, as a share of their value under uniform attention. "
        f"{INTERVALS} {counted(study, methods)}: the intervals are for this one "
        f"teacher. {images_of(study)}. {setting(study)}"
    )
