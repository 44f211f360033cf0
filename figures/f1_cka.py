"""F1: layer similarity of each pre-trained student with the supervised one and the teacher."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import LAYERS, counted, grid, heat, images_of, present, scale, setting
from vitprobe.plots.style import COLUMN

STUDENTS = ("MoCo-v3", "DINO", "MAE", "D-MAE")
REFERENCES = ("Supervised", "Teacher")
NOUNS = {"Supervised": "the supervised", "Teacher": "the teacher"}


def draw(study: Study) -> Figure:
    students, references = present(study, STUDENTS), present(study, REFERENCES)
    figure, axes = grid(
        len(students),
        len(references),
        0.345 * COLUMN * len(students) + 0.9,
        sharex=True,
        sharey=True,
        layout="compressed",
    )
    for row, student in zip(axes, students, strict=True):
        for ax, reference in zip(row, references, strict=True):
            cells = study.cka(student, reference).mean((0, 1))
            mesh = heat(ax, LAYERS, LAYERS, cells)
            ax.set_aspect("equal")
            ax.set_xticks(LAYERS[::3])
            ax.set_yticks(LAYERS[::3])
        row[0].set_ylabel(f"Layer of {student}")
    for ax, reference in zip(axes[-1], references, strict=True):
        ax.set_xlabel(f"Layer of {NOUNS[reference]}")
    scale(mesh, axes, "Debiased CKA", location="top", shrink=0.7, aspect=30, pad=0.01)
    return figure


def caption(study: Study) -> str:
    students, references = present(study, STUDENTS), present(study, REFERENCES)
    lowest = min(study.cka(a, b).mean((0, 1)).min() for a in students for b in references)
    return (
        "Layer similarity (debiased linear CKA of patch tokens) of each pre-trained student "
        "(upwards) with the supervised student and with the teacher (rightwards); layer 0 is the "
        "embedded image. Cells are means over all pairs of seeds: "
        f"{counted(study, (*students, *references))}; the lowest cell is "
        f"{lowest:.2f}. {images_of(study)}. {setting(study)}"
    )
