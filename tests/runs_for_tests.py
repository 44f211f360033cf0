"""Runs of seconds of every method, and how two are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vitprobe.training import Recipe, load_recipe, pretrain

SMALL: dict[str, Any] = {
    "epochs": 3, "batch_size": 256, "save_every": 1, "evaluate_every": 2, "encoder.image_size": 8,
    "encoder.width": 16, "encoder.depth": 2, "encoder.heads": 2,
}  # fmt: skip
STEPS_PER_EPOCH = 1437 // 256
DINO: dict[str, Any] = {
    "method": {
        "name": "dino", "prototypes": 16, "hidden_width": 16, "bottleneck_width": 8,
        "warmup_teacher_epochs": 1,
    },
    "views": [{"blur": 0.5}, {}, {"size": 4, "count": 2, "crop_scale": [0.1, 0.4]}],
    "optimizer.final_weight_decay": 0.4, "optimizer.clip": 1.0, "encoder.drop_path": 0.1,
}  # fmt: skip
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("digits_mae", {}),
    "supervised": ("digits_supervised", {"method.mixup": 0.2, "encoder.drop_path": 0.1}),
    "moco_v3": (
        "digits_mocov3", {"method.hidden_width": 16, "method.projection_width": 8},
    ),
    "dino": ("digits_mocov3", DINO),
    "dmae": ("digits_dmae", {"distill.hidden": 0.5}),
}  # fmt: skip
METHODS = list(CHANGES)


def small(method: str, **changes: Any) -> Recipe:
    """The recipe of a method, cut down to seconds; `small_teacher` must have been asked for."""
    recipe, own = CHANGES[method]
    return load_recipe(recipe, overrides=SMALL | own | changes)


def train(method: str, out: Path, **options: Any) -> Path:
    return pretrain(small(method), out, device="cpu", progress=False, **options)


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "encoder.safetensors").read_bytes() == (b / "encoder.safetensors").read_bytes()
    assert log_of(a) == log_of(b)
    state_a, state_b = (torch.load(x / "state.pt", weights_only=True) for x in (a, b))
    assert state_a["step"] == state_b["step"]
    for name, tensor in state_a["method"].items():
        assert torch.equal(tensor, state_b["method"][name]), name
    for number, moments in state_a["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, state_b["optimizer"]["state"][number][name]), name
