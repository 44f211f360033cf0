"""The encoders and images that come with vitprobe, from the runs of the study.

    python -m analyses.fashion.bundle --runs runs/fashion/short --schedule short \\
        --scores analyses/fashion/results/scores.json

Writes seed 0 of each student as fp16 safetensors, 512 test images and the model card into
`vitprobe/bundled/`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save

from analyses.fashion.study import HERE, NAMES, SYSTEMS, Schedule
from vitprobe.bundled import FOLDER, SAMPLE
from vitprobe.errors import VitprobeError
from vitprobe.files import replacing
from vitprobe.scores import open_scores

STUDENTS = ("supervised", "mocov3", "dino", "mae", "dmae")


def main(runs: Path, schedule: str, scores: Path) -> None:
    """runs: of one schedule. scores: of the study, results/scores.json."""
    plan = Schedule.read(schedule)
    with np.load(runs.parent / "data" / f"fashion_{plan.images}.npz") as data:
        images, labels = data["test_images"][:512, 0], data["test_labels"][:512].astype(np.uint8)
    with replacing(SAMPLE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, images=images, labels=labels)
    rows = [_bundle(system, runs, schedule, scores) for system in STUDENTS]
    card = (
        (HERE / "card.md")
        .read_text(encoding="utf-8")
        .format(images=plan.images, epochs=plan.epochs, schedule=schedule, rows="\n".join(rows))
    )
    with replacing(FOLDER / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")


def _bundle(system: str, runs: Path, schedule: str, scores: Path) -> str:
    """Write one encoder; its row in the card."""
    run = runs / f"{system}-0"
    encoder = run / "encoder.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(encoder).items()}
    with safe_open(encoder, "pt") as file:
        described: dict[str, Any] = json.loads(file.metadata()["vitprobe"])
    # Where the run's data and teacher lay on the machine that trained it tells a reader nothing.
    plan = Schedule.read(schedule)
    described["recipe"]["data"] = f"fashion-mnist, {plan.images} training images"
    if "distill" in described["recipe"]:
        described["recipe"]["distill"]["teacher"] = "fashion_teacher, seed 0"
    described["schedule"] = schedule
    name = f"fashion_{system}"
    path = FOLDER / f"{name}.safetensors"
    data = save(tensors, metadata={"vitprobe": json.dumps(described)})
    with replacing(path) as partial:
        partial.write_bytes(data)
    found = {
        row.protocol: f"{100 * row.value:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"
        for row in open_scores(scores).rows
        if row.model == f"{NAMES[system]} 0" and row.protocol in ("knn", "linear")
        if row.labels == 1 and row.layer is None
    }
    digest = hashlib.sha256(data).hexdigest()
    return (
        f"| `{name}` | {NAMES[system]} | `{SYSTEMS[system]}` | {found['knn']} | {found['linear']} "
        f"| `{digest}` |"
    )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except VitprobeError as error:
        print(f"bundle: {error}", file=sys.stderr)
        sys.exit(2)
