"""What the figures read: condensed comparisons, all scores in one file, and what training took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import vitprobe as vp
from analyses.fashion.study import NAMES, RANDOM, SYSTEMS, VARIANTS, Schedule, model_spec
from vitprobe.scores import Scores, open_scores

IMAGES = 1024
MEASURES = ["cka", "attention_distance", "attention_entropy"]
STUDENTS = ("supervised", "mocov3", "dino", "mae", "dmae")


def results(schedule: Schedule, runs: Path, data: Path, out: Path) -> None:
    """Write systems.nc, training.nc, distillation.nc, scores.json and costs.json into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with np.load(data) as arrays:
        pictures = arrays["test_images"].astype(np.float32) / 255
    systems, groups = _systems(schedule, runs)
    _compare(systems, pictures, groups, schedule, out / "systems.nc")
    _compare(_snapshots(schedule, runs), pictures, {}, schedule, out / "training.nc")
    _compare(_variants(runs), pictures, {}, schedule, out / "distillation.nc")
    found = sorted((runs / "scores").glob("*/scores.json"))
    scores = sum((open_scores(path) for path in found), Scores([]))
    Scores(scores.rows, [_brief(one) for one in scores.provenance]).save(out / "scores.json")
    costs = json.dumps(_costs(schedule, runs), indent=1)
    (out / "costs.json").write_text(f"{costs}\n", encoding="utf-8")


def _brief(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """That of an evaluation without what the comparisons say of the same model, by its hash."""
    model = {key: provenance["model"][key] for key in ("name", "spec", "sha256")}
    return {**provenance, "model": model}


def _systems(schedule: Schedule, runs: Path) -> tuple[list[vp.Model], dict[str, Sequence[str]]]:
    """Every seed of every system there is, and the fine-tuned MAEs; grouped by system."""
    models, groups = [], {}
    for system in (*STUDENTS, "teacher", RANDOM):
        group = NAMES.get(system, "Random")
        for seed in schedule.seeds_of(system if system != RANDOM else "mae"):
            name, spec, needed = model_spec(system, seed, runs)
            if needed.exists():
                models.append(vp.load(spec, name=name))
                groups.setdefault(group, []).append(name)
    for seed in range(schedule.seeds):
        run = runs / "scores" / f"finetune-mae-{seed}-1"
        if (run / "encoder.safetensors").exists():
            name = f"MAE fine-tuned {seed}"
            models.append(vp.load(f"run:{run}", name=name))
            groups.setdefault("MAE fine-tuned", []).append(name)
    return models, groups


def _snapshots(schedule: Schedule, runs: Path) -> list[vp.Model]:
    """Seed 0 of every student at the epochs that were kept."""
    models = []
    for system in STUDENTS:
        for epoch in schedule.snapshots:
            path = runs / f"{system}-0" / "snapshots" / f"epoch_{epoch:04d}.safetensors"
            if path.exists():
                models.append(vp.load(path, name=f"{NAMES[system]} {epoch}"))
    return models


def _variants(runs: Path) -> list[vp.Model]:
    """Ways to distil, the teacher, and the MAE that nobody taught."""
    names = ("teacher", "mae", "dmae", *(f"dmae-{variant}" for variant in VARIANTS))
    specs = [model_spec(system, 0, runs) for system in names]
    return [vp.load(spec, name=name) for name, spec, needed in specs if needed.exists()]


def _compare(
    models: list[vp.Model],
    pictures: np.ndarray,
    groups: dict[str, Sequence[str]],
    schedule: Schedule,
    path: Path,
) -> None:
    images = vp.images(pictures, limit=IMAGES)
    images.source = "Fashion-MNIST, test images"
    result = vp.compare(models, images, MEASURES, groups=groups).condensed()
    parts = {name: group.to_dataset() for name, group in result.tree.children.items()}
    noted = {**result.provenance, "schedule": asdict(schedule)}
    vp.Comparison.assemble(parts, noted).save(path)


def _costs(schedule: Schedule, runs: Path) -> dict[str, Any]:
    """Of every run: images a second of its fastest epoch, minutes, and what it ran on."""
    costs = {}
    for system in SYSTEMS:
        for seed in schedule.seeds_of(system):
            run = runs / f"{system}-{seed}"
            log = run / "log.jsonl"
            if not (run / "encoder.safetensors").exists():
                continue
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            about = json.loads((run / "run.json").read_text(encoding="utf-8"))
            rates = [line["images_per_s"] for line in lines]
            seconds = sum(schedule.images / rate for rate in rates)
            costs[f"{NAMES[system]} {seed}"] = {
                "images_per_s": max(rates),
                "minutes": round(seconds / 60, 1),
                "epochs": lines[-1]["epoch"],
                "schedule": schedule.name,
                "execution": about["execution"],
            }
    return costs
