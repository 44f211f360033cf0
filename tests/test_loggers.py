"""Loggers: what arrives there, what resuming replaces, and that a failing one stops nothing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitprobe.errors import LoggerError
from vitprobe.loggers import Line, Logger, open_loggers

RECIPE = {"method": {"name": "mae"}, "epochs": 3}


def opened(name: str, out: Path, resume_step: int = 0) -> Logger:
    (logger,) = open_loggers([name], out, run_name="run", config=RECIPE, resume_step=resume_step)
    return logger


def write_steps(logger: Logger, steps: range, scale: float = 1) -> None:
    for step in steps:
        logger.write({"step": step, "epoch": step, "loss": scale / step}, step)


# -- TensorBoard -----------------------------------------------------------------------------------


@pytest.fixture
def tensorboard(tmp_path: Path) -> Any:
    """Reads back what was logged to tmp_path."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return lambda: accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()


def test_tensorboard_gets_numbers_and_pictures_at_their_step(
    tmp_path: Path, tensorboard: Any
) -> None:
    logger = opened("tensorboard", tmp_path)
    write_steps(logger, range(1, 4))
    Image.new("L", (5, 4), 128).save(tmp_path / "grid.png")
    logger.picture(tmp_path / "grid.png", 3)
    logger.close()
    events = tensorboard()
    assert set(events.Tags()["scalars"]) == {"epoch", "loss"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)),
    ]  # fmt: skip
    (picture,) = events.Images("pictures")
    assert (picture.step, picture.width, picture.height) == (3, 5, 4)


def test_a_resumed_run_replaces_what_tensorboard_was_told_later(
    tmp_path: Path, tensorboard: Any
) -> None:
    logger = opened("tensorboard", tmp_path)
    write_steps(logger, range(1, 6))
    logger.close()
    logger = opened("tensorboard", tmp_path, resume_step=2)
    write_steps(logger, range(3, 5), scale=100)
    logger.close()
    assert [(e.step, e.value) for e in tensorboard().Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(100 / 3)), (4, 25.0),
    ]  # fmt: skip


# -- Weights & Biases ------------------------------------------------------------------------------


class Service:
    """A stand-in for the package wandb that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.finished = 0
        self.down: Exception | None = None

    def init(self, **arguments: Any) -> Service:
        if self.down:
            raise self.down
        self.started.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        if self.down:
            raise self.down
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    module = types.ModuleType("wandb")
    module.__dict__.update(init=service.init, Settings=dict, Image=lambda path: f"image of {path}")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return service


def test_wandb_gets_lines_over_their_steps(tmp_path: Path, service: Service) -> None:
    logger = opened("wandb", tmp_path)
    write_steps(logger, range(1, 3))
    logger.picture(tmp_path / "grid.png", 2)
    logger.close()
    (started,) = service.started
    assert (started["name"], started["project"], started["config"]) == ("run", "vitprobe", RECIPE)
    assert (started["dir"], started["resume"]) == (str(tmp_path), None)
    assert service.metrics == {"step": None, "*": "step"}
    assert service.logged == [
        {"step": 1, "epoch": 1, "loss": 1.0},
        {"step": 2, "epoch": 2, "loss": 0.5},
        {"step": 2, "pictures": f"image of {tmp_path / 'grid.png'}"},
    ]
    assert service.finished == 1


def test_a_resumed_run_is_the_same_run_to_wandb_and_a_new_one_is_not(
    tmp_path: Path, service: Service
) -> None:
    for resume_step in (0, 7, 0):
        opened("wandb", tmp_path, resume_step).close()
    first, resumed, again = service.started
    assert first["id"] == resumed["id"] != again["id"]
    assert (first["resume"], resumed["resume"]) == (None, "allow")


def test_the_project_is_the_users_if_they_name_one(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    opened("wandb", tmp_path)
    assert service.started[0]["project"] == "theirs"


def test_a_service_that_fails_is_warned_of_once_and_left_alone(
    tmp_path: Path, service: Service
) -> None:
    logger = opened("wandb", tmp_path)
    service.down = ConnectionError("no route to host.\nlong trace")
    with pytest.warns(UserWarning, match=r"Biases failed .* \(ConnectionError: no route to host\)"):
        logger.write({"loss": 1.0}, 1)
    service.down = None
    write_steps(logger, range(2, 4))
    logger.close()
    assert not service.logged
    assert not service.finished


def test_a_service_that_is_down_at_the_start_is_told_and_the_others_are_closed(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    class Other(Logger):
        def _write(self, line: Line, step: int) -> None: ...
        def _picture(self, path: Path, step: int) -> None: ...
        def _close(self) -> None:
            closed.append(True)

    monkeypatch.setitem(sys.modules["vitprobe.loggers"].LOGGERS, "tensorboard", lambda *_: Other())
    service.down = RuntimeError("no API key configured")
    with pytest.raises(LoggerError, match=r"'wandb' cannot be opened \(RuntimeError: no API key"):
        open_loggers(["tensorboard", "wandb"], tmp_path, run_name="run", config={})
    assert closed == [True]


def test_wandb_itself_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    Image.new("L", (5, 4), 128).save(tmp_path / "grid.png")
    for resume_step in (0, 2):
        logger = opened("wandb", tmp_path, resume_step)
        write_steps(logger, range(resume_step + 1, resume_step + 3))
        logger.picture(tmp_path / "grid.png", resume_step + 2)
        logger.close()
    (name,) = {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")}
    assert name == f"run-{(tmp_path / 'wandb_id.txt').read_text().strip()}"


# -- either ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoggerError, match=rf"'{name}' needs .* pip install -e '.\[logging\]'"):
        opened(name, tmp_path)


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoggerError, match=r"'tensorbord', but .* Did you mean 'tensorboard'?"):
        open_loggers(["tensorbord"], tmp_path, run_name="run", config={})
    assert open_loggers([], tmp_path, run_name="run", config={}) == []
