"""Commands that make checkpoints: pretrain, runs, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vitprobe.commands.arguments import check_output, override
from vitprobe.commands.messages import complain
from vitprobe.errors import ResultError, SourceError


@dataclass
class Pretrain:
    """Train a ViT by a recipe and write a checkpoint for comparison."""

    recipe: tyro.conf.Positional[str]
    """Name of a bundled recipe, such as digits_mae, or a TOML file."""
    out: Path | None = None
    """Folder for the run; needed unless --dry-run."""
    data: str | None = None
    """Training data, if not the recipe's own: a folder, zip or tar with one folder a class (in
    train/ and val/ or test/, or alone), tar shards, idx files, CIFAR archives (cifar10:FOLDER,
    cifar100:FOLDER), hf:NAME, .npz."""
    set: tuple[str, ...] = ()
    """Overrides of recipe keys, such as epochs=3 or optimizer.lr=1e-3."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    workers: int | None = None
    """Processes that decode images, where they do not live on the device; one a core."""
    sharded: bool = False
    """Split weights and optimiser over the processes of torchrun (FSDP)."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these."""
    dry_run: bool = False
    """Print the resolved recipe, parameters, FLOPs, steps and memory, and stop."""
    resume: bool = False
    """Go on from the state in OUT."""
    force: bool = False
    """Replace an earlier run in OUT."""

    def run(self) -> str:
        overrides = dict(override(text) for text in self.set)
        if self.out is None and not self.dry_run:
            raise SourceError("no folder for the run; give --out")
        if self.resume and self.force:
            raise SourceError("--resume goes on with a run, --force replaces it; give one of them")

        from vitprobe.training import Terminated, plan, pretrain

        if self.out is None or self.dry_run:
            return plan(self.recipe, data=self.data, overrides=overrides).to_text()
        try:
            encoder = pretrain(
                self.recipe,
                self.out,
                data=self.data,
                overrides=overrides,
                resume=self.resume,
                force=self.force,
                device=self.device,
                workers=self.workers,
                sharded=self.sharded,
                loggers=self.log,
            )
        except Terminated as stop:
            complain(str(stop))
            raise
        return str(encoder)


@dataclass
class Runs:
    """Compare the training runs below a folder: their last values, and a figure of their curves."""

    folder: tyro.conf.Positional[Path]
    """Holds runs of vitprobe pretrain, at any depth."""
    out: Path | None = None
    """Draw the curves there, as .pdf, .svg and .png whichever of them is named."""
    metric: tuple[str, ...] = ()
    """As the logs name them; loss, test_accuracy, knn_accuracy and images_per_s unless given."""
    force: bool = False
    """Replace earlier curves in OUT."""

    def run(self) -> str:
        from vitprobe.runs import final_values, read_runs, select

        stem = self.out
        if stem is not None:
            if stem.suffix not in ("", ".pdf", ".svg", ".png"):
                raise ResultError(f"'{stem}': curves are drawn as .pdf, .svg and .png; name one")
            stem = stem.with_suffix("") if stem.suffix in (".pdf", ".svg", ".png") else stem
            for kind in ("pdf", "svg", "png"):
                check_output(stem.with_name(f"{stem.name}.{kind}"), self.force)
        metrics = [name for text in self.metric for name in text.split(",") if name]
        runs = select(read_runs(self.folder), metrics)
        table = final_values(runs)
        if stem is None:
            return table

        from vitprobe.plots import save, training_curves

        stem.parent.mkdir(parents=True, exist_ok=True)
        save(training_curves(runs), stem)
        return f"{table}\n{self.out if self.out != stem else f'{stem}.pdf'}"


@dataclass
class Export:
    """Write a model as a folder that timm (local-dir:) or transformers loads."""

    spec: tyro.conf.Positional[str]
    """A run's folder, or a checkpoint such as mae.pth,heads=12."""
    to: Literal["timm", "hf"]
    """Library that is to load it."""
    out: Path
    """Folder for the weights and their description."""
    force: bool = False
    """Replace an earlier export in OUT."""

    def run(self) -> str:
        check_output(self.out, self.force)

        from vitprobe.models.export import export

        return str(export(self.spec, self.to, self.out, force=self.force))
