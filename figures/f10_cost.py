"""F10: what pre-training costs."""

from __future__ import annotations

from matplotlib.figure import Figure

from analyses.fashion.reading import Study
from figures.common import LOOKS, grid, letters, look, rows_of, setting
from vitprobe.plots.style import INK

METHODS = ("Supervised", "MoCo-v3", "DINO", "MAE", "D-MAE", "Teacher")
QUANTITIES = (("images_per_s", "Speed (images/s)"), ("minutes", "Time (min per run)"))


def cost(study: Study, method: str, what: str) -> list[float]:
    return [
        float(about[what])
        for name, about in study.costs.items()
        if name.rsplit(" ", 1)[0] == method
    ]


def draw(study: Study) -> Figure:
    methods = [name for name in LOOKS if name in METHODS and cost(study, name, "minutes")]
    figure, axes = grid(1, 2, 1.75, sharey=True)
    for ax, (what, label) in zip(axes[0], QUANTITIES, strict=True):
        for row, method in enumerate(methods):
            values = cost(study, method, what)
            color = look(method)["color"]
            ax.barh(row, sum(values) / len(values), height=0.62, color=color, alpha=0.45)
            ax.plot(values, [row] * len(values), "o", color=INK, ms=2.2, mew=0)
        rows_of(ax, methods)
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=4)
    letters(axes[0], ("Speed", "Time"))
    return figure


def caption(study: Study) -> str:
    ran = {
        f"{one['device']}, {one['precision']}, {one['threads']} thread(s) a run"
        for one in (about["execution"] for about in study.costs.values())
    }
    total = sum(float(about["minutes"]) for about in study.costs.values())
    return (
        "What pre-training costs: (a) training images a second in the fastest epoch of a run, "
        "(b) minutes of a run. Bars are means over seeds, dots single runs. Runs shared the "
        "machine with each other and with other work, so that (b) is an upper bound and (a) the "
        "better measure, though seeds of one method still differ up to twofold. The runs shown "
        f"took {total:.0f} minutes together. Run on: "
        f"{'; '.join(sorted(ran))}. {setting(study)}"
    )
