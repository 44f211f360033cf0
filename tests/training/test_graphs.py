"""Replayed passes: the same as ordinary ones, or found out. Recording itself needs CUDA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import RecipeError
from vitprobe.training import Recipe, engine, load_recipe, pretrain
from vitprobe.training.engine import Engine
from vitprobe.training.graphs import Replayed, tried
from vitprobe.training.methods import Method
from vitprobe.training.run import Run, build_method

SMALL: dict[str, Any] = {
    "epochs": 2, "batch_size": 128, "evaluate_every": 9, "encoder.image_size": 8,
    "encoder.width": 16, "encoder.depth": 2, "encoder.heads": 2,
}  # fmt: skip
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("digits_mae", {}),
    "supervised": ("digits_supervised", {"method.mixup": 0.2, "encoder.drop_path": 0.3}),
    "moco_v3": ("digits_mocov3", {"method.hidden_width": 16, "method.projection_width": 8}),
    "dmae": ("digits_dmae", {"distill.hidden": 0.5}),
}
METHODS = list(CHANGES)
CPU = torch.device("cpu")
Function = Callable[[], dict[str, Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("teacher") / "run"
    wider = SMALL | {"encoder.width": 24, "encoder.heads": 3, "epochs": 0}
    pretrain("digits_mae", run, overrides=wider, device="cpu", progress=False)
    CHANGES["dmae"][1]["distill.teacher"] = f"run:{run}"


def _small(method: str, **changes: Any) -> Recipe:
    recipe, own = CHANGES[method]
    return load_recipe(recipe, overrides=SMALL | own | changes)


class Recordings:
    """What a CUDA graph does, without one: nothing is computed while it is recorded, and a replay
    overwrites what the recorded pass left.

    fault: what goes wrong with a replay. made: how many recordings.
    """

    def __init__(self, method: Method, fault: str = "") -> None:
        self.method, self.fault, self.made = method, fault, 0

    def __call__(self, function: Function) -> tuple[dict[str, Tensor], Callable[[], None]]:
        self.made += 1
        if self.fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        parameters = list(self.method.parameters())
        assert all(p.grad is None for p in parameters), "each replay would add to these"
        buffers = self._buffers()
        outputs = function()
        self._set(buffers)
        kept = [p.grad for p in parameters]
        if self.fault != "stale":
            for tensor in (*outputs.values(), *(k for k in kept if k is not None)):
                tensor.fill_(torch.nan)
        weights = [p.detach().clone() for p in parameters]

        def replay() -> None:
            if self.fault == "stale":
                return
            buffers = self._buffers()
            if self.fault == "old weights":
                now = [p.detach().clone() for p in parameters]
                _copy(parameters, weights)
            self.method.zero_grad(set_to_none=True)
            for name, term in function().items():
                outputs[name].copy_(term)
            for gradient, p in zip(kept, parameters, strict=True):
                if gradient is not None and p.grad is not None:
                    doubled = 2 if self.fault == "added twice" else 1
                    gradient.copy_(doubled * p.grad)
            if self.fault == "old weights":
                _copy(parameters, now)
            if self.fault == "no statistics":
                self._set(buffers)

        return outputs, replay

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.method.buffers()]

    def _set(self, values: list[Tensor]) -> None:
        _copy(list(self.method.buffers()), values)


@torch.no_grad()
def _copy(tensors: list[Any], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _trial(
    name: str, fault: str = "", adapt: Callable[[Replayed], None] | None = None
) -> tuple[str, Method]:
    recipe = _small(name)
    method = build_method(recipe, 10).train()
    ordinary = Engine(method, recipe, CPU)._ordinary_pass
    replayed = Replayed(method, ordinary, Recordings(method, fault))
    if adapt is not None:
        adapt(replayed)
    return tried(method, ordinary, replayed, recipe, CPU), method


@pytest.mark.parametrize("name", METHODS)
def test_a_true_replay_passes_its_trial_which_leaves_no_trace(name: str) -> None:
    reason, method = _trial(name)
    assert reason == ""
    untouched = build_method(_small(name), 10).state_dict()
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, untouched[key]), key
    assert all(parameter.grad is None for parameter in method.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_replays_train_as_ordinary_passes_do(name: str) -> None:
    runs = [Run(_small(name), load_labelled("digits"), CPU) for _ in range(2)]
    recordings = Recordings(runs[1].method)
    runs[1].engine._pass = Replayed(runs[1].method, runs[1].engine._ordinary_pass, recordings)
    lines = []
    for run in runs:
        while run.step < run.steps:
            run.advance()
            if run.step % run.steps_per_epoch == 0:
                lines.append({k: v for k, v in run.log_line().items() if k != "images_per_s"})
    assert lines[:2] == lines[2:]
    ordinary, replayed = (run.method.state_dict() for run in runs)
    assert all(torch.equal(ordinary[key], replayed[key]) for key in ordinary)
    # The number of the epoch is part of the random numbers, and so of a recording.
    assert recordings.made == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", "RuntimeError: operation not permitted when stream is capturing"),
        ("stale", "its "),
        ("old weights", "its "),
        ("added twice", "its gradient of "),
        ("no statistics", "running_mean differs"),
    ],
)
def test_a_false_replay_is_found_out(fault: str, said: str) -> None:
    reason, method = _trial("moco_v3", fault)
    assert said in reason
    assert "\n" not in reason
    untouched = build_method(_small("moco_v3"), 10).state_dict()
    assert all(torch.equal(t, untouched[k]) for k, t in method.state_dict().items())


def _recorded_once(replayed: Replayed) -> None:
    start = replayed._start
    seen: list[None] = []

    def once(batch: Any) -> None:
        if not seen:
            seen.append(start(batch))

    replayed._start = once  # type: ignore[method-assign]


def _inputs_elsewhere(replayed: Replayed) -> None:
    start = replayed._start

    def lost(batch: Any) -> None:
        start(batch)
        replayed._inputs = [torch.empty_like(tensor) for tensor in replayed._inputs]

    replayed._start = lost  # type: ignore[method-assign]
    _recorded_once(replayed)


@pytest.mark.parametrize("name", METHODS)
def test_inputs_that_do_not_reach_the_graph_are_found_out(name: str) -> None:
    assert _trial(name, adapt=_inputs_elsewhere)[0].startswith("its ")


@pytest.mark.parametrize("name", ["mae", "supervised"])
def test_random_numbers_of_the_epoch_before_are_found_out(name: str) -> None:
    assert _trial(name, adapt=_recorded_once)[0].startswith("its ")


def test_a_recording_holds_where_no_random_numbers_are_drawn() -> None:
    assert _trial("moco_v3", adapt=_recorded_once)[0] == ""


def test_gradients_that_are_left_over_are_not_added_to() -> None:
    recipe = _small("mae")
    run = Run(recipe, load_labelled("digits"), CPU)
    ordinary = run.engine._ordinary_pass
    batch = next(run._epoch_from(0))
    gradients = []
    for compute in (ordinary, Replayed(run.method, ordinary, Recordings(run.method))):
        compute(batch)
        gradients.append([p.grad for p in run.method.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_epoch_that_cannot_be_recorded_stops_the_run() -> None:
    recipe = _small("mae")
    run = Run(recipe, load_labelled("digits"), CPU)
    recordings = Recordings(run.method)
    run.engine._pass = Replayed(run.method, run.engine._ordinary_pass, recordings)
    for _ in range(run.steps_per_epoch):
        run.advance()
    recordings.fault = "raises"
    with pytest.raises(RecipeError, match=r"Epoch 1 could not be recorded .*capturing\); resume"):
        run.advance()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recompute": True}, "recompute saves and restores random states"),
        ({"accumulate": 2}, "a graph would overwrite gradients"),
    ],
)
def test_what_graphs_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    _small("mae", **changes)
    with pytest.raises(RecipeError, match=f'compile = "graphs" cannot be had: .*{said}'):
        _small("mae", compile="graphs", **changes)


def test_dino_is_refused() -> None:
    with pytest.raises(RecipeError, match="DINO keeps its teacher's temperature"):
        load_recipe("fashion_dino", overrides={"compile": "graphs"})


def test_other_devices_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _small("mae", compile="graphs")
    method = build_method(recipe, 10)
    with pytest.raises(RecipeError, match="needs CUDA, but this is cpu"):
        Engine(method, recipe, CPU)
    monkeypatch.setattr(engine.distributed, "world_size", lambda: 2)
    with pytest.raises(RecipeError, match="is for one process"):
        Engine(method, recipe, torch.device("cuda"))


def test_graphs_are_never_taken_by_themselves() -> None:
    recipe = _small("mae")
    assert recipe.compile == "auto"
    assert not isinstance(Engine(build_method(recipe, 10), recipe, CPU)._pass, Replayed)


@pytest.mark.parametrize(("reason", "compiled"), [("", "graphs"), ("it differs", "blocks")])
def test_the_engine_takes_graphs_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, reason: str, compiled: str
) -> None:
    monkeypatch.setattr(engine, "_compile", lambda *_: "")
    monkeypatch.setattr(engine, "tried", lambda *_: reason)
    recipe = _small("mae", compile="graphs", precision="fp32")
    built = Engine(build_method(recipe, 10), recipe, torch.device("cuda"))
    assert built.execution.compile == compiled
    assert isinstance(built._pass, Replayed) == (compiled == "graphs")
    said = ["CUDA graphs failed their trial (it differs); running without"]
    assert built.notes == ([] if compiled == "graphs" else said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_that_cannot_record_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _small("mae", compile="graphs", precision="fp32")
    method = build_method(recipe, 10)
    monkeypatch.setattr(engine, "_compile", lambda *_: "")
    built = Engine(method, recipe, torch.device("cuda"))
    assert built.notes[0].startswith("CUDA graphs failed their trial (")
    assert built.execution.compile == "blocks"
    monkeypatch.undo()
    built = Engine(method, recipe, torch.device("cuda"))
    assert built.notes[0].endswith("running without it and CUDA graphs")
    assert built.execution.compile == "off"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "precision"), [("mae", "bf16"), *((method, "fp32") for method in METHODS)]
)
def test_graphs_on_a_gpu_train_as_blocks_do(tmp_path: Path, name: str, precision: str) -> None:
    losses = []
    for compiled in ("blocks", "graphs"):
        out = tmp_path / compiled
        recipe = _small(name, compile=compiled, precision=precision)
        pretrain(recipe, out, device="cuda", progress=False)
        assert json.loads((out / "run.json").read_text())["execution"]["compile"] == compiled
        log = (out / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "fp32" else 1e-2)
