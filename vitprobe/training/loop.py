"""The one training loop: a recipe in, a run directory with an encoder out."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe import distributed, provenance
from vitprobe.data.labelled import Labelled, load_labelled
from vitprobe.devices import find_device
from vitprobe.errors import CheckpointError, RecipeError, ResultError
from vitprobe.loggers import Logger, check_loggers, open_loggers
from vitprobe.training.encoder import save_encoder
from vitprobe.training.pictures import save_grid
from vitprobe.training.recipe import Recipe, load_recipe, remarks
from vitprobe.training.run import Run
from vitprobe.training.state import load_state, previous, save_state, write_text

RECIPE, LOG, STATE, ENCODER = "recipe.toml", "log.jsonl", "state.pt", "encoder.safetensors"
ABOUT, _SNAPSHOTS, _PICTURES = "run.json", "snapshots", "pictures"
# What a log line says about the run's progress rather than about what was learned.
_PROGRESS_KEYS = ("step", "epoch", "lr", "images_per_s", "gradient_norm")
# Processes have to agree on stopping and saving, which makes them wait for each other.
_AGREE_EVERY = 10
_SHOWN_EVERY_S = 1.0


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
    data: Any = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    workers: int | None = None,
    sharded: bool = False,
    loggers: Sequence[str] = (),
    progress: bool = True,
) -> Path:
    """Train as `recipe` says into the directory `out`; returns the path of encoder.safetensors.

    `out` gets recipe.toml (resolved), log.jsonl (a line an epoch: means of the loss and its terms
    over the epoch, the last learning rate, images per second, scores), state.pt and the state
    before it, encoder.safetensors (timm's VisionTransformer keys, fp32; metadata as JSON under
    "vitprobe"), snapshots/ of the encoder and pictures/ where the recipe and method have them.

    Started by torchrun, the processes train as one: the batch of the recipe is shared out.

    Args:
        recipe: name of a bundled recipe, path of a TOML file, or a Recipe.
        out: directory of the run.
        data: instead of the recipe's: a source string or path, arrays (images, labels), a Labelled.
        overrides: of recipe keys, {"optimizer.lr": 1e-3}.
        resume: continue from state.pt; on the CPU with bitwise the numbers of a run that was never
            stopped.
        force: replace an earlier run in `out`.
        device: "auto" (CUDA, else the CPU) or a torch device.
        workers: processes that decode images, where they do not live on the device; by default one
            a core, at most 16.
        sharded: split weights and optimiser over the processes, for models too large for one.
        loggers: "tensorboard", "wandb".
        progress: say on stderr how it goes.

    Raises:
        RecipeError: a recipe that cannot be followed, or a loss that is not finite.
        DataError: its data cannot be read.
        ResultError: `out` exists (without `force` or `resume`) or cannot be written.
        CheckpointError: a state that cannot be resumed from.
        CaptureError: a distilled layer cannot be heard.
        Terminated, KeyboardInterrupt: SIGTERM or Ctrl-C arrived; the state was saved.
    """
    out = Path(out)
    source = data if data is None or isinstance(data, str | Path) else str(_describe(data))
    resolved = load_recipe(recipe, data=source, overrides=overrides)

    def make(place: torch.device) -> Run:
        labelled = load_labelled(
            resolved.data if source is None or isinstance(data, str | Path) else data,
            channels=resolved.encoder.channels,
        )
        return Run(resolved, labelled, place, workers=worker_count(workers), sharded=sharded)

    def finish(run: Run) -> None:
        tensors = run.engine.encoder_state()
        if distributed.rank() == 0:
            save_encoder(tensors, out / ENCODER, _metadata(run, out / LOG))

    train(
        make,
        finish,
        out,
        threads=resolved.threads,
        resume=resume,
        force=force,
        device=device,
        loggers=loggers,
        progress=progress,
    )
    return out / ENCODER


def train(
    make: Callable[[torch.device], Run],
    finish: Callable[[Run], None],
    out: Path,
    *,
    threads: int,
    resume: bool | None,
    force: bool,
    device: str,
    loggers: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Train a run in its directory, as `pretrain` does, and raise what it raises.

    Args:
        make: the run, on the device of this process.
        finish: makes what the run leaves when it has ended, with all processes still together.
        threads: of torch on the CPU, 0 for as many as it chooses.
        resume: None to go on where there is a state, and to start where there is none.
    """
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        place = stack.enter_context(distributed.joined(training_device(device)))
        leads = distributed.rank() == 0
        progress = progress and leads
        stack.enter_context(torch.random.fork_rng(devices=[place] if place.type == "cuda" else []))
        run = make(place)
        stack.callback(run.close)
        check_loggers(loggers)
        if resume is None:
            resume = distributed.from_first((out / STATE).exists())
        existed = out.is_dir()
        if existed:
            stack.enter_context(_alone(out))
        notes = [run.path, *remarks(run.recipe), *run.engine.notes]
        notes += _prepare(out, run, resume=resume, force=force)
        if not existed:
            stack.enter_context(_alone(out))
        sinks = open_loggers(
            loggers if leads else (),
            out,
            run_name=out.resolve().name,
            config=run.recipe.to_dict(),
            resume_step=run.step,
        )
        for sink in sinks:
            stack.callback(sink.close)
        if progress:
            for note in notes:
                _say(f"vitprobe: {note}")
        _train(run, out, sinks, progress=progress)
        finish(run)


def _train(run: Run, out: Path, sinks: Sequence[Logger], *, progress: bool) -> None:
    recipe = run.recipe
    if run.step == 0 and 0 in recipe.snapshots:
        _snapshot(run, out)
    with _signals() as stopped, _bar(run, progress) as bar:
        shown = saved = time.monotonic()
        while run.step < run.steps:
            run.advance()
            now = time.monotonic()
            bar.update()
            if not bar.disable and now - shown > _SHOWN_EVERY_S:
                shown = now
                if distributed.world_size() == 1:
                    run.check()
                latest = {k: v for k, v in run.latest().items() if k != "gradient_norm"}
                bar.set_postfix(
                    {"epoch": run.epoch, **_short(latest), "lr": f"{run.lr:.1e}"}, refresh=False
                )
            ended = run.step % run.steps_per_epoch == 0
            if ended:
                _log(run, out, sinks, quiet=not progress)
                if run.epoch in recipe.snapshots:
                    _snapshot(run, out)
            stop, late = _agreed(run, stopped.is_set(), now - saved > 60 * recipe.save_minutes)
            if stop or late or (ended and run.epoch % recipe.save_every == 0):
                _save(run, out)
                saved = now
            if stop:
                said = (
                    f"Stopped at step {run.step} of {run.steps}; {out / STATE} is saved, "
                    "resume (--resume) to go on."
                )
                raise KeyboardInterrupt(said) if stopped.interrupted else Terminated(said)
    _save(run, out)


def _log(run: Run, out: Path, sinks: Sequence[Logger], *, quiet: bool) -> None:
    """The epoch's line in the log and wherever else it is wanted, and its pictures."""
    line = run.log_line()
    rows = run.pictures() if run.evaluation_is_due else {}
    if distributed.rank() > 0:
        return
    try:
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ResultError(
            f"Could not write {out / LOG}: {error.strerror}; {run.saved}, resume to go on."
        ) from error
    for sink in sinks:
        sink.write({k: v for k, v in line.items() if k != "step"}, run.step)
    if rows:
        path = _draw(run, rows, out)
        for sink in sinks:
            sink.picture(path, run.step)
    if not quiet:
        terms = ", ".join(f"{k} {v}" for k, v in _short(line).items() if k not in ("step", "epoch"))
        _say(f"epoch {run.epoch} of {run.recipe.epochs}: {terms}")


def _say(text: str) -> None:
    # Above the progress bar, where there is one.
    tqdm.write(text, file=sys.stderr)


def _short(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items()}


def _draw(run: Run, rows: Mapping[str, Tensor], out: Path) -> Path:
    folder = out / _PICTURES
    folder.mkdir(exist_ok=True)
    path = folder / f"epoch_{run.epoch:04d}.png"
    encoder = run.recipe.encoder
    save_grid(
        torch.stack(list(rows.values())),
        path,
        mean=encoder.mean,
        std=encoder.std,
        titles=list(rows),
    )
    return path


def _snapshot(run: Run, out: Path) -> None:
    tensors = run.engine.encoder_state()
    if distributed.rank() == 0:
        folder = out / _SNAPSHOTS
        folder.mkdir(exist_ok=True)
        path = folder / f"epoch_{run.epoch:04d}.safetensors"
        save_encoder(tensors, path, _metadata(run, out / LOG))


def _save(run: Run, out: Path) -> None:
    saved = _saved(run, out)
    if run.saved == saved:
        return
    run.check()
    state = run.state()
    if distributed.rank() == 0:
        save_state(out / STATE, state)
    run.saved = saved


def _saved(run: Run, out: Path) -> str:
    return f"{out / STATE} holds step {run.step}"


def _agreed(run: Run, *wishes: bool) -> list[bool]:
    """What any of the processes wishes; they ask each other now and then only."""
    if distributed.world_size() == 1:
        return list(wishes)
    if run.step % _AGREE_EVERY and run.step != run.steps:
        return [False] * len(wishes)
    run.check()
    wished = torch.tensor(wishes, dtype=torch.float64, device=run.device)
    return (distributed.mean(wished) > 0).tolist()


def _metadata(run: Run, log: Path) -> dict[str, Any]:
    """What the encoder's file says of itself; metrics are those of the last line of the log."""
    last = json.loads(_lines(log)[-1]) if run.epoch else {}
    recipe, encoder = run.recipe, run.recipe.encoder
    described = {
        "architecture": run.method.architecture(encoder),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "method": recipe.method.name,
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "epochs": run.epoch,
        "classes": list(run.classes),
        "metrics": {k: v for k, v in last.items() if k not in _PROGRESS_KEYS},
    }
    for name in ("init_sha256", "teacher_sha256"):
        if (digest := getattr(run.method, name)) is not None:
            described[name] = digest
    return described


def _prepare(out: Path, run: Run, *, resume: bool, force: bool) -> list[str]:
    """Make `out` ready for the run's next step, touching nothing when that cannot be."""
    if resume:
        return _resume(out, run)
    if distributed.rank() == 0:
        _clear(out, run.leaves, force=force)
        write_text(out / RECIPE, run.recipe.to_toml())
        data = {"source": run.recipe.data, "path": run.path, "sha256": run.fingerprint}
        about = {
            "provenance": provenance.collect(),
            "execution": asdict(run.engine.execution),
            "data": data,
        }
        write_text(out / ABOUT, json.dumps(about, indent=1))
    distributed.wait()
    _save(run, out)
    return []


def _clear(out: Path, leaves: Sequence[str], *, force: bool) -> None:
    try:
        if out.exists() and not out.is_dir():
            raise ResultError(f"{out} is a file; name a folder for the run.")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not force:
            raise ResultError(
                f"{out} exists; resume it (--resume), replace it (--force), or name another."
            )
        out.mkdir(parents=True, exist_ok=True)
        # Only what a run writes is replaced: force must not cost anyone their other files.
        for name in (STATE, LOG, RECIPE, ABOUT, *leaves):
            (out / name).unlink(missing_ok=True)
        previous(out / STATE).unlink(missing_ok=True)
        _sweep(out)
        for folder, pattern in ((_SNAPSHOTS, "*.safetensors"), (_PICTURES, "*.png")):
            for path in (out / folder).glob(f"epoch_{pattern}"):
                path.unlink()
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    except OSError as error:
        raise ResultError(f"Cannot write to {out}: {error.strerror}.") from error


def _sweep(out: Path) -> None:
    """Remove what a process left half-written when it was killed."""
    for path in out.glob(f".{STATE}.*.part"):
        path.unlink()


def _resume(out: Path, run: Run) -> list[str]:
    path = out / STATE
    differences, damage = load_state(path, run.restore)
    run.saved = _saved(run, out)
    # Epochs logged after the state was saved will be run, and logged, again.
    log = out / LOG
    kept = [line for line in _lines(log) if _step_of(line) <= run.step]
    if len(kept) < run.epoch:
        raise CheckpointError(
            f"{log} has lines for {len(kept)} of the {run.epoch} epochs that {path} has seen; put "
            "it back, or start the run again with --force."
        )
    distributed.wait()
    if distributed.rank() == 0:
        _sweep(out)
        write_text(log, "".join(f"{line}\n" for line in kept))
    notes = [damage] if damage else []
    left = "nothing is left to do" if run.step == run.steps else f"{run.steps - run.step} to go"
    notes.append(f"resumed after step {run.step} of {run.steps}, {left}")
    if differences:
        notes.append(f"resumed, but not to the bit: {', '.join(differences)}")
    return notes


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


def _describe(data: Any) -> str:
    return data.source if isinstance(data, Labelled) else "arrays"


def training_device(name: str) -> torch.device:
    """The device of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        raise RecipeError("Training needs double precision, which mps has not; use --device cpu.")
    return find_device(name)


def worker_count(asked: int | None) -> int:
    """Processes that decode images: as many as asked for, or one a core, at most 16.

    Raises RecipeError for fewer than none.
    """
    if asked is not None and asked < 0:
        raise RecipeError(f"workers must be at least 0, not {asked}.")
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


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


class _Stopped(threading.Event):
    """Set by a signal; `interrupted` where it was Ctrl-C."""

    interrupted = False

    def handle(self, number: int, _frame: Any) -> None:
        """The handler: a second Ctrl-C does not wait for the update to end."""
        self.interrupted = number == signal.SIGINT
        if self.is_set() and self.interrupted:
            raise KeyboardInterrupt
        self.set()


@contextmanager
def _signals() -> Iterator[_Stopped]:
    """An event that SIGTERM and Ctrl-C set; outside the main thread they cannot be caught."""
    stopped = _Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stopped.handle) for number in caught]
    try:
        yield stopped
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other runs out of a directory; raises ResultError where one is at work in it."""
    if distributed.rank() > 0:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ResultError(f"Another run is at work in {out}; wait for it or stop it.") from error
    finally:
        os.close(folder)
