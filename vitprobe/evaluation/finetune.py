"""The protocol `finetune`: all weights are trained on labelled images, then the test images scored.

Training is `vitprobe.training`'s, with the method of `vitprobe.training.methods.finetune`, so a run
resumes exactly, shares out under torchrun, and leaves a checkpoint that `vitprobe.load` takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from vitprobe import distributed
from vitprobe.data.blocks import View
from vitprobe.data.labelled import load_labelled
from vitprobe.data.parts import Labelled, Labels, Part, subset
from vitprobe.errors import RecipeError, SourceError
from vitprobe.evaluation.base import Learning, Passes, check_finite, labelled_part, running
from vitprobe.evaluation.batches import pixel_batches
from vitprobe.evaluation.head import logits_of
from vitprobe.evaluation.intervals import Interval, accuracy_interval
from vitprobe.evaluation.subsets import labelled_subset
from vitprobe.models import Model, load
from vitprobe.scores import FILE, Score, open_scores
from vitprobe.training.loop import (
    ABOUT,
    ENCODER,
    LOG,
    RECIPE,
    STATE,
    pretrain,
    training_device,
)
from vitprobe.training.methods.finetune import describe, unfit
from vitprobe.training.recipe import Recipe, load_recipe, method_of
from vitprobe.training.run import differences, fingerprint
from vitprobe.training.state import previous

LEAST_UPDATES: Final = 500
"""Updates that few labels are trained for, unless updates or epochs are given."""
_FEWEST: Final = 32
"""Images to which a batch is halved at least, where there are so many."""
_UPDATES_AN_EPOCH: Final = 4
_STATED: Final = ("epochs", "batch_size", "seed")
_TOP5_CLASSES: Final = 20
"""Of fewer classes, five guesses are right too often to tell models apart."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Learning):
    """Accuracy of the model after fine-tuning: top-1, and top-5 where there are 20 classes or more.

    The fine-tuned model stays in the folder of the evaluation as `run:FOLDER`; what resuming needs
    is removed once it has been scored, unless `keep_state`. `batch_size` and `precision` are those
    of scoring; those of training are the recipe's.

    recipe: name of a bundled recipe or path of a TOML file, whose method is "finetune".
    overrides: of its keys, {"epochs": 20}.
    kept: pre-trained blocks that are kept, see `FinetuneConfig`; None for all.
    updates: so many are made, in whole epochs, whatever the recipe's epochs; None for as many as
        its epochs make, but 500 at least where `overrides` does not give the epochs.
    keep_state: leave the state of training, 3 times the weights twice over, in the folder.

    With few labels the recipe's batch is halved until an epoch has 4 updates, but not below 32
    images unless there are fewer; a batch that `overrides` gives is not touched. Where the epochs
    are not the recipe's own, its warm-up keeps its share of them, unless `overrides` gives it.
    """

    name: ClassVar[str] = "finetune"
    keeps: ClassVar[tuple[str, ...]] = (
        *(RECIPE, ABOUT, LOG, STATE, previous(Path(STATE)).name, ENCODER),
        *("snapshots", "pictures"),
    )

    recipe: str = "finetune_improved"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kept: int | None = None
    updates: int | None = None
    keep_state: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.updates is not None and self.updates < 1:
            raise RecipeError(f"updates must be at least 1, not {self.updates}.")
        if self.updates is not None and "epochs" in self.overrides:
            raise RecipeError("Give updates or epochs, not both: the one decides the other.")
        if self.kept is not None and self.kept < 0:
            raise RecipeError(f"kept must be at least 0, not {self.kept}.")

    def run(self, model: Model, data: Labelled, folder: Path | None) -> Sequence[Score]:
        """The rows of one model, fine-tuned in `folder`, or where there is none in a temporary
        one."""
        self.check(model)
        labelled_part(data, "train")
        labelled_part(data, "test")
        with ExitStack() as stack:
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(distributed.joined(training_device(self.device)))
            # By now the leading process has cleared the folder.
            distributed.wait()
            return self.tuned(model, data, folder)

    def check(self, model: Model) -> None:
        """Raise SourceError or RecipeError where a model cannot be fine-tuned."""
        if model.spec == "module":
            raise SourceError(
                f"'{model.name}' is a module in memory; fine-tuning starts from a spec, as load "
                "takes"
            )
        if reason := unfit(model):
            raise RecipeError(f"'{model.name}' cannot be fine-tuned: {reason}.")
        depth = len(model.anatomy.blocks)
        if self.kept is not None and self.kept > depth:
            raise RecipeError(
                f"{self.kept} blocks cannot be kept of '{model.name}', which has {depth}."
            )

    def tuned(self, model: Model, data: Labelled, folder: Path) -> Sequence[Score]:
        """Fine-tune in `folder`, from where an earlier run there stopped, and score."""
        train, labels = labelled_part(data, "train")
        used = train
        if self.labels < 1:
            used = subset(train, labelled_subset(labels, self.labels, self.seed))
        recipe = self.resolved(model, data.source, len(used))
        channels = recipe.encoder.channels
        labelled = load_labelled(replace(data, train=used), channels=channels)
        rows = self._finished(recipe, labelled, model.sha256, folder)
        if rows is not None:
            return rows
        if not _trained(folder):
            self._say(self._in_words(recipe, len(used), len(train)))
            pretrain(
                recipe,
                folder,
                data=labelled if recipe.evaluate_every else replace(labelled, test=None),
                resume=(folder / STATE).exists() or previous(folder / STATE).exists(),
                force=True,
                device=self.device,
                workers=self.workers,
                progress=self.progress,
            )
        if distributed.rank() > 0:
            return ()
        rows = self._scores(model, recipe, data, len(used), folder)
        if not self.keep_state:
            for path in (folder / STATE, previous(folder / STATE)):
                path.unlink(missing_ok=True)
        return rows

    def resolved(self, model: Model, source: str, images: int) -> Recipe:
        """The recipe for so many labelled images, with the encoder and all numbers filled in.

        Raises RecipeError for one that cannot be followed, or of another method.
        """
        if (method := method_of(self.recipe)) != "finetune":
            raise RecipeError(
                f"Recipe {self.recipe} trains by {method or 'no method'}; give one whose method is "
                "finetune, such as finetune_improved."
            )
        given: dict[str, Any] = {"method.init": model.spec, "seed": self.seed}
        if self.kept is not None:
            given["method.kept"] = self.kept
        given |= self.overrides
        recipe = load_recipe(self.recipe, data=source, overrides=given)
        encoder = recipe.to_dict()["encoder"]
        for key, value in describe(model).items():
            if encoder[key] != value and f"encoder.{key}" not in self.overrides:
                raise SourceError(
                    f"'{model.name}' was loaded with other options than '{model.spec}' has: {key} "
                    f"is {value} and not {encoder[key]}; write them into the spec, as in {key}=…"
                )
        # As the recipe has them before `overrides` give other epochs.
        own = load_recipe(
            self.recipe,
            overrides={k: v for k, v in given.items() if k != "epochs"} | {"encoder": encoder},
        )
        changes: dict[str, Any] = {}
        batch = recipe.batch_size
        if "batch_size" not in self.overrides:
            batch = fitting_batch(batch, images, recipe.accumulate * distributed.launched())
            changes["batch_size"] = batch
        # A batch of more than all images is refused where the run is made.
        epochs, per_epoch = recipe.epochs, max(1, images // batch)
        if self.updates is not None:
            epochs = -(-self.updates // per_epoch)
        elif "epochs" not in self.overrides:
            epochs = max(epochs, -(-LEAST_UPDATES // per_epoch))
        changes["epochs"] = epochs
        if "optimizer.warmup_epochs" not in self.overrides and own.epochs:
            share = own.optimizer.warmup_epochs / own.epochs
            changes["optimizer.warmup_epochs"] = share * epochs
        return load_recipe(recipe, overrides=changes)

    def _finished(
        self, recipe: Recipe, data: Labelled, sha256: str | None, folder: Path
    ) -> Sequence[Score] | None:
        """The rows of an evaluation that is complete; None where something is left to do.

        Raises RecipeError where what is in the folder was trained otherwise.
        """
        if not _trained(folder):
            return None
        found = load_recipe(folder / RECIPE).to_dict()
        changed = differences(found, recipe.to_dict())
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if not changed and about["data"]["sha256"] != fingerprint(data):
            changed = ["its training images are others"]
        started_from = (load(f"run:{folder}").training or {}).get("init_sha256", sha256)
        if not changed and started_from != sha256:
            changed = ["its checkpoint was another"]
        if changed:
            raise RecipeError(
                f"'{folder}' was fine-tuned otherwise ({'; '.join(changed)}); choose another "
                "folder, or force replacing it."
            )
        return open_scores(folder).rows if (folder / FILE).exists() else None

    def _in_words(self, recipe: Recipe, used: int, images: int) -> str:
        of = f"{used:,} of {images:,}" if used < images else f"{images:,}"
        kept = "" if self.kept is None else f", {self.kept} pre-trained blocks kept"
        updates = used // recipe.batch_size
        return (
            f"fine-tuning on {of} labelled images{kept}: {recipe.epochs:,} epochs of {updates:,} "
            f"update{'s' * (updates != 1)} of {recipe.batch_size} images"
        )

    def _say(self, text: str) -> None:
        if self.progress and distributed.rank() == 0:
            tqdm.write(f"vitprobe: {text}", file=sys.stderr)

    def _scores(
        self, model: Model, recipe: Recipe, data: Labelled, used: int, folder: Path
    ) -> Sequence[Score]:
        """The rows of the fine-tuned model, as it was saved."""
        test, labels = labelled_part(data, "test")
        ranks = self._ranks(load(f"run:{folder}"), test, labels, len(data.classes))
        values = self.values(ranks, labels, len(data.classes))
        settings = {
            "recipe": self.recipe,
            "training_images": used,
            "epochs": recipe.epochs,
            "updates": recipe.epochs * (used // recipe.batch_size),
            "batch": recipe.batch_size,
            **{key: self.overrides[key] for key in self.overrides if key not in _STATED},
        }
        return [
            self.score(
                model,
                data.source,
                len(test),
                metric,
                value,
                settings,
                seed=recipe.seed,
                kept=self.kept,
            )
            for metric, value in values.items()
        ]

    def values(
        self, ranks: NDArray[np.int64], labels: NDArray[np.int64], classes: int
    ) -> dict[str, Interval]:
        """What is scored, by metric.

        ranks: (images,) how many classes the model puts before the right one.
        labels: (images,) the right ones.
        """
        values = {"top1": accuracy_interval(int((ranks == 0).sum()), len(ranks))}
        if classes >= _TOP5_CLASSES:
            values["top5"] = accuracy_interval(int((ranks < 5).sum()), len(ranks))
        return values

    def _ranks(self, tuned: Model, test: Part, labels: Labels, classes: int) -> NDArray[np.int64]:
        """(images,): how many classes the model puts before the right one."""
        device = training_device(self.device)
        truth = torch.from_numpy(labels).to(device)
        found = []
        first = 0
        passes = Passes(tuned, lambda pixels: logits_of(tuned, pixels, classes))
        with (
            running(tuned, device, self.precision),
            tqdm(total=len(test), unit="image", disable=None if self.progress else True) as bar,
        ):
            for pixels in pixel_batches(
                test,
                None,
                View(*tuned.input_size),
                size=self.batch_size,
                workers=self.workers,
                device=device,
            ):
                for logits in passes(pixels):
                    check_finite(tuned, "output", logits, first)
                    own = truth[first : first + len(logits), None]
                    first += len(logits)
                    right = logits.gather(1, own)
                    # Of equal numbers the first is taken, as argmax does.
                    before = torch.arange(classes, device=device) < own
                    ahead = (logits > right) | ((logits == right) & before)
                    found.append(ahead.sum(dim=1).cpu())
                bar.update(len(pixels))
        return torch.cat(found).numpy()


def fitting_batch(batch: int, images: int, multiple: int = 1) -> int:
    """A batch halved until an epoch of so many images has 4 updates; not below 32 images, unless it
    takes that to have one; always an even multiple of `multiple`."""
    while (
        images // batch < _UPDATES_AN_EPOCH
        and (batch // 2 >= _FEWEST or batch > images)
        and batch % (4 * multiple) == 0
    ):
        batch //= 2
    return batch


def _trained(folder: Path) -> bool:
    """Whether a folder holds a fine-tuned encoder, and no state of training to go on with."""
    states = (folder / STATE, previous(folder / STATE))
    return (folder / ENCODER).exists() and not any(path.exists() for path in states)
