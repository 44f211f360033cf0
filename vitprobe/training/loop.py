"""The one training loop: a recipe in, a run directory with an encoder out."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe.data.labelled import LabelledArrays, load_labelled
from vitprobe.devices import find_device
from vitprobe.errors import CheckpointError, RecipeError, ResultError
from vitprobe.training.augment import Augment
from vitprobe.training.encoder import save_encoder
from vitprobe.training.methods import METHODS, Batch
from vitprobe.training.optimizer import build_optimizer
from vitprobe.training.randomness import Draws, epoch_order
from vitprobe.training.recipe import Recipe, load_recipe
from vitprobe.training.schedule import warmup_cosine
from vitprobe.training.state import load_state, save_state, write_text

_RECIPE, _LOG, _STATE, _ENCODER = "recipe.toml", "log.jsonl", "state.pt", "encoder.safetensors"
# What a log line says about the run's progress rather than about what was learned.
_PROGRESS_KEYS = ("step", "epoch", "lr", "images_per_s")

# Below this width of a head torch's fused attention is slower on the CPU than its plain products:
# 2.8 against 2.0 s for an epoch of digits_supervised on one thread.
_NARROW_HEAD = 16


class Terminated(SystemExit):
    """SIGTERM arrived and the training state was saved; uncaught, it exits with status 143.

    `str` of it says where the run stopped and that it can be resumed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message


def pretrain(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Path:
    """Train as `recipe` says into the directory `out`; returns the path of encoder.safetensors.

    `out` gets recipe.toml (resolved), log.jsonl (a line an epoch: means of the loss and its terms
    over the epoch, the last learning rate, images per second), state.pt and encoder.safetensors
    (timm's VisionTransformer keys, fp32; metadata as JSON under "vitprobe").

    `resume` continues from state.pt, on the CPU with bitwise the numbers of a run that was never
    stopped. `device` is "auto" (CUDA, else the CPU) or a torch device.

    Raises RecipeError for a recipe that cannot be followed or a loss that is not finite, DataError
    for its data, ResultError for an `out` that exists (without `force` or `resume`) or cannot be
    written, CheckpointError for a state that cannot be resumed from, and Terminated.
    """
    out = Path(out)
    resolved = load_recipe(recipe, data=data, overrides=overrides)
    # Training on MPS is untried, so it is only used when asked for by name.
    untold = "cuda" if torch.cuda.is_available() else "cpu"
    device = untold if device == "auto" else device
    run = Run(resolved, load_labelled(resolved.data), find_device(device))
    _prepare(out, run, resume=resume, force=force)
    with _threads(resolved.threads), _sigterm() as terminated, _bar(run, progress) as bar:
        while run.step < run.steps:
            run.advance()
            bar.update()
            if run.step % run.steps_per_epoch == 0:
                line = run.log_line()
                with (out / _LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
                if run.epoch % resolved.save_every == 0:
                    save_state(out / _STATE, run.state())
            if terminated.is_set():
                save_state(out / _STATE, run.state())
                raise Terminated(
                    f"Stopped at step {run.step} of {run.steps}; "
                    f"{out / _STATE} is saved, resume to go on."
                )
    save_state(out / _STATE, run.state())
    save_encoder(run.method.encoder, out / _ENCODER, run.metadata(out / _LOG))
    return out / _ENCODER


class Run:
    """A method and its optimiser, standing at `step` of `steps` updates."""

    def __init__(self, recipe: Recipe, data: LabelledArrays, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        channels = data.images.shape[1]
        if self.steps_per_epoch == 0:
            raise RecipeError(
                f"batch_size {recipe.batch_size} is more than the {len(data.train)} training "
                f"images of {recipe.data!r}; lower it."
            )
        if channels != recipe.encoder.channels:
            raise RecipeError(
                f"encoder.channels is {recipe.encoder.channels}, but the images of "
                f"{recipe.data!r} have {channels}."
            )
        images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        self.train_images = images[data.train].to(device)
        self.train_labels = labels[data.train].to(device)
        self.test_images = images[data.test].to(device)
        self.test_labels = labels[data.test].to(device)

        encoder = recipe.encoder
        augment = Augment(
            recipe.augment, size=encoder.image_size, mean=encoder.mean, std=encoder.std
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            method = METHODS[recipe.method.name](recipe.method, encoder, augment, len(data.classes))
        self.method = method.to(device).train()
        if device.type == "cpu" and encoder.width // encoder.heads < _NARROW_HEAD:
            for module in self.method.modules():
                if isinstance(module, Attention):
                    # timm marks it final for TorchScript's sake; nothing here is scripted.
                    module.fused_attn = False  # type: ignore[misc]
        self.optimizer = build_optimizer(self.method, recipe.optimizer)
        self._order = torch.empty(0)
        self._sums: dict[str, Tensor] = {}
        self._clock, self._clock_step = time.perf_counter(), 0

    @property
    def epoch(self) -> int:
        """Number of epochs completed."""
        return self.step // self.steps_per_epoch

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        config = self.recipe.optimizer
        return warmup_cosine(
            self.step,
            steps=self.steps,
            warmup=round(config.warmup_epochs * self.steps_per_epoch),
            peak=config.lr * self.recipe.batch_size / 256,
        )

    def advance(self) -> None:
        """One update. Raises RecipeError, the weights untouched, for a loss that is not finite."""
        loss, terms = self.method.loss(self._batch())
        if not torch.isfinite(loss):
            listed = "".join(f", {name} {value.item():g}" for name, value in terms.items())
            raise RecipeError(
                f"The {self.recipe.method.name} loss is not finite at step {self.step} "
                f"(loss {loss.item():g}{listed}); lower optimizer.lr or lengthen the warm-up, and "
                "start again with force."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.step % self.steps_per_epoch == 0:
            self._sums = {}
        for name, value in {"loss": loss, **terms}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self.step += 1

    def _batch(self) -> Batch:
        position = self.step % self.steps_per_epoch
        if position == 0 or len(self._order) == 0:
            self._order = epoch_order(
                self.recipe.seed, self.epoch, len(self.train_images), self.device
            )
        size = self.recipe.batch_size
        index = self._order[position * size : (position + 1) * size]
        draws = Draws(self.recipe.seed, self.epoch, index)
        return Batch(self.train_images[index], self.train_labels[index], draws)

    def log_line(self) -> dict[str, Any]:
        """Means over the epoch just completed, and test scores where they are due."""
        now = time.perf_counter()
        images = (self.step - self._clock_step) * self.recipe.batch_size
        line: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        line |= {name: (s / self.steps_per_epoch).item() for name, s in self._sums.items()}
        line |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": round(images / (now - self._clock), 1),
        }
        if self.epoch % self.recipe.evaluate_every == 0 or self.step == self.steps:
            self.method.eval()
            line |= self.method.evaluate(self.test_images, self.test_labels)
            self.method.train()
        self._clock, self._clock_step = time.perf_counter(), self.step
        return line

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self._sums,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where the run that saved `state` stood.

        Raises RecipeError when that run followed another recipe.
        """
        differing = _differences(state["recipe"], self.recipe.to_dict())
        if differing:
            raise RecipeError(
                f"This run was started with another recipe ({'; '.join(differing)}); "
                "resume with its own, or start again with force."
            )
        if not isinstance(state["step"], int) or not 0 <= state["step"] <= self.steps:
            raise ValueError(state["step"])
        if not all(torch.isfinite(tensor).all() for tensor in state["method"].values()):
            raise ValueError("weights that are not finite")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.step = self._clock_step = state["step"]

    def metadata(self, log: Path) -> dict[str, Any]:
        """What the encoder's file says of itself; metrics are those of the last line of `log`."""
        last = json.loads(_lines(log)[-1]) if self.epoch else {}
        encoder = self.recipe.encoder
        return {
            "architecture": encoder.architecture(self.method.encoder.num_classes),
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "method": self.recipe.method.name,
            "recipe": self.recipe.to_dict(),
            "seed": self.recipe.seed,
            "epochs": self.recipe.epochs,
            "metrics": {k: v for k, v in last.items() if k not in _PROGRESS_KEYS},
        }


def _prepare(out: Path, run: Run, *, resume: bool, force: bool) -> None:
    """Make `out` ready for the run's next step, touching nothing when that cannot be."""
    if resume:
        _resume(out, run)
        return
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not force:
            raise ResultError(f"{out} exists; resume it, replace it with force, or name another.")
        out.mkdir(parents=True, exist_ok=True)
        # Only what a run writes is replaced: force must not cost anyone their other files.
        for name in (_RECIPE, _LOG, _STATE, _ENCODER):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise ResultError(f"Cannot write to {out}: {error.strerror}.") from error
    save_state(out / _STATE, run.state())
    write_text(out / _RECIPE, run.recipe.to_toml())


def _resume(out: Path, run: Run) -> None:
    path = out / _STATE
    state = load_state(path)
    try:
        run.restore(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a training state of this recipe ({type(error).__name__}); "
            "start the run again with force."
        ) from error
    # Epochs logged after the state was saved will be run, and logged, again.
    log = out / _LOG
    kept = [line for line in _lines(log) if _step_of(line) <= run.step]
    if len(kept) < run.epoch:
        raise CheckpointError(
            f"{log} has lines for {len(kept)} of the {run.epoch} epochs that {path} has seen; put "
            "it back, or start the run again with force."
        )
    write_text(log, "".join(f"{line}\n" for line in kept))


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "key: old → new" for every leaf that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r}, now {after!r}")
    return found


def _bar(run: Run, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=run.steps,
        initial=run.step,
        desc=run.recipe.method.name,
        unit="step",
        disable=None if progress else True,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread signals cannot be caught."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
