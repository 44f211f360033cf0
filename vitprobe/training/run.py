"""A training run in memory: a recipe standing at one of its updates."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vitprobe import distributed
from vitprobe.data.labelled import Arrays, Files, Labelled
from vitprobe.data.parts import Part
from vitprobe.errors import RecipeError
from vitprobe.evaluation.knn import knn_accuracy
from vitprobe.training.augment import Augment
from vitprobe.training.engine import Engine
from vitprobe.training.feed import Feed, make_feed
from vitprobe.training.methods import METHODS, Batch, Method, Moment
from vitprobe.training.methods.distill import Distilled, load_teacher
from vitprobe.training.optimizer import build_optimizer
from vitprobe.training.randomness import epoch_order
from vitprobe.training.recipe import Recipe, filled
from vitprobe.training.schedule import cosine, warmup_cosine

# The bank of the online k-NN: enough to follow a run by, little enough to take seconds.
_KNN_IMAGES = 10_000
# Keys that may differ when a run is resumed: they decide what is kept, not what is learned.
_BOOKKEEPING = ("save_every", "save_minutes", "evaluate_every", "knn", "snapshots")


class Run:
    """A method, its data and its optimiser, standing at `step` of `steps` updates.

    workers: processes that decode images, where they do not live on the device.
    sharded: see `Engine`.

    A subclass trains something else by overriding `_method`, `_feeds`, `_check`, `_fingerprint` and
    `evaluate`.

    Raises RecipeError for a recipe that these data or processes cannot follow.
    """

    leaves: tuple[str, ...] = ("encoder.safetensors",)
    """Files in its folder that are made when it has ended."""

    def __init__(
        self,
        recipe: Recipe,
        data: Labelled,
        device: torch.device,
        *,
        workers: int = 0,
        sharded: bool = False,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.saved = "no state was saved"
        self.classes = data.classes
        self.fingerprint = self._fingerprint(data)
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self._check(data)
        self.method = self._method(data).to(device).train()
        self.engine = Engine(self.method, recipe, device, sharded=sharded)
        # After the engine, which in a sharded run replaces the parameters by their shards.
        self.optimizer = build_optimizer(self.method, recipe.optimizer, recipe.encoder.depth)
        self._train, self._test = self._feeds(data, workers)
        self._batches: Iterator[Batch] | None = None
        self._names: list[str] = []
        self._sums = torch.zeros(0, device=device)
        self._latest = self._sums
        # The first update that was not finite: its number, loss and terms; -1 while there is none.
        self._fault = torch.full((1,), -1.0, dtype=torch.float64, device=device)
        self._clock, self._clock_step = 0.0, -1

    def _method(self, data: Labelled) -> Method:
        return build_method(self.recipe, len(data.classes))

    def _feeds(self, data: Labelled, workers: int) -> tuple[Feed, Feed | None]:
        recipe, encoder = self.recipe, self.recipe.encoder
        augment = Augment(
            recipe.augmentations, size=encoder.image_size, mean=encoder.mean, std=encoder.std
        )

        def feed(part: Part) -> Feed:
            return make_feed(part, augment, seed=recipe.seed, device=self.device, workers=workers)

        return feed(data.train), None if data.test is None else feed(data.test)

    def _fingerprint(self, data: Labelled) -> str:
        return fingerprint(data)

    def _check(self, data: Labelled) -> None:
        check_data(self.recipe, data)

    @property
    def path(self) -> str:
        """Which way images take to the device, and why."""
        return self._train.path

    @property
    def epoch(self) -> int:
        """Number of epochs completed."""
        return self.step // self.steps_per_epoch

    @property
    def moment(self) -> Moment:
        """Where the next update stands."""
        return Moment(self.step, self.steps, self.steps_per_epoch)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        config = self.recipe.optimizer
        return warmup_cosine(
            self.step,
            steps=self.steps,
            warmup=round(config.warmup_epochs * self.steps_per_epoch),
            peak=config.lr * self.recipe.batch_size / 256,
            floor=config.final_lr,
        )

    def advance(self) -> None:
        """One update; one whose loss or gradient is not finite leaves the weights as they were.

        On the CPU that is raised at once, elsewhere by `check`.
        """
        moment = self.moment
        if self._clock_step < 0:
            self._clock, self._clock_step = time.perf_counter(), self.step
        if self._batches is None:
            self._batches = self._epoch_from(self.step % self.steps_per_epoch)
        self._set_rates(moment)
        self.method.before_step(moment)
        terms = self.engine.gradients(self._batches)
        self.method.after_gradient(moment)
        terms["gradient_norm"] = self._clip()
        self._record(terms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(moment)
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self._batches = None
        if self.device.type == "cpu":
            self.check()

    def _epoch_from(self, position: int) -> Iterator[Batch]:
        recipe = self.recipe
        n = self.steps_per_epoch * recipe.batch_size
        order = epoch_order(recipe.seed, self.epoch, len(self._train), torch.device("cpu"))[:n]
        # Each process takes a contiguous share of every batch, in as many parts as are accumulated.
        shares = order.view(self.steps_per_epoch, distributed.world_size(), recipe.accumulate, -1)
        parts = shares[position:, distributed.rank()].flatten(0, 1)
        return self._train.epoch(self.epoch, list(parts))

    def _set_rates(self, moment: Moment) -> None:
        config, lr = self.recipe.optimizer, self.lr
        decay = config.weight_decay
        if config.final_weight_decay is not None:
            decay = cosine(moment.progress, decay, config.final_weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            group["weight_decay"] = decay if group["decayed"] else 0.0

    def _clip(self) -> Tensor:
        """Scale gradients down to the recipe's norms; returns that of all of them before."""
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        norms = [
            norm.full_tensor() if isinstance(norm, DTensor) else norm
            for norm in torch._foreach_norm(gradients)
        ]
        config, total = self.recipe.optimizer, torch.stack(norms).norm()
        if config.clip:
            factors = [(config.clip / (norm + 1e-6)).clamp(max=1) for norm in norms]
            for gradient, factor in zip(gradients, factors, strict=True):
                gradient.mul_(factor)
        if config.clip_total:
            factor = (config.clip_total / (total + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(factor)
        return total

    def _record(self, terms: Mapping[str, Tensor]) -> None:
        """Add to the epoch's sums, and have the optimiser skip an update that is not finite.

        All of it happens on the device: reading a number back would make the device wait.
        """
        values = torch.stack([value.detach().double() for value in terms.values()])
        if distributed.world_size() > 1:
            values = distributed.mean(values)
        if not self._names or self.step % self.steps_per_epoch == 0:
            self._names = list(terms)
            self._sums = torch.zeros_like(values)
        self._sums += values
        self._latest = values
        loss, norm = values[0], values[-1]
        bad = ~torch.isfinite(loss + norm)
        now = torch.cat([values.new_full((1,), self.step), values])
        if len(self._fault) != len(now):
            self._fault = torch.full_like(now, -1.0)
        self._fault = torch.where(bad & (self._fault[0] < 0), now, self._fault)
        # Fused optimisers read these two, as torch's gradient scaler sets them.
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def check(self) -> None:
        """Raise RecipeError, naming the update and its terms, where one was not finite."""
        step, *values = self._fault.tolist()
        if step < 0:
            return
        listed = ", ".join(f"{n} {v:g}" for n, v in zip(self._names, values, strict=True))
        advice = (
            "Resumed as it is, the run would end so again: lower optimizer.lr or lengthen the "
            "warm-up, and start again with --force, or in another folder to keep that state"
            if step
            else "No weight had been updated yet, so that no learning rate is to blame: look at "
            "the images, the weights to start from, and precision"
        )
        raise RecipeError(
            f"The {self.recipe.method.name} loss or its gradient is not finite at step {step:.0f} "
            f"({listed}); {self.saved}. {advice}."
        )

    def latest(self) -> dict[str, float]:
        """The loss and terms of the last update, read back from the device."""
        return dict(zip(self._names, self._latest.tolist(), strict=True))

    def log_line(self) -> dict[str, Any]:
        """Means over the epoch just completed, and scores where they are due.

        Raises RecipeError where an update was not finite.
        """
        self.check()
        now = time.perf_counter()
        images = (self.step - self._clock_step) * self.recipe.batch_size
        means = (self._sums / self.steps_per_epoch).tolist()
        line: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        line |= dict(zip(self._names, means, strict=True))
        line |= {
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_s": round(images / (now - self._clock), 1),
        }
        if self.evaluation_is_due:
            line |= self.evaluate()
        self._clock, self._clock_step = time.perf_counter(), self.step
        return line

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the epoch just completed is one to evaluate after."""
        every = self.recipe.evaluate_every
        return bool(every) and (self.epoch % every == 0 or self.step == self.steps)

    def evaluate(self) -> dict[str, float]:
        """The method's own scores on the test images, and the k-NN accuracy of its features.

        The latter is that of the class token against at most 10,000 training images.
        """
        if self._test is None or len(self._test) == 0:
            return {}
        with self.engine.evaluating() as method:
            scores = {} if self._test.labels is None else method.evaluate(self._test.plain())
            labelled = self._train.labels is not None and self._test.labels is not None
            if self.recipe.knn and labelled:
                chosen = epoch_order(0, 0, len(self._train), torch.device("cpu"))[:_KNN_IMAGES]
                bank, bank_labels = _features(method, self._train, chosen)
                features, labels = _features(method, self._test, None)
                scores["knn_accuracy"] = knn_accuracy(
                    bank, bank_labels, features, labels, k=min(self.recipe.knn, len(bank))
                )
        return scores

    def pictures(self, count: int = 8) -> dict[str, Tensor]:
        """What the method makes of the first test images; see `Method.pictures`."""
        if self._test is None:
            return {}
        images, _ = next(iter(self._test.plain(torch.arange(min(count, len(self._test))))))
        with self.engine.evaluating() as method:
            return method.pictures(images)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "data": self.fingerprint,
            "init": self.method.init_sha256,
            "teacher": self.method.teacher_sha256,
            "execution": asdict(self.engine.execution),
            "names": self._names,
            "sums": self._sums,
            **self.engine.state(self.optimizer),
        }

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Stand where the run that saved `state` stood; what of the machine differs, in phrases.

        Raises RecipeError when that run followed another recipe or had other data.
        """
        saved = _decisive(filled(state["recipe"], type(self.recipe)))
        differing = differences(saved, _decisive(self.recipe.to_dict()))
        if differing:
            raise RecipeError(
                f"This run was started with another recipe ({'; '.join(differing)}); "
                "resume with its own, or start again with --force."
            )
        if state["data"] != self.fingerprint:
            raise RecipeError(
                f"The images of {self.recipe.data!r} are not those this run was started with; put "
                "them back, or start again with --force."
            )
        # States of before have no such entry.
        if state.get("init", self.method.init_sha256) != self.method.init_sha256:
            raise RecipeError(
                "The weights to start from are not those this run was started with; put them back, "
                "or start again with --force."
            )
        if state["teacher"] != self.method.teacher_sha256:
            raise RecipeError(
                "The teacher's weights are not those this run was started with; put them back, or "
                "start again with --force."
            )
        if not isinstance(state["step"], int) or not 0 <= state["step"] <= self.steps:
            raise ValueError(state["step"])
        if not all(torch.isfinite(tensor).all() for tensor in state["method"].values()):
            raise ValueError("weights that are not finite")
        if state["execution"]["sharded"] != self.engine.execution.sharded:
            raise RecipeError(
                "A sharded run resumes sharded only, and a whole one whole; resume it as it was "
                "started."
            )
        self.engine.restore(state, self.optimizer)
        self._names = list(state["names"])
        self._sums = state["sums"].to(self.device)
        self.step = state["step"]
        return self.engine.execution.differences(state["execution"])

    def close(self) -> None:
        """Stop what works ahead on the next batches."""
        self._batches = None


def check_data(recipe: Recipe, data: Labelled) -> None:
    """Raise RecipeError for data that these processes cannot train on by a recipe."""
    kind = METHODS[recipe.method.name]
    if data.train.labels is None and kind.needs_labels:
        raise RecipeError(
            f"{recipe.method.name} needs labels, and {recipe.data!r} has none; give a folder with "
            "one folder a class, of two classes or more, or arrays with labels."
        )
    check_batch(recipe, len(data.train))
    if recipe.batch_size < kind.least_batch:
        raise RecipeError(
            f"{recipe.method.name} tells the images of a batch apart, so batch_size must be at "
            f"least {kind.least_batch}, not {recipe.batch_size}."
        )
    share = recipe.batch_size // (distributed.world_size() * recipe.accumulate)
    if share % 2 and any(getattr(recipe.method, k, 0) for k in ("mixup", "cutmix")):
        raise RecipeError(
            f"mixup and cutmix mix pairs of images, but each process works on {share} at a "
            "time; choose a batch_size that leaves an even number."
        )


def check_batch(recipe: Any, images: int) -> None:
    """Raise RecipeError where the batch of a recipe is no batch of so many training images."""
    processes = distributed.world_size()
    if images < recipe.batch_size:
        raise RecipeError(
            f"batch_size {recipe.batch_size} is more than the {images} training images of "
            f"{recipe.data!r}; lower it."
        )
    if recipe.batch_size % (processes * recipe.accumulate):
        raise RecipeError(
            f"batch_size {recipe.batch_size} must be a multiple of {processes} processes x "
            f"accumulate {recipe.accumulate}."
        )


def build_method(recipe: Recipe, classes: int) -> Method:
    """The recipe's method with its initial weights, which its seed decides, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        method = METHODS[recipe.method.name](recipe.method, recipe.encoder, classes)
        if recipe.distill is None:
            return method
        teacher = load_teacher(recipe.distill, recipe.encoder)
        return Distilled(recipe.distill, method, recipe.encoder, teacher)


def _features(method: Method, feed: Feed, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for images, classes in feed.plain(indices):
        features.append(method.features(images).float())
        labels.append(classes)
    return torch.cat(features), torch.cat(labels)


def fingerprint(data: Labelled) -> str:
    """A hash of the training images, or of their names where they are files, and of the labels."""
    digest = hashlib.sha256(f"{len(data.train)}".encode())
    part: Arrays | Files = data.train
    if isinstance(part, Arrays):
        digest.update(np.ascontiguousarray(part.images).data)
    else:
        digest.update("\n".join(part.names).encode())
    if part.labels is not None:
        digest.update(np.ascontiguousarray(part.labels).data)
    return digest.hexdigest()


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in _BOOKKEEPING}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "key: old → new" for every leaf that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r}, now {after!r}")
    return found
