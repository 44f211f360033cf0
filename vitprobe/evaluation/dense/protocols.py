"""The protocols "detection" and "segmentation": a predictor trained on a checkpoint, and tested."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
from safetensors.torch import save

from vitprobe import distributed
from vitprobe.data.coco import load_coco
from vitprobe.data.semantic import load_semantic
from vitprobe.data.shapes import shapes_of, write_coco, write_voc
from vitprobe.errors import DataError, RecipeError
from vitprobe.evaluation.base import Protocol
from vitprobe.evaluation.dense.precision import need_tools
from vitprobe.evaluation.dense.recipe import DenseRecipe, load_dense_recipe
from vitprobe.evaluation.dense.run import (
    CLASSES,
    DETECTIONS,
    WEIGHTS,
    DenseRun,
    DetectionRun,
    Outcome,
    SegmentationRun,
)
from vitprobe.files import replacing
from vitprobe.models import Model
from vitprobe.scores import Score
from vitprobe.training.loop import train
from vitprobe.training.state import write_text

FOLDER: Final = "training"
"""Of the run, in the folder of the evaluation."""
_STATED: Final = (
    "seed", "threads", "epochs", "image_size", "backbone.frozen", "segmenter.head"
)  # fmt: skip
"""Changes of a recipe that its scores tell elsewhere, or that change none."""


@dataclass(frozen=True, kw_only=True)
class Dense(Protocol):
    """Base of the protocols of dense prediction.

    recipe: a bundled one, a TOML file, or a DenseRecipe.
    overrides: of its keys, such as {"epochs": 3}.
    batch_size: images in one forward pass of a test.
    precision: of tests; that of training is the recipe's.
    workers: processes that decode images.
    log: also log to these, "tensorboard" or "wandb".
    """

    keeps: ClassVar[tuple[str, ...]] = (FOLDER,)

    batch_size: int = 16
    recipe: str | Path | DenseRecipe
    overrides: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def resolved(self) -> DenseRecipe:
        """The recipe, as `overrides` changes it.

        Raises:
            RecipeError: it cannot be followed, or is for the other protocol.
        """
        found = load_dense_recipe(self.recipe, self.overrides)
        if found.task != self.name:
            raise RecipeError(
                f"The recipe {self.recipe} is for vitprobe evaluate {found.task}, not {self.name}."
            )
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recipe, Path):
            # What was asked for is recorded as JSON.
            object.__setattr__(self, "recipe", str(self.recipe))

    def read(self, data: Any) -> tuple[str, Any]:
        """The name of a set, and the set; shapes that are named are made, and kept as long."""
        self.resolved()
        if not isinstance(data, str | Path):
            raise DataError(f"cannot read annotated images from {type(data).__name__}; give a path")
        made = shapes_of(str(data))
        if made is None:
            return str(data), self._load(str(data))
        aside = tempfile.mkdtemp(prefix="vitprobe-shapes-")
        try:
            found = self._load(str(self._write(Path(aside) / "made", made)))
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        weakref.finalize(found, shutil.rmtree, aside, ignore_errors=True)
        return str(data), found

    def run(self, model: Model, data: Any, folder: Path | None) -> Sequence[Score]:
        """Train, test, and keep what was found beside the run's state."""
        source, whole = data
        recipe = self.resolved().for_model(model, source)
        found = whole.with_channels(model.input_size[0])
        with tempfile.TemporaryDirectory() as aside:
            out = (Path(aside) if folder is None else folder) / FOLDER
            outcome: list[Outcome] = []

            def make(device: torch.device) -> DenseRun:
                return self._run(recipe, found, model, device)

            def finish(run: Any) -> None:
                outcome.append(run.outcome())
                if distributed.rank() == 0:
                    _leave(run, outcome[0], out)

            train(
                make,
                finish,
                out,
                threads=recipe.threads,
                resume=None,
                force=False,
                device=self.device,
                loggers=self.log,
                progress=self.progress,
            )
        if not distributed.leads():
            return ()
        settings = self._settings(recipe)
        return [
            self.score(
                model,
                source,
                len(found.test),
                metric,
                value,
                settings,
                seed=recipe.seed,
            )
            for metric, value in outcome[0].values.items()
        ]

    def _settings(self, recipe: DenseRecipe) -> dict[str, Any]:
        name = "given" if isinstance(self.recipe, DenseRecipe) else Path(self.recipe).stem
        made = {"recipe": name, "epochs": recipe.epochs, "image_size": recipe.image_size}
        if recipe.backbone.frozen:
            made["frozen"] = True
        rest = (key for key in self.overrides if key not in _STATED)
        return made | {key: self.overrides[key] for key in rest}

    @abstractmethod
    def _write(self, folder: Path, made: Any) -> Path: ...
    @abstractmethod
    def _load(self, source: str) -> Any: ...
    @abstractmethod
    def _run(
        self, recipe: DenseRecipe, data: Any, model: Model, device: torch.device
    ) -> DenseRun: ...


@dataclass(frozen=True, kw_only=True)
class Detection(Dense):
    """Box and mask AP of Mask R-CNN on the checkpoint, as ViTDet has it.

    Data are a folder in COCO's format, `train=FILE.json,test=FILE.json`, or `shapes`.
    """

    name: ClassVar[str] = "detection"
    recipe: str | Path | DenseRecipe = "coco_vitdet_tiny"

    def read(self, data: Any) -> tuple[str, Any]:
        need_tools()
        return super().read(data)

    def _write(self, folder: Path, made: Any) -> Path:
        return write_coco(folder, made)

    def _load(self, source: str) -> Any:
        return load_coco(source)

    def _run(self, recipe: DenseRecipe, data: Any, model: Model, device: torch.device) -> DenseRun:
        return DetectionRun(recipe, data, model, device, **_how(self))


@dataclass(frozen=True, kw_only=True)
class Segmentation(Dense):
    """mIoU of a head for classes of pixels on the checkpoint.

    Data are a folder in VOC's or ADE's layout, or `shapes`.
    """

    name: ClassVar[str] = "segmentation"
    recipe: str | Path | DenseRecipe = "segmentation_linear"

    def _write(self, folder: Path, made: Any) -> Path:
        return write_voc(folder, made)

    def _load(self, source: str) -> Any:
        return load_semantic(source)

    def _run(self, recipe: DenseRecipe, data: Any, model: Model, device: torch.device) -> DenseRun:
        return SegmentationRun(recipe, data, model, device, **_how(self))

    def _settings(self, recipe: DenseRecipe) -> dict[str, Any]:
        made = super()._settings(recipe)
        return made | ({"head": recipe.segmenter.head} if recipe.segmenter else {})


def _how(protocol: Dense) -> dict[str, Any]:
    return {
        "workers": protocol.workers,
        "batch_size": protocol.batch_size,
        "half": protocol.precision == "bf16",
    }


def _leave(run: DenseRun, outcome: Outcome, out: Path) -> None:
    """Weights, scores by class and detections, beside the run's log."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in run.method.state_dict().items()
    }
    about = {"recipe": run.recipe.to_dict(), "classes": list(run.classes)}
    with replacing(out / WEIGHTS) as partial:
        partial.write_bytes(save(weights, metadata={"vitprobe": json.dumps(about)}))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["class", *outcome.by_class])
    for i, name in enumerate(run.classes):
        values = (column[i] for column in outcome.by_class.values())
        rows.writerow([name, *("" if v != v else f"{v:.6g}" for v in values)])
    write_text(out / CLASSES, table.getvalue())
    if run.recipe.detector is not None:
        write_text(out / DETECTIONS, json.dumps(list(outcome.predictions)))
