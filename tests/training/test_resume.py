"""Runs that were stopped: exact resumption, damaged states, refusals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from runs_for_tests import METHODS, SMALL, STEPS_PER_EPOCH, assert_same_run, log_of, small, train

from vitprobe.errors import (
    CheckpointError,
    RecipeError,
)
from vitprobe.training import Terminated, pretrain
from vitprobe.training.run import Run

pytestmark = pytest.mark.usefixtures("small_teacher")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 3])
def test_a_killed_run_resumes_bitwise(
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int,
) -> None:
    out = tmp_path / "run"
    advance = Run.advance

    def killed(run: Run) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train(method, out)
    assert not (out / "encoder.safetensors").exists()
    # A different generator state must not matter.
    torch.manual_seed(99)
    train(method, out, resume=True)
    assert_same_run(out, whole[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_sigterm_saves_between_steps_and_the_run_resumes_bitwise(
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    step: int,
) -> None:
    out = tmp_path / "run"
    advance = Run.advance

    def terminated(run: Run) -> None:
        advance(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", terminated)
        with pytest.raises(Terminated, match=f"step {step} of 15.*resume") as stop:
            train(method, out)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(out / "state.pt", weights_only=True)["step"] == step
    train(method, out, resume=True)
    assert_same_run(out, whole[method])


def test_ctrl_c_finishes_the_update_saves_and_the_run_resumes_bitwise(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Run.advance

    def interrupted(run: Run) -> None:
        advance(run)
        if run.step == STEPS_PER_EPOCH + 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"Stopped at step 7 of 15.*resume"):
            train("mae", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 7
    train("mae", tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole["mae"])


def test_epochs_logged_after_the_last_state_are_not_logged_twice(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, advance = small("mae", save_every=2), Run.advance

    def killed(run: Run) -> None:
        if run.step == STEPS_PER_EPOCH + 1:
            raise KeyboardInterrupt
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "run", device="cpu", progress=False)
    assert len(log_of(tmp_path / "run")) == 1
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "ep')
    pretrain(recipe, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert log_of(tmp_path / "run") == log_of(whole["mae"])


def test_resuming_a_finished_run_changes_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    train("mae", tmp_path / "run")
    train("mae", tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole["mae"])


def test_resuming_what_was_never_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No training state"):
        train("mae", tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resuming_under_another_recipe_names_the_difference(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.lr was 0\.016, now 0\.5"):
        pretrain(small("mae", **{"optimizer.lr": 0.5}), whole["mae"], resume=True, device="cpu")
    with pytest.raises(RecipeError, match=r"method\.name was 'mae', now 'supervised'"):
        pretrain(small("supervised"), whole["mae"], resume=True, device="cpu")


def test_resuming_with_another_teacher_is_refused(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    for seed in (0, 1):
        changes = SMALL | {"epochs": 0, "seed": seed}
        pretrain("digits_mae", teacher, overrides=changes, force=True, progress=False, device="cpu")
        recipe = small("dmae", **{"distill.teacher": f"run:{teacher}", "epochs": 1})
        if seed == 0:
            pretrain(recipe, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(RecipeError, match="teacher's weights are not those"):
        pretrain(recipe, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_resume_without_its_log_is_refused(tmp_path: Path) -> None:
    overrides = {"epochs": 1, "batch_size": 256}
    pretrain("digits_mae", tmp_path / "a", overrides=overrides, progress=False)
    (tmp_path / "a" / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="has lines for 0 of the 1 epochs"):
        pretrain("digits_mae", tmp_path / "a", overrides=overrides, resume=True, progress=False)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    train("mae", tmp_path / "run")
    for name in ("state.pt", "state.previous.pt"):
        state = tmp_path / "run" / name
        state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*nor can the one before"):
        train("mae", tmp_path / "run", resume=True)


def test_a_damaged_last_state_falls_back_to_the_one_before_and_says_so(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train("mae", out)
    content = bytearray((out / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "state.pt").write_bytes(content)
    pretrain(small("mae"), out, device="cpu", resume=True)
    assert "state.pt is damaged" in (said := capsys.readouterr().err)
    assert "going on from state.previous.pt" in said
    assert_same_run(out, whole["mae"])


def test_a_state_that_is_not_this_methods_is_refused(tmp_path: Path) -> None:
    train("mae", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    (tmp_path / "run" / "state.previous.pt").unlink()
    for broken in ({**state, "method": {}}, {"step": 3}, [1]):
        torch.save(broken, tmp_path / "run" / "state.pt")
        with pytest.raises(CheckpointError, match="not a training state of this recipe"):
            train("mae", tmp_path / "run", resume=True)
