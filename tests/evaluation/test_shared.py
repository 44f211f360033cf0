"""Fine-tuning by processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitprobe as vp
from vitprobe.training.encoder import EncoderConfig, build_encoder, save_encoder

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=24, depth=2, heads=2,
    mean=(0.305,), std=(0.376,), positions="sincos",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "small.safetensors"
    about = {"architecture": ENCODER.architecture(0), "mean": [0.305], "std": [0.376]}
    save_encoder(build_encoder(ENCODER).state_dict(), path, about)
    out = tmp_path / "layers"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "vitprobe", "evaluate", "layers", str(path), "--data", "digits", "--device", "cpu"),
        *("--recipe", "digits_finetune", "--keep", "0", "2", "--out", str(out)),
        *("--set", "epochs=2", "batch_size=128", "threads=1"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "scores.json")
    together = vp.open_scores(out)
    alone = vp.evaluate(
        "layers", str(path), "digits", recipe="digits_finetune", keep=(0, 2), device="cpu",
        overrides={"epochs": 2, "batch_size": 128, "threads": 1}, progress=False,
    )  # fmt: skip
    assert [row.kept for row in together.rows] == [0, 2]
    for ours, theirs in zip(together.rows, alone.rows, strict=True):
        # Sums are taken in another order: a few images near the boundary may change sides.
        assert abs(ours.value - theirs.value) < 0.03
