"""The study: train the systems that Wang et al. (2023) compare, on Fashion-MNIST, score them, and
compare them. Every step is resumable, and what is done is left alone.

    python -m analyses.fashion.study --schedule cpu --runs runs
    python -m analyses.fashion.study --schedule cpu --runs runs --stages train --only mae-0 dmae-0
"""

from __future__ import annotations

import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from vitprobe.data.labelled import Arrays, load_labelled
from vitprobe.devices import slow_bf16
from vitprobe.errors import DataError, RecipeError, VitprobeError, suggest

HERE = Path(__file__).parent
SYSTEMS = {
    "teacher": "fashion_teacher",
    "mae": "fashion_mae",
    "supervised": "fashion_supervised",
    "dmae": "fashion_dmae",
    "mocov3": "fashion_mocov3",
    "dino": "fashion_dino",
}
NAMES = {
    "teacher": "Teacher",
    "mae": "MAE",
    "supervised": "Supervised",
    "dmae": "D-MAE",
    "mocov3": "MoCo-v3",
    "dino": "DINO",
}
VARIANTS: dict[str, dict[str, Any]] = {
    # D-MAE distils the attention of the last block through a learned 1x1 adapter.
    "middle": {"distill.student_layers": [5]},
    "lower": {"distill.student_layers": [2]},
    "all": {"distill.student_layers": list(range(12))},
    "hidden": {"distill.attention": 0.0, "distill.hidden": 1.0, "distill.student_layers": []},
}
"""What F7 sets against D-MAE of seed 0."""
STAGES = ("train", "evaluate", "compare")
KEPT = (0, 3, 6, 9)
"""Pre-trained blocks kept, for the figure of which layers matter; fine-tuning keeps all 12."""
HALVES = (0, 6)
"""The same of the other seeds: what the findings on lower and higher layers take."""
LABELS = (1.0, 0.1, 0.01)
"""Shares of the training labels that fine-tuning uses."""
PRETRAINED = ("mae", "dmae", "mocov3", "dino")
RANDOM = "random"


_TABLES = ("every", "finetune", *SYSTEMS)


@dataclass(frozen=True)
class Schedule:
    """A table of schedules.toml."""

    name: str
    images: int
    epochs: int
    seeds: int
    once: tuple[str, ...]
    snapshots: tuple[int, ...]
    device: str
    jobs: int
    finetune_updates: int
    changes: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, name: str) -> Schedule:
        """In fp32 where the schedule's bf16 would be slower; every run says which it was.

        Raises RecipeError where there is no such schedule.
        """
        tables = tomllib.loads((HERE / "schedules.toml").read_text(encoding="utf-8"))
        if name not in tables:
            raise RecipeError(f"no schedule '{name}'; choose one of {', '.join(tables)}")
        table = tables[name]
        changes = {key: table.pop(key) for key in _TABLES if key in table}
        if slow_bf16(torch.device(table["device"])):
            for change in changes.values():
                if change.get("precision") == "bf16":
                    change["precision"] = "fp32"
        table |= {"once": tuple(table["once"]), "snapshots": tuple(table["snapshots"])}
        return cls(name=name, changes=changes, **table)

    def seeds_of(self, system: str) -> range:
        return range(1 if system in self.once else self.seeds)

    def overrides(self, system: str, seed: int) -> dict[str, Any]:
        """Of the recipe's keys."""
        common = {"epochs": self.epochs, "seed": seed, "snapshots": list(self.snapshots)}
        return {**common, **self.changes.get("every", {}), **self.changes.get(system, {})}


@dataclass(frozen=True)
class Job:
    """A command whose outcome is a file; it is not run again where that file is.

    after: names of the jobs whose outcome it reads.
    resumable: with this file there, the command is told to resume.
    needs: a file without which it is left out.
    """

    name: str
    command: list[str]
    outcome: Path
    after: tuple[str, ...] = ()
    resumable: Path | None = None
    needs: Path | None = None


@dataclass
class Study:
    schedule: str = "cpu"
    """A table of schedules.toml."""
    runs: Path = Path("runs/fashion")
    """Where training runs and evaluations are kept; large."""
    stages: tuple[Literal["train", "evaluate", "compare"], ...] = STAGES
    only: tuple[str, ...] = field(default=())
    """Runs to train or evaluate, such as mae-0 or frozen-mae-0; all unless given. Results are of
    all runs, and not written where some are named."""
    data: str = "fashion-mnist"
    """Fashion-MNIST: its folder of idx files, or fashion-mnist where it is installed."""


def main(study: Study) -> None:
    schedule = Schedule.read(study.schedule)
    runs = study.runs / schedule.name
    subset = study.runs / "data" / f"fashion_{schedule.images}.npz"
    jobs = []
    if "train" in study.stages:
        jobs += training(schedule, runs, subset)
    if "evaluate" in study.stages:
        jobs += evaluation(schedule, runs, subset)
    jobs = _chosen(jobs, study.only)
    _write_subset(study.data, schedule.images, subset)
    _run(jobs, schedule.jobs)
    if "compare" in study.stages and not study.only:
        from analyses.fashion.compare import results

        results(schedule, runs, subset, HERE / "results")


def training(schedule: Schedule, runs: Path, data: Path) -> list[Job]:
    """Seed 0 of every system first, so that a study that is cut short compares all of them."""
    most = max(len(schedule.seeds_of(system)) for system in SYSTEMS)
    order = [
        (system, seed)
        for seed in range(most)
        for system in SYSTEMS
        if seed in schedule.seeds_of(system)
    ]
    jobs = [
        _pretraining(f"{system}-{seed}", system, schedule.overrides(system, seed), runs, data)
        for system, seed in order
    ]
    for name, changes in VARIANTS.items():
        overrides = {**schedule.overrides("dmae", 0), "snapshots": [], **changes}
        jobs.append(_pretraining(f"dmae-{name}", "dmae", overrides, runs, data))
    return jobs


def _pretraining(name: str, system: str, overrides: dict[str, Any], runs: Path, data: Path) -> Job:
    after: tuple[str, ...] = ()
    if system == "dmae":
        overrides["distill.teacher"] = f"run:{runs / 'teacher-0'}"
        after = ("teacher-0",)
    command = ["pretrain", SYSTEMS[system], "--data", str(data), "--out", str(runs / name)]
    command += ["--set", *(f"{key}={_toml(value)}" for key, value in overrides.items())]
    return Job(name, command, runs / name / "encoder.safetensors", after, runs / name / "state.pt")


def evaluation(schedule: Schedule, runs: Path, data: Path) -> list[Job]:
    """Features first, which are cheap; then what the figures need most."""
    systems = (*SYSTEMS, RANDOM)
    seeds = {s: schedule.seeds_of(s if s != RANDOM else "mae") for s in systems}
    jobs = []
    for seed in range(schedule.seeds):
        # By depth too where it is one model a system.
        jobs += [_frozen(s, seed, seed == 0, runs, data) for s in systems if seed in seeds[s]]
    jobs += [_frozen(f"dmae-{variant}", 0, False, runs, data) for variant in VARIANTS]
    for seed in range(schedule.seeds):
        for labels in LABELS:
            for system in (RANDOM, *PRETRAINED):
                if seed in seeds[system]:
                    jobs.append(_finetuning(system, seed, labels, None, schedule, runs, data))
        for labels in (LABELS[0], LABELS[-1]):
            for kept in KEPT if seed == 0 else HALVES:
                for system in ("mae", "mocov3", "dmae"):
                    jobs.append(_finetuning(system, seed, labels, kept, schedule, runs, data))
    return jobs


def model_spec(system: str, seed: int, runs: Path) -> tuple[str, str, Path]:
    """Name and spec of a model of the study, and the file that it waits for.

    The untrained encoders are those that the MAEs started from.
    """
    if system == RANDOM:
        path = runs / f"mae-{seed}" / "snapshots" / "epoch_0000.safetensors"
        return f"Random {seed}", str(path), path
    run = runs / (system if system.startswith("dmae-") else f"{system}-{seed}")
    name = NAMES.get(system) or f"D-MAE {system.removeprefix('dmae-')}"
    return f"{name} {seed}", f"run:{run}", run / "encoder.safetensors"


def _frozen(system: str, seed: int, layers: bool, runs: Path, data: Path) -> Job:
    """k-NN and a linear classifier, from one pass."""
    name, spec, needed = model_spec(system, seed, runs)
    job = f"frozen-{system}-{seed}"
    out = runs / "scores" / job
    command = ["evaluate", "frozen", f"{name}={spec}", "--data", str(data), "--out", str(out)]
    command += ["--l2", "1e-2", "1e-3", "1e-4", *(["--layers", "normed"] if layers else [])]
    return Job(job, command, out / "scores.json", needs=needed)


def _finetuning(
    system: str,
    seed: int,
    labels: float,
    kept: int | None,
    schedule: Schedule,
    runs: Path,
    data: Path,
) -> Job:
    name, spec, needed = model_spec(system, seed, runs)
    job = f"finetune-{system}-{seed}-{labels:g}" + ("" if kept is None else f"-kept{kept}")
    out = runs / "scores" / job
    command = ["evaluate", "finetune", f"{name}={spec}", "--data", str(data), "--out", str(out)]
    command += ["--recipe", "fashion_finetune", "--labels", str(labels), "--seed", str(seed)]
    changes = schedule.changes.get("finetune", {})
    command += ["--updates", str(schedule.finetune_updates), "--set"]
    command += [f"{key}={_toml(value)}" for key, value in changes.items()]
    command += [] if kept is None else ["--kept", str(kept)]
    return Job(job, command, out / "scores.json", resumable=out / "state.pt", needs=needed)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    known = [job.name for job in jobs]
    if only and not known:
        raise RecipeError("--only is of runs to train or evaluate, which these stages have none of")
    for name in only:
        if name not in known:
            raise RecipeError(
                f"no run '{name}'; there are {len(known)}, {known[0]} to {known[-1]}."
                + suggest(name, known)
            )
    return [job for job in jobs if not only or job.name in only]


def _run(jobs: Sequence[Job], at_once: int) -> None:
    """Run what is not done, some jobs at a time; one that fails stops those that wait for it."""
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(at_once) as pool:
        for job in jobs:
            # Jobs are listed behind what they wait for, so that no wait can be for ever.
            waits = [futures[name] for name in job.after if name in futures]
            futures[job.name] = pool.submit(_do, job, waits)
    for future in futures.values():
        future.result()


def _do(job: Job, waits: Iterable[Future[None]]) -> None:
    for future in waits:
        future.result()
    if job.outcome.exists():
        _say(f"{job.name}: done before")
        return
    if job.needs is not None and not job.needs.exists():
        _say(f"{job.name}: left out, since there is no '{job.needs}'")
        return
    resume = ["--resume"] if job.resumable is not None and job.resumable.exists() else []
    _say(f"{job.name}: {'goes on' if resume else 'starts'}")
    job.outcome.parent.mkdir(parents=True, exist_ok=True)
    log = job.outcome.parent.with_name(f"{job.name}.log")
    with log.open("a", encoding="utf-8") as file:
        # An empty folder is taken as it is; one with half a run is resumed or replaced.
        command = [sys.executable, "-m", "vitprobe", *job.command, *(resume or ["--force"])]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise DataError(f"{job.name} failed with status {done.returncode}; see '{log}'")
    _say(f"{job.name}: done")


def _write_subset(source: str, count: int, path: Path) -> None:
    """The first `count` training images of a permutation, in their first order, and all test
    images; a file that is there is left as it is."""
    if not path.exists():
        found = load_labelled(source)
        train, test = found.train, found.test
        if not (isinstance(train, Arrays) and isinstance(test, Arrays)):
            raise DataError(f"'{source}' is not Fashion-MNIST in idx files")
        if train.labels is None or test.labels is None:
            raise DataError(f"'{source}' has no labels")
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:count])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                images=train.images[chosen],
                labels=train.labels[chosen],
                test_images=test.images,
                test_labels=test.labels,
            )
        partial.replace(path)


_PRINTING = threading.Lock()


def _say(text: str) -> None:
    with _PRINTING:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Study))
    except VitprobeError as error:
        _say(f"study: {error}")
        sys.exit(2)
