"""Draw all figures of the study again, and write their captions.

python -m figures [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import tyro

import vitprobe as vp
from analyses.fashion.reading import RESULTS, Study
from analyses.sections import fill, wrapped
from figures.common import write
from vitprobe.errors import VitprobeError

HERE = Path(__file__).parent
FIGURES = (
    "f1_cka",
    "f2_distance",
    "f3_entropy",
    "f4_distillation",
    "f5_layers",
    "f6_accuracy",
    "f7_ablation",
    "f8_seeds",
    "f9_training",
    "f10_cost",
)


def captions(study: Study) -> str:
    """Of all figures, as Markdown."""
    texts = []
    for name in FIGURES:
        number = name.split("_")[0].upper()
        text = wrapped(
            f"**{number}.** {_module(name).caption(study)} Script: [`{name}.py`]({name}.py); "
            f"[PDF]({name}.pdf)."
        )
        texts.append(f"## {number}\n\n![{number}]({name}.png)\n\n{text}")
    return "\n\n".join(texts)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"figures.{name}")


def main(results: Path = RESULTS, out: Path = HERE) -> None:
    """results: that `make study` wrote. out: where figures and README.md go."""
    study, readme = Study(results), out / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    with vp.plots.paper_style():
        for name in FIGURES:
            write(_module(name).draw(study), out / name)
    if not readme.exists():
        readme.write_bytes((HERE / "README.md").read_bytes())
    fill(readme, "captions", captions(study))
    print(readme)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except VitprobeError as error:
        print(f"figures: {error}", file=sys.stderr)
        sys.exit(2)
