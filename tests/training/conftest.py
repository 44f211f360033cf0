"""The runs that tests of the loop and of resumption share."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs_for_tests import CHANGES, METHODS, SMALL, train

from vitprobe.training import pretrain


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the distilled run learns from: another width, other heads."""
    folder = tmp_path_factory.mktemp("teacher")
    wider = SMALL | {"encoder.width": 24, "encoder.heads": 3, "epochs": 1}
    pretrain("digits_mae", folder / "run", overrides=wider, device="cpu", progress=False)
    CHANGES["dmae"][1]["distill.teacher"] = f"run:{folder / 'run'}"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, small_teacher: None) -> dict[str, Path]:
    """One uninterrupted run of each method."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        train(method, folder / method)
    return {method: folder / method for method in METHODS}
