"""F5: which layers matter: the first blocks kept, and probes by depth."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import LAYERS, grid, layered, legend, letters, line, look, setting, updates_of
from vitprobe.plots.style import GRID

TUNED = ("MoCo-v3", "MAE", "D-MAE")
PROBED = ("Random", "Supervised", "MoCo-v3", "DINO", "MAE", "D-MAE", "Teacher")
KEPT = (0, 3, 6, 9, 12)
SHARES = ((1.0, "all labels"), (0.01, "1 % of them"))


def draw(study: Study) -> Figure:
    figure, axes = grid(2, 2, 3.7)
    for ax, (labels, _) in zip(axes[0], SHARES, strict=True):
        for method in TUNED:
            _kept(ax, study.by_kept(method, KEPT, labels=labels), method)
        ax.set_xticks(KEPT)
        ax.set_xlim(-0.8, 12.8)
        ax.set_xlabel("Pre-trained blocks kept")
        ax.grid(axis="y", color=GRID, linewidth=0.5)
        ax.tick_params(axis="x", length=0)
    shown = list(TUNED)
    for ax, protocol in zip(axes[1], ("knn", "linear"), strict=True):
        for method in PROBED:
            values = study.by_layer(f"{method} 0", protocol)
            if len(values):
                line(ax, values.index.to_numpy(int), [values.to_numpy()], look(method))
                shown.append(method)
        layered(ax, LAYERS, "Layer")
    for ax in axes[:, 0]:
        ax.set_ylabel("Accuracy (%)")
    titles = ("Fine-tuned, all labels", "Fine-tuned, 1 %", "k-NN by depth", "Linear by depth")
    letters(axes.flat, titles)
    legend(figure, {name: look(name) for name in PROBED if name in shown}, 4)
    return figure


def _kept(ax: Axes, table: Any, method: str) -> None:
    style = look(method)
    # The other seeds were run for some numbers of blocks alone, and a line would leap between them.
    whole = table.dropna()
    for _, values in whole.head(1).iterrows():
        ax.plot(KEPT, values, **style)
    for kept in KEPT:
        ax.plot(
            [kept] * len(table), table[kept], ls="", ms=2, mew=0, color=style["color"], marker="o"
        )


def caption(study: Study) -> str:
    wide = study.scores
    wide = wide[(wide["protocol"] == "finetune") & (wide["metric"] == "top1")]
    margin = 50 * (wide["high"] - wide["low"]).max()
    tuned = (
        "; over the 10,000 test images the interval of a fine-tuned accuracy reaches at most "
        f"{margin:.1f} points to either side"
        if len(wide)
        else ""
    )
    missing = [
        f"{method} at {text}"
        for labels, text in SHARES
        for method in TUNED
        if study.by_kept(method, KEPT, labels=labels).dropna().empty
    ]
    gaps = f" Not run at every number of blocks: {', '.join(missing)}." if missing else ""
    updates = updates_of(study)
    return (
        "Which layers matter. (a, b) Accuracy after fine-tuning where only the first blocks keep "
        "their pre-trained weights and the others start anew (patches, class token and positions "
        "are kept in any case); dots are seeds, lines the first that was run for every number of "
        f"blocks. {updates} of fine-tuning{tuned}. Axes differ.{gaps} (c, d) "
        "Accuracy of weighted k-NN (k = 20) and of a linear classifier on the mean "
        f"of the patch tokens of each layer, seed 0. {setting(study)}"
    )
