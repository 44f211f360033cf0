"""F9: how layers become what they are, from snapshots during training."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analyses.fashion.reading import Study, cka_of, same_layers
from figures.common import LAYERS, grid, heat, images_of, scale, setting

METHODS = ("Supervised", "MoCo-v3", "DINO", "MAE", "D-MAE")


def epochs(study: Study, method: str) -> list[int]:
    """At which there are snapshots of its first seed."""
    names = study.training.models
    wanted = study.schedule["snapshots"]
    return [epoch for epoch in wanted if f"{method} {epoch}" in names]


def towards(study: Study, method: str, end: str) -> np.ndarray:
    """CKA of each layer of each snapshot with the same layer of `end`: (epochs, layer)."""
    names = [f"{method} {epoch}" for epoch in epochs(study, method)]
    return np.array([same_layers(cka_of(study.training, name, end)) for name in names])


def draw(study: Study) -> Figure:
    methods = [method for method in METHODS if epochs(study, method)]
    goal = f"Supervised {epochs(study, 'Supervised')[-1]}"
    figure, axes = grid(len(methods), 2, 0.72 * len(methods) + 0.95, sharex=True, sharey="row")
    for row, method in zip(axes, methods, strict=True):
        times = epochs(study, method)
        for ax, end in zip(row, (f"{method} {times[-1]}", goal), strict=True):
            mesh = heat(ax, LAYERS, range(len(times)), towards(study, method, end))
            ax.set_yticks(range(len(times)), times)
            ax.set_xticks(LAYERS[::3])
        row[0].set_ylabel(f"{method}\nepoch")
    axes[0, 0].set_title("With its own end")
    axes[0, 1].set_title("With the supervised end")
    for ax in axes[-1]:
        ax.set_xlabel("Layer")
    label = "Debiased CKA of equal layers"
    scale(mesh, axes, label, location="top", shrink=0.7, aspect=30, pad=0.01)
    return figure


def caption(study: Study) -> str:
    return (
        "How layers become what they are: debiased CKA of each layer after some epochs (upwards) "
        "with the same layer at the end of the same run (left; the top row is 1) and at the end "
        "of supervised training (right). Epoch 0 is the start. Seed 0 of each method: no interval. "
        f"{images_of(study)}. {setting(study)}"
    )
