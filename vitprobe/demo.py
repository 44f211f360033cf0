"""The demonstration: two small ViTs trained on handwritten digits, then compared."""

from __future__ import annotations

import sys
from pathlib import Path

from vitprobe.compare import compare
from vitprobe.data.images import images
from vitprobe.data.labelled import load_labelled
from vitprobe.errors import ResultError
from vitprobe.models import load
from vitprobe.report import report
from vitprobe.training import pretrain

RECIPES = {"MAE": "digits_mae", "Supervised": "digits_supervised"}
UNTRAINED = {"epochs": 0}


def demo(out: str | Path, *, force: bool = False) -> Path:
    """Train an MAE and a supervised ViT on scikit-learn's digits, compare them and their untrained
    start on the test images, and write the report. Nothing is downloaded.

    Args:
        out: folder for `runs/` and `report/`.
        force: replace what an earlier demo left there.

    Returns:
        The path of report.html.

    Raises:
        ResultError: `out` exists and `force` is not given, or it cannot be written.
    """
    out = Path(out)
    if out.exists() and not force:
        raise ResultError(f"'{out}' exists; give another --out, or --force to replace it")
    models = []
    for name, recipe in RECIPES.items():
        _say(f"training {name} on handwritten digits ({recipe})")
        models.append(load(pretrain(recipe, out / "runs" / recipe, force=force), name=name))
        metrics = (models[-1].training or {})["metrics"]
        _say(", ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
    untrained = pretrain("digits_mae", out / "runs" / "untrained", overrides=UNTRAINED, force=force)
    models.append(load(untrained, name="Untrained"))
    _say("comparing them on the test images")
    digits = load_labelled("digits")
    pictures = images(digits.images[digits.test])
    pictures.source = "scikit-learn's digits, test images"
    result = compare(models, pictures)
    return report(result, out / "report", force=force)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
