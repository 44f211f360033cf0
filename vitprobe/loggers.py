"""Places that show a training run or a report, beside its files: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
import secrets
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitprobe.errors import LoggerError, suggest
from vitprobe.files import replacing

Line = Mapping[str, float | int]


class Logger(ABC):
    """One such place. Once open it never stops the work: the first failure is warned of, and
    from then on nothing more is sent there."""

    name: str

    def __init__(self) -> None:
        self._failed = False

    def write(self, line: Line, step: int) -> None:
        """Send the numbers of a line of the log, after `step` updates."""
        self._attempt(lambda: self._write(line, step))

    def picture(self, path: Path, step: int, name: str = "pictures") -> None:
        """Send an image file, under a name."""
        self._attempt(lambda: self._picture(path, step, name))

    def close(self) -> None:
        """Send what is still waiting."""
        self._attempt(self._close)

    def _attempt(self, send: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            send()
        except Exception as error:  # a network, a full disk, a service's own defects
            self._failed = True
            warnings.warn(
                f"{self.name} failed and gets nothing more of this run, which goes on "
                f"({_reason(error)})",
                stacklevel=3,
            )

    @abstractmethod
    def _write(self, line: Line, step: int) -> None: ...

    @abstractmethod
    def _picture(self, path: Path, step: int, name: str) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class _TensorBoard(Logger):
    """Event files below out/tensorboard."""

    name = "TensorBoard"

    def __init__(
        self,
        out: Path,
        run_name: str,
        config: Mapping[str, Any],
        resume_step: int,
        step_name: str,
    ) -> None:
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        # Of what an interrupted run wrote, the steps that will be run again are hidden.
        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=resume_step + 1)
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
        self._writer.add_text("config", f"{run_name}\n\n{text}", resume_step)

    def _write(self, line: Line, step: int) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _picture(self, path: Path, step: int, name: str) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def _close(self) -> None:
        self._writer.close()


class _WandB(Logger):
    """A run of Weights & Biases; its own settings (WANDB_MODE, WANDB_PROJECT, …) apply."""

    name = "Weights & Biases"

    def __init__(
        self,
        out: Path,
        run_name: str,
        config: Mapping[str, Any],
        resume_step: int,
        step_name: str,
    ) -> None:
        super().__init__()
        import wandb

        self._image = wandb.Image
        self._run: Any = wandb.init(
            dir=str(out),
            id=_run_id(out / "wandb_id.txt", resumed=resume_step > 0),
            resume="allow" if resume_step > 0 else None,
            name=run_name,
            project=os.environ.get("WANDB_PROJECT", "vitprobe"),
            config=dict(config),
            # Neither its own messages nor a copy of ours: the run has a progress line and a log.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own count of steps only ever grows, and what a resumed run says of a step that was
        # seen before would be thrown away.
        self._step = step_name
        self._run.define_metric(step_name)
        self._run.define_metric("*", step_metric=step_name)

    def _write(self, line: Line, step: int) -> None:
        self._run.log({**line, self._step: step})

    def _picture(self, path: Path, step: int, name: str) -> None:
        self._run.log({name: self._image(str(path)), self._step: step})

    def _close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, str, Mapping[str, Any], int, str], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise LoggerError for an unknown name and for a package that is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise LoggerError(
                f"There is no logger '{name}', but {' and '.join(LOGGERS)}.{suggest(name, LOGGERS)}"
            )
        if not (sys.modules[name] if name in sys.modules else find_spec(name)):
            raise LoggerError(
                f"The logger '{name}' needs a package that is not installed; install it with pip "
                "install -e '.[logging]', or leave that logger out."
            )


def open_loggers(
    names: Sequence[str],
    out: Path,
    *,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int = 0,
    step_name: str = "step",
) -> list[Logger]:
    """Open the loggers of these names ("tensorboard", "wandb") for what is in the folder `out`.

    config: what made it, such as the resolved recipe, as JSON-able values.
    resume_step: updates that a resumed run has behind it; what was logged beyond is replaced.
    step_name: what steps count, for services that name their axes.

    Raises LoggerError for an unknown name, a package that is not installed, and a service that
    cannot be reached at the start.
    """
    opened: list[Logger] = []
    check_loggers(names)
    for name in names:
        try:
            opened.append(LOGGERS[name](out, run_name, config, resume_step, step_name))
        except ImportError as error:
            _close(opened)
            raise LoggerError(
                f"The logger '{name}' needs a package that is not installed ({_reason(error)}); "
                "install it with pip install -e '.[logging]', or leave that logger out."
            ) from error
        except Exception as error:  # whatever a service raises, the user learns which it was
            _close(opened)
            raise LoggerError(
                f"The logger '{name}' cannot be opened ({_reason(error)}); mend that, or leave it "
                "out."
            ) from error
    return opened


def _close(loggers: Sequence[Logger]) -> None:
    for logger in loggers:
        logger.close()


def _run_id(path: Path, *, resumed: bool) -> str:
    """The id under which the service knows the run: a resumed one keeps that of its first start."""
    if resumed and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    fresh = secrets.token_hex(4)
    with replacing(path) as partial:
        partial.write_text(f"{fresh}\n", encoding="utf-8")
    return fresh


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
