"""Two processes that train as one, and processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes_for_tests import together
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
drop_path = {drop}
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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """Runs of two processes, all in one pair of them: to start one takes longest."""
    folder = tmp_path_factory.mktemp("pairs")
    for method in RECIPES:
        _recipe(method, folder, teacher)
    together(_train_together, folder, str(folder))
    return folder


def _train_together(name: str) -> None:
    folder = Path(name)
    for method in RECIPES:
        _here(folder / f"{method}.toml", folder / method)
    mae = folder / "mae.toml"
    _here(mae, folder / "mae accumulated", overrides={"accumulate": 2})
    sharded = folder / "mae sharded"
    _here(mae, sharded, sharded=True)
    if dist.get_rank() == 0:
        shutil.copytree(sharded, folder / "mae resumed")
        (folder / "mae resumed" / "state.pt").unlink()
    dist.barrier()
    _here(mae, folder / "mae resumed", sharded=True, resume=True)


def _here(recipe: Path, out: Path, **options: Any) -> None:
    pretrain(recipe, out, device="cpu", progress=False, **options)


def _recipe(method: str, folder: Path, teacher: Path) -> Path:
    base, top, tables = RECIPES[method]
    if base == "digits_base":
        base, tables = "digits_mocov3", tables
    path = folder / f"{method}.toml"
    text = RECIPE.format(
        base=base,
        top=top,
        tables=tables.replace("{teacher}", f"run:{teacher}"),
        drop=0.2 if method in ("dino", "supervised") else 0,
    )
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
    ("method", "run"),
    [
        ("mae", "mae"),
        ("mae", "mae accumulated"),
        ("mae", "mae sharded"),
        ("mae", "mae by torchrun"),
        ("moco_v3", "moco_v3"),
        ("dino", "dino"),
        ("supervised", "supervised"),
        ("dmae", "dmae"),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(
    tmp_path: Path, teacher: Path, pairs: Path, method: str, run: str
) -> None:
    recipe = _recipe(method, tmp_path, teacher)
    _here(recipe, tmp_path / "one")
    if run == "mae by torchrun":
        _run(_pretrain(recipe, pairs / run), processes=2)
    one, two = _log(tmp_path / "one"), _log(pairs / run)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-4)
        # A norm follows rounding closely, and an accuracy counts images that may be on the edge.
        assert a == pytest.approx(b, rel=3e-2, abs=6e-3)
    weights = [load_file(p / "encoder.safetensors") for p in (tmp_path / "one", pairs / run)]
    first, second = (torch.cat([t.flatten() for t in w.values()]) for w in weights)
    assert (first - second).norm() < 1e-2 * first.norm()


@pytest.mark.slow
def test_a_sharded_run_resumes_bitwise(pairs: Path) -> None:
    whole, resumed = pairs / "mae sharded", pairs / "mae resumed"
    assert (resumed / "state.pt").exists()
    weights = [(path / "encoder.safetensors").read_bytes() for path in (whole, resumed)]
    assert weights[0] == weights[1]
    assert _log(whole) == _log(resumed)


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
