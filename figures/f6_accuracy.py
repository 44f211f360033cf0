"""F6: what the systems are worth: accuracy under five protocols."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import (
    LOOKS,
    counted,
    dots,
    letters,
    look,
    mosaic,
    present,
    rows_of,
    setting,
    updates_of,
)

PROTOCOLS = (
    ("knn", 1.0, "k-NN"),
    ("linear", 1.0, "Linear probe"),
    ("finetune", 1.0, "Tuned, all"),
    ("finetune", 0.1, "Tuned, 10 %"),
    ("finetune", 0.01, "Tuned, 1 %"),
)
METHODS = tuple(name for name in LOOKS if name != "MAE fine-tuned")


def draw(study: Study) -> Figure:
    figure, axes = mosaic("AAABBB;CCDDEE", 2.9)
    for ax, (protocol, labels, _) in zip(axes, PROTOCOLS, strict=True):
        found = {
            method: study.accuracy(study.seeds(method), protocol, labels=labels)
            for method in present(study, METHODS)
        }
        scored = [method for method, values in found.items() if len(values)]
        for row, method in enumerate(scored):
            dots(ax, row, found[method], look(method))
        rows_of(ax, scored)
        ax.locator_params(axis="x", nbins=3)
        ax.margins(x=0.1)
        ax.set_xlabel("Accuracy (%)")
    for ax in (axes[1], *axes[3:]):
        ax.set_yticklabels([])
    letters(axes, [title for _, _, title in PROTOCOLS])
    return figure


def caption(study: Study) -> str:
    return (
        "Top-1 accuracy on the 10,000 test images of Fashion-MNIST: (a, b) of frozen features, by "
        "weighted k-NN (k = 20) and by a linear classifier; (c-e) after fine-tuning for "
        f"{updates_of(study)} with all labels, 10 % and 1 % of them. Random, "
        "fine-tuned, is training from scratch; the supervised student and the teacher were not "
        "fine-tuned. A dot is a seed, the tick their mean, the bar its 95 % interval over seeds "
        f"(Student's t; none for one seed). {counted(study, present(study, METHODS))}. Axes "
        f"differ and do not start at 0. {setting(study)}"
    )
