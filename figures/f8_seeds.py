"""F8: is the difference between methods larger than between seeds of one."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.fashion.reading import Study, cka_of, same_layers
from figures.common import (
    LAYERS,
    counted,
    dots,
    grid,
    heat,
    images_of,
    layered,
    letters,
    look,
    present,
    rows_of,
    scale,
    setting,
)
from vitprobe.plots.style import INK

METHODS = ("Supervised", "MoCo-v3", "DINO", "MAE", "D-MAE")


def within(study: Study, method: str) -> np.ndarray:
    """CKA of equal layers of every two seeds of a method: (pairs, layer)."""
    cka = same_layers(study.cka(method, method))
    return cka[np.triu_indices(len(cka), 1)]


def between(study: Study, methods: list[str]) -> np.ndarray:
    """Mean CKA of equal layers of every two methods: (pairs of methods, layer)."""
    pairs = [
        same_layers(study.cka(a, b)).mean((0, 1))
        for i, a in enumerate(methods)
        for b in methods[i + 1 :]
    ]
    return np.array(pairs).reshape(-1, len(LAYERS))


def draw(study: Study) -> Figure:
    methods = present(study, METHODS)
    figure, axes = grid(3, 1, 5.6, height_ratios=(2.1, 1.35, 1.1))
    matrix, lines, spread = axes[:, 0]
    _matrix(matrix, study, methods)
    for method in methods:
        pairs = within(study, method)
        if len(pairs):
            lines.plot(LAYERS, pairs.mean(0), **look(method))
    apart = between(study, methods)
    lines.fill_between(LAYERS, apart.min(0), apart.max(0), color=INK, alpha=0.12, linewidth=0)
    lines.plot(LAYERS, apart.mean(0), color=INK, lw=1.2, ls=(0, (4, 2)), label="different methods")
    lines.legend(loc="lower left")
    layered(lines, LAYERS, "Layer")
    lines.set_ylabel("CKA of equal layers")
    for row, method in enumerate(methods):
        values = study.attention("attention_distance", method).mean((1, 2))
        dots(spread, row, values, look(method))
    rows_of(spread, methods)
    spread.set_xlabel("Attention distance, mean of all heads (px)")
    letters(axes[:, 0], ("Every two runs", "Seeds and methods by layer", "Seeds and methods"))
    return figure


def _matrix(ax: Axes, study: Study, methods: list[str]) -> None:
    names = [name for method in methods for name in study.seeds(method)]
    table = np.array(
        [[same_layers(cka_of(study.systems, a, b)).mean() for b in names] for a in names]
    )
    edges = np.arange(len(names) + 1)
    mesh = heat(ax, edges, edges, table)
    ends = np.cumsum([0, *(len(study.seeds(method)) for method in methods)])
    for end in ends[1:-1]:
        ax.axhline(end, color="white", lw=1.2)
        ax.axvline(end, color="white", lw=1.2)
    middles = (ends[1:] + ends[:-1]) / 2
    ax.set_yticks(middles, methods)
    ax.set_xticks(middles, methods, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_aspect("equal")
    ax.invert_yaxis()
    scale(mesh, ax, "CKA, mean of equal layers", shrink=0.8, aspect=18)


def caption(study: Study) -> str:
    methods = present(study, METHODS)
    alike = [within(study, method) for method in methods]
    alike = [pairs.mean() for pairs in alike if len(pairs)]
    apart = between(study, methods)
    means = (
        f"Over all layers the mean is {np.mean(alike):.2f} between seeds of one method and "
        f"{apart.mean():.2f} between methods, up to {apart.mean(1).max():.2f} for one pair of "
        "methods. "
        if alike
        else ""
    )
    return (
        "Is the difference between methods larger than between seeds? (a) Debiased CKA of every "
        "two runs, mean over the 13 pairs of equal layers; blocks on the diagonal are seeds of one "
        "method (a run with itself is 1). (b) The same by layer: lines are means over pairs of "
        "seeds of one method (colours as in c; none of one seed), dashed is the mean over pairs of "
        f"different methods and the band the range of these. {means}(c) Attention "
        "distance of every run: dots are seeds, the tick their mean, the bar its 95 % interval "
        "(Student's t). "
        f"{counted(study, methods)}. {images_of(study)}. {setting(study)}"
    )
