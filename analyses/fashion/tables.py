"""Tables of the study's README: accuracy of every system, and where every number comes from."""

from __future__ import annotations

from typing import Final

import numpy as np

import vitprobe as vp
from analyses.fashion.findings import difference, over_seeds
from analyses.fashion.reading import VARIANTS, Study
from analyses.fashion.study import NAMES, RANDOM, SYSTEMS
from analyses.sections import table
from vitprobe.statistics import t_interval
from vitprobe.wording import join

PROTOCOLS: Final = (
    ("knn", 1.0, "k-NN"),
    ("linear", 1.0, "linear"),
    ("finetune", 1.0, "fine-tuned"),
    ("finetune", 0.1, "10 % of labels"),
    ("finetune", 0.01, "1 % of labels"),
)


def made_by(study: Study) -> str:
    """Which schedule, images and version made the results."""
    plan, about = study.schedule, study.systems.provenance
    return (
        f"Schedule `{plan['name']}` ({plan['images']:,} training images, {plan['epochs']} epochs); "
        f"similarity and attention on {about['images']['count']:,} test images; "
        f"compared by vitprobe {about['versions']['vitprobe']}, commit {about['commit']}; commits "
        "of evaluations are in `scores.json`, where those of a changed tree end in `-dirty`."
    )


def accuracies(study: Study) -> str:
    """Top-1 accuracy in % over seeds, and of the variants of distillation."""
    names = {method: study.seeds(method) for method in study.methods if method != "MAE fine-tuned"}
    names |= {name: (name,) for name in VARIANTS if name != "D-MAE 0"}
    rows = []
    for method, models in names.items():
        cells = [
            _mean(study.accuracy(models, protocol, labels=labels).to_numpy())
            for protocol, labels, _ in PROTOCOLS
        ]
        if any(cell != "–" for cell in cells):
            rows.append((method, str(len(models)), *cells))
    return table(("system", "seeds", *(label for *_, label in PROTOCOLS)), rows)


def not_above_random(study: Study) -> str:
    """Which systems do not exceed the untrained ones by more than the interval of the difference.

    The interval is that of a finding (Welch's, seeds as the unit); a system of one seed has none.
    """
    parts = []
    for protocol, labels, label in PROTOCOLS:
        untrained = study.accuracy(study.seeds("Random"), protocol, labels=labels)
        found = {
            method: difference(
                study.accuracy(study.seeds(method), protocol, labels=labels), untrained
            )
            for method in study.methods
            if method not in ("Random", "MAE fine-tuned")
        }
        # One seed has no interval, and nan is not at most 0.
        names = [
            method
            for method, effect in found.items()
            if effect is not None and over_seeds(effect).low <= 0
        ]
        if names:
            parts.append(f"by {label}, {join(names)}")
    if not parts:
        return "All are above Random by more than the interval of the difference."
    return (
        "Not above Random by more than the 95 % interval of the difference over seeds: "
        f"{'; '.join(parts)}. Of systems of one seed this cannot be told."
    )


def paired_with_random(study: Study) -> str:
    """MAE and D-MAE minus Random by k-NN in pairs by seed, which start from the same weights."""
    untrained = study.accuracy(study.seeds("Random"), "knn").to_numpy()
    parts = []
    for method in ("MAE", "D-MAE"):
        trained = study.accuracy(study.seeds(method), "knn").to_numpy()
        if len(trained) == len(untrained) > 1:
            mean, low, high = (float(one) for one in t_interval(trained - untrained)[:3])
            parts.append(f"{method} {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
    shared = (
        "Random, MAE and D-MAE of one seed start from the same weights, and intervals take them as "
        "independent."
    )
    return shared + (f" In pairs by seed, k-NN minus Random is {join(parts)}." if parts else "")


def _mean(values: np.ndarray) -> str:
    if not len(values):
        return "–"
    mean, low, high = (float(one) for one in t_interval(values)[:3])
    return f"{mean:.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def runs(study: Study) -> str:
    """Recipe, seed, epochs, schedule and checkpoint hash of every model in the results."""
    results = {
        "systems": study.systems,
        "distillation": study.distillation,
        "training": study.training,
    }
    rows = [_run(file, result, name) for file, result in results.items() for name in result.models]
    header = ("model", "result", "recipe", "seed", "epochs", "schedule", "sha256 of the checkpoint")
    return table(header, rows)


def _run(file: str, result: vp.Comparison, name: str) -> tuple[str, ...]:
    described = result.describe(name)
    training = described.get("training") or {}
    schedule = result.provenance["schedule"]["name"]
    return (
        name,
        f"`{file}.nc`",
        f"`{recipe_of(name)}`",
        str(training.get("seed", "–")),
        str(training.get("epochs", "–")),
        schedule,
        f"`{described['sha256']}`",
    )


def recipe_of(name: str) -> str:
    """The recipe of a model, by the method that its name begins with."""
    if name.startswith("MAE fine-tuned"):
        return "fashion_finetune"
    if name.lower().startswith(RANDOM):
        return SYSTEMS["mae"]
    methods = {method: SYSTEMS[system] for system, method in NAMES.items()}
    return methods[name.partition(" ")[0]]
