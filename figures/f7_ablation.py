"""F7: what to distil: D-MAE and its variants."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from analyses.fashion.reading import VARIANTS, Study, cka_of, same_layers
from figures.common import (
    GREEN,
    LAYERS,
    dots,
    images_of,
    layered,
    legend,
    letters,
    line,
    look,
    mosaic,
    rows_of,
    setting,
)
from vitprobe.plots.style import COLORS

NOTHING = "nothing (MAE)"


def styles(study: Study) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label and look of every model that is there, MAE first."""
    others = [color for color in COLORS if color not in (GREEN, look("MAE")["color"])]
    found = {"MAE 0": (NOTHING, look("MAE")), "D-MAE 0": (VARIANTS["D-MAE 0"], look("D-MAE"))}
    rest = [name for name in VARIANTS if name != "D-MAE 0"]
    for name, color, marker in zip(rest, others, "sDoP", strict=True):
        found[name] = (VARIANTS[name], {**look("MAE"), "color": color, "marker": marker})
    return {name: one for name, one in found.items() if name in study.distillation.models}


def draw(study: Study) -> Figure:
    looks = styles(study)
    figure, (curves, knn, linear) = mosaic("AA;BC", 3.6, height_ratios=(1.5, 1))
    for name, (_, style) in looks.items():
        cka = same_layers(cka_of(study.distillation, name, "Teacher 0"))
        line(curves, LAYERS, [cka], style)
    layered(curves, LAYERS, "Layer")
    curves.set_ylabel("CKA with the same\nlayer of the teacher")
    for ax, protocol in ((knn, "knn"), (linear, "linear")):
        for row, (name, (_, style)) in enumerate(looks.items()):
            dots(ax, row, study.accuracy([name], protocol), style)
        ax.locator_params(axis="x", nbins=4)
        ax.margins(x=0.1)
        ax.set_xlabel("Accuracy (%)")
        rows_of(ax, [label for label, _ in looks.values()])
    linear.set_yticklabels([])
    letters((curves, knn, linear), ("Similarity to the teacher", "k-NN", "Linear probe"))
    legend(figure, dict(looks.values()), 3)
    return figure


def caption(study: Study) -> str:
    missing = [
        label for name, (label, _) in styles(study).items() if study.accuracy([name], "knn").empty
    ]
    gaps = f" Not evaluated: {', '.join(missing)}." if missing else ""
    return (
        "What of the teacher is distilled into an MAE student: the attention of one block "
        "(block 11, the last, is D-MAE; blocks 5 and 2 are the middle and a lower one), of all "
        "blocks, or the hidden states. (a) Debiased CKA of each layer with the same layer of the "
        "teacher. (b, c) Accuracy of frozen features on the 10,000 test images."
        f"{gaps} One seed each: no interval, and no difference here is more than a hint. "
        f"{images_of(study)} in (a). "
        f"{setting(study)}"
    )
