"""The state file: whole or not at all, and a clear word when it is damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from vitprobe.errors import CheckpointError, ResultError
from vitprobe.training.state import load_state, previous, save_state


def test_round_trip_leaves_one_file(tmp_path: Path) -> None:
    state = {"step": 3, "recipe": {"lr": 1e-3, "names": ["a"]}, "weights": torch.arange(4.0)}
    save_state(tmp_path / "state.pt", state)
    loaded, damage = load_state(tmp_path / "state.pt", dict)
    assert damage == ""
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert loaded == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_failed_write_leaves_the_state_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def full(state: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ResultError, match=r"No space left.*the one before is intact"):
        save_state(path, {"step": 2})
    assert load_state(path, dict) == ({"step": 1}, "")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def _damaged(whole: bytes, damage: str) -> bytes:
    middle = len(whole) // 2
    return {
        "truncated": whole[:middle],
        "empty": b"",
        "text": b"hello",
        "payload": pickle.dumps(_Payload()),
        "directory": whole.replace(b"PK\x01\x02", b"PK\x09\x02"),
        "one bit of a weight": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }[damage]


DAMAGES = ["truncated", "empty", "text", "payload", "directory", "one bit of a weight"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_nothing_in_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"
    save_state(path, {"weights": torch.arange(1000.0)})
    path.write_bytes(_damaged(path.read_bytes(), damage))
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        load_state(path, dict)
    assert not (tmp_path / "ran").exists()


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No training state"):
        load_state(tmp_path / "state.pt", dict)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_state_before_a_damaged_one_is_taken_and_it_is_said(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "state.pt"
    for step in (1, 2, 3):
        save_state(path, {"step": step, "weights": torch.arange(1000.0) * step})
    assert {entry.name for entry in tmp_path.iterdir()} == {"state.pt", "state.previous.pt"}
    path.write_bytes(_damaged(path.read_bytes(), damage))
    state, said = load_state(path, dict)
    assert state["step"] == 2
    assert said.startswith(f"The training state {path} is damaged")
    assert said.endswith("going on from state.previous.pt")


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    path.rename(previous(path))
    state, said = load_state(path, dict)
    assert (state, "is missing" in said) == ({"step": 1}, True)


def test_two_damaged_states_are_both_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"hello")
    previous(path).write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*state\.previous\.pt"):
        load_state(path, dict)


def test_a_state_that_is_whole_but_of_no_such_run_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})
    save_state(path, {"other": 2})
    step, said = load_state(path, lambda state: state["step"])
    assert step == 1
    assert said == (
        f"{path} is not a training state of this recipe (KeyError); going on from state.previous.pt"
    )
    with pytest.raises(CheckpointError, match=r"nor can the one before be used .*--force"):
        load_state(path, lambda state: state["none"])
    with pytest.raises(ZeroDivisionError):
        load_state(path, lambda state: 1 // 0)
