"""Two processes that train as one, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vitprobe.training import pretrain

RECIPE = """
inherits = "{base}"
epochs = 3
batch_size = 128
threads = 1
save_every = 1
evaluate_every = 1
{top}

[encoder]
image_size = 8
width = 16
depth = 2
heads = 2
{tables}
"""
DINO = """
[method]
name = "dino"
prototypes = 16
hidden_width = 16
bottleneck_width = 8
warmup_teacher_epochs = 1
"""
DINO_VIEWS = "views = [{ blur = 0.5 }, {}, { size = 4, count = 2, crop_scale = [0.1, 0.4] }]"
RECIPES = {
    "mae": ("digits_mae", "", ""),
    "moco_v3": ("digits_mocov3", "", "[method]\nhidden_width = 16\nprojection_width = 8"),
    "dino": ("digits_base", DINO_VIEWS, DINO),
    "supervised": ("digits_supervised", "", "[method]\nmixup = 0.2\ncutmix = 1.0"),
    "dmae": ("digits_dmae", "", '[distill]\nteacher = "{teacher}"\nhidden = 0.5'),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    _here(_recipe("mae", out.parent, out), out, overrides={"epochs": 1})
    return out


def _here(recipe: Path, out: Path, **options: Any) -> None:
    pretrain(recipe, out, device="cpu", progress=False, **options)


def _recipe(method: str, folder: Path, teacher: Path) -> Path:
    base, top, tables = RECIPES[method]
    if base == "digits_base":
        base, tables = "digits_mocov3", tables
    path = folder / f"{method}.toml"
    text = RECIPE.format(base=base, top=top, tables=tables.replace("{teacher}", f"run:{teacher}"))
    if method == "dino":
        # Another method's table cannot inherit the first one's keys.
        text = text.replace('inherits = "digits_mocov3"', f'inherits = "{_bare(folder)}"')
    path.write_text(text)
    return path


def _bare(folder: Path) -> Path:
    path = folder / "bare.toml"
    path.write_text(
        'inherits = "_digits"\n[optimizer]\nbetas = [0.9, 0.999]\nfinal_weight_decay = 0.4\n'
    )
    return path


def _pretrain(recipe: Path, out: Path) -> list[str]:
    return ["vitprobe", "pretrain", str(recipe), "--out", str(out), "--device", "cpu"]


def _run(command: list[str], processes: int = 1, expect: int = 0) -> str:
    launch = [sys.executable, "-m"]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch += ["torch.distributed.run", "--nproc-per-node", str(processes)]
        launch += ["--master-port", str(port), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


def _log(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mae", []),
        ("mae", ["--set", "accumulate=2"]),
        ("mae", ["--sharded"]),
        ("moco_v3", []),
        ("dino", []),
        ("supervised", []),
        ("dmae", []),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(
    tmp_path: Path, teacher: Path, method: str, options: list[str]
) -> None:
    recipe = _recipe(method, tmp_path, teacher)
    _here(recipe, tmp_path / "one")
    _run([*_pretrain(recipe, tmp_path / "two"), *options], processes=2)
    one, two = _log(tmp_path / "one"), _log(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        # Accuracies count images, and one on the edge may fall on either side.
        assert a == pytest.approx(b, rel=2e-3, abs=6e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    weights = [load_file(tmp_path / name / "encoder.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=2e-3)


@pytest.mark.slow
def test_a_sharded_run_resumes_bitwise(tmp_path: Path, teacher: Path) -> None:
    command = [*_pretrain(_recipe("mae", tmp_path, teacher), tmp_path / "run"), "--sharded"]
    _run(command, processes=2)
    whole, log = (tmp_path / "run" / "encoder.safetensors").read_bytes(), _log(tmp_path / "run")
    (tmp_path / "run" / "state.pt").unlink()
    (tmp_path / "run" / "encoder.safetensors").unlink()
    said = _run([*command, "--resume"], processes=2)
    assert "is missing; going on from state.previous.pt" in said
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == whole
    assert _log(tmp_path / "run") == log


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_run_killed_at_any_moment_resumes_bitwise(
    tmp_path: Path, teacher: Path, method: str
) -> None:
    command = _pretrain(_recipe(method, tmp_path, teacher), tmp_path / "run")
    longer = {"epochs": 12, "evaluate_every": 50}
    command += ["--set", *(f"{key}={value}" for key, value in longer.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.DEVNULL, env=environment
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
    recipe = tmp_path / f"{method}.toml"
    _here(recipe, tmp_path / "run", overrides=longer, resume=True)
    _here(recipe, tmp_path / "whole", overrides=longer)
    assert _log(tmp_path / "run") == _log(tmp_path / "whole")
    killed, undisturbed = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("run", "whole")
    )
    for name, tensor in undisturbed["method"].items():
        assert torch.equal(tensor, killed["method"][name]), name
    for number, moments in undisturbed["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, killed["optimizer"]["state"][number][name]), name
