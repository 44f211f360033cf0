"""The demonstration: the encoders that come with vitprobe compared, or four small ViTs trained on
handwritten digits first."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitprobe.bundled import SAMPLE
from vitprobe.compare import compare
from vitprobe.data.images import images
from vitprobe.data.labelled import Arrays, load_labelled
from vitprobe.errors import ResultError
from vitprobe.models import load
from vitprobe.report import report
from vitprobe.results import Comparison
from vitprobe.training import pretrain

BUNDLED = {
    "Supervised": "bundled:fashion_supervised",
    "MoCo-v3": "bundled:fashion_mocov3",
    "DINO": "bundled:fashion_dino",
    "MAE": "bundled:fashion_mae",
    "D-MAE": "bundled:fashion_dmae",
}
RECIPES = {
    "MAE": "digits_mae",
    "MoCo-v3": "digits_mocov3",
    "Supervised": "digits_supervised",
    "D-MAE": "digits_dmae",
}
TEACHER = "MAE"
UNTRAINED = {"epochs": 0}


def demo(out: str | Path, *, train: bool = False, force: bool = False) -> Path:
    """Compare small ViTs and write the report. Nothing is downloaded.

    Those that come with vitprobe (supervised, MoCo-v3, DINO, MAE and D-MAE on Fashion-MNIST) and an
    untrained twin, on 512 test images that come with it too; or, with `train`, an MAE, a MoCo-v3, a
    supervised ViT and a D-MAE that the MAE teaches, trained first on scikit-learn's digits.

    Args:
        out: folder for `report/`, and for `runs/` where they are trained.
        train: train on digits first, one to two minutes on two cores.
        force: replace what an earlier demo left there.

    Returns:
        The path of report.html.

    Raises:
        ResultError: `out` exists and `force` is not given, or it cannot be written.
    """
    out = Path(out)
    if out.exists() and not force:
        raise ResultError(f"'{out}' exists; give another --out, or --force to replace it")
    result = _trained(out, force=force) if train else _bundled()
    out.mkdir(parents=True, exist_ok=True)
    _say("writing the report: its figures take most of the time")
    # A first look needs the page alone; figures as PDF and PNG too would double the time.
    return report(result, out / "report", force=force, formats=("svg",))


def _bundled() -> Comparison:
    _say("comparing the encoders that come with vitprobe on 512 images of Fashion-MNIST")
    with np.load(SAMPLE) as sample:
        pictures = images(sample["images"][:, None].astype(np.float32) / 255)
    pictures.source = "Fashion-MNIST, first 512 test images"
    models = [load(spec, name=name) for name, spec in BUNDLED.items()]
    return compare(models, pictures, random_reference=True)


def _trained(out: Path, *, force: bool) -> Comparison:
    models = []
    for name, encoder in _train(out / "runs", force=force).items():
        models.append(load(encoder, name=name))
        metrics = (models[-1].training or {})["metrics"]
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())
        _say(f"{name}: {numbers or 'as it was initialised'}")
    _say("comparing them on the test images")
    pictures = images(_test_images())
    pictures.source = "scikit-learn's digits, test images"
    return compare(models, pictures)


def _train(runs: Path, *, force: bool) -> dict[str, Path]:
    """The encoder of every run. Two train at a time: each keeps one core busy."""
    jobs: dict[str, Future[Path]] = {}
    # Forked processes would share torch's threads with this one, and hang.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for name, recipe in RECIPES.items():
            changes: dict[str, Any] = {}
            if name == "D-MAE":
                jobs[TEACHER].result()
                changes["distill.teacher"] = f"run:{runs / RECIPES[TEACHER]}"
            _say(f"training {name} on handwritten digits ({recipe})")
            jobs[name] = pool.submit(
                pretrain, recipe, runs / recipe, overrides=changes, force=force, progress=False
            )
        jobs["Untrained"] = pool.submit(
            pretrain, "digits_mae", runs / "untrained", overrides=UNTRAINED, force=force,
            progress=False,
        )  # fmt: skip
        return {name: job.result() for name, job in jobs.items()}


def _test_images() -> NDArray[Any]:
    test = load_labelled("digits").test
    if not isinstance(test, Arrays):
        raise TypeError("scikit-learn's digits are arrays")
    return test.images


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
