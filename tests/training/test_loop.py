"""The loop: what a run leaves behind, refusals."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_for_tests import METHODS, STEPS_PER_EPOCH, assert_same_run, log_of, small, train
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import (
    DataError,
    LoggerError,
    RecipeError,
    ResultError,
    VitprobeError,
)
from vitprobe.training import load_recipe, pretrain
from vitprobe.training.methods.supervised import Supervised
from vitprobe.training.run import Run

pytestmark = pytest.mark.usefixtures("small_teacher")


def test_a_run_leaves_its_recipe_log_state_and_encoder(whole: dict[str, Path]) -> None:
    for method, out in whole.items():
        names = {path.name for path in out.iterdir()}
        assert names - {"pictures"} == {
            "recipe.toml", "run.json", "log.jsonl", "state.pt", "state.previous.pt",
            "encoder.safetensors",
        }  # fmt: skip
        assert ("pictures" in names) == (method in ("mae", "dmae"))
        assert load_recipe(out / "recipe.toml") == small(method)
        lines = log_of(out)
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert [line["step"] for line in lines] == [STEPS_PER_EPOCH * i for i in (1, 2, 3)]
        if method != "dino":  # whose target moves, and sharpens as it warms up
            assert lines[-1]["loss"] < lines[0]["loss"]


def test_test_accuracy_is_logged_when_due_and_at_the_end(whole: dict[str, Path]) -> None:
    due = ["test_accuracy" in line for line in log_of(whole["supervised"])]
    assert due == [False, True, True]
    assert not any("test_accuracy" in line for line in log_of(whole["mae"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_timms_and_says_where_it_comes_from(
    whole: dict[str, Path], method: str
) -> None:
    path, recipe = whole[method] / "encoder.safetensors", small(method)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["vitprobe"])
    assert metadata["method"] == {"dmae": "mae"}.get(method, method)
    assert ("teacher_sha256" in metadata) == (method == "dmae")
    assert metadata["recipe"] == recipe.to_dict()
    assert (metadata["seed"], metadata["epochs"]) == (0, 3)
    assert (metadata["mean"], metadata["std"]) == (list(recipe.encoder.mean), [0.376])
    assert metadata["metrics"]["loss"] == log_of(whole[method])[-1]["loss"]
    model = VisionTransformer(**metadata["architecture"])
    model.load_state_dict(load_file(path))
    assert model.num_classes == (10 if method == "supervised" else 0)
    assert isinstance(model.norm, torch.nn.LayerNorm)


def test_the_logged_accuracy_is_that_of_the_reloaded_encoder(whole: dict[str, Path]) -> None:
    path = whole["supervised"] / "encoder.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["vitprobe"])
    model = VisionTransformer(**metadata["architecture"]).eval()
    model.load_state_dict(load_file(path))
    digits = load_labelled("digits")
    assert digits.test is not None
    images = (torch.from_numpy(digits.test.images) - metadata["mean"][0]) / 0.376
    hits = model(images).argmax(dim=1) == torch.from_numpy(digits.test.labels)
    assert metadata["metrics"]["test_accuracy"] == pytest.approx(hits.float().mean().item())


def test_the_global_generator_is_left_alone_and_the_seed_decides(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    other = pretrain(small("mae", seed=1, epochs=1), tmp_path / "run", device="cpu", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    names = ("blocks.0.attn.qkv.weight", "cls_token")
    ours, theirs = load_file(whole["mae"] / "encoder.safetensors"), load_file(other)
    assert not any(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_run_in_another_thread_needs_no_signals(tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=("mae", tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match="exists; resume it"):
        train("mae", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_the_run_and_nothing_else(whole: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "log.jsonl").write_text("old\n")
    train("mae", tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_same_run(tmp_path, whole["mae"])


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(ResultError, match="file"):
            train("mae", tmp_path / "file", force=force)
    with pytest.raises(ResultError, match="Cannot write to"):
        train("mae", tmp_path / "file" / "run")


def _fail_from(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the supervised loss be nan from an epoch on."""
    loss = Supervised.loss

    def failing(method: Supervised, batch: Any) -> Any:
        value, terms = loss(method, batch)
        return (value * float("nan") if batch.draws.epoch >= epoch else value), terms

    monkeypatch.setattr(Supervised, "loss", failing)


def test_a_loss_that_is_not_finite_names_the_step_and_terms_and_keeps_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_from(1, monkeypatch)
    message = (
        rf"supervised loss or its gradient is not finite at step {STEPS_PER_EPOCH} "
        rf"\(loss nan, accuracy 0\..*state\.pt holds step {STEPS_PER_EPOCH}\. Resumed as it is"
    )
    with pytest.raises(RecipeError, match=message):
        train("supervised", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == STEPS_PER_EPOCH
    assert all(tensor.isfinite().all() for tensor in state["method"].values())


def test_a_loss_that_is_not_finite_at_once_is_not_blamed_on_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_from(0, monkeypatch)
    with pytest.raises(RecipeError, match=r"at step 0 .* no learning rate is to blame"):
        train("supervised", tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"batch_size": 2000}, RecipeError, "batch_size 2000 is more than the 1437 training"),
        ({"data": "nowhere"}, DataError, "'nowhere'"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(
    tmp_path: Path, overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pretrain("digits_mae", tmp_path / "run", overrides=overrides, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(VitprobeError, match=f"device '{device}' is not to be had"):
        pretrain("digits_mae", tmp_path / "run", device=device)


def test_progress_goes_to_stderr_or_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(small("mae", epochs=1), tmp_path / "run", device="cpu", progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_starts_from_the_same_weights_and_learns_the_same(tmp_path: Path) -> None:
    recipe = small("mae", epochs=1, precision="fp32")
    losses = []
    for device in ("cpu", "cuda"):
        pretrain(recipe, tmp_path / device, device=device, progress=False)
        losses.append(log_of(tmp_path / device)[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_no_epochs_leave_the_untrained_start(tmp_path: Path) -> None:
    first = pretrain("digits_mae", tmp_path / "a", overrides={"epochs": 0}, progress=False)
    trained = load_recipe("digits_mae", overrides={"epochs": 1})
    start = Run(trained, load_labelled("digits"), torch.device("cpu")).method.encoder.state_dict()
    with safe_open(first, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), start[name]) for name in start)
        assert json.loads(file.metadata()["vitprobe"])["metrics"] == {}


def test_an_odd_share_cannot_be_mixed(tmp_path: Path) -> None:
    recipe = small("supervised", batch_size=250, accumulate=2)
    with pytest.raises(RecipeError, match="each process works on 125 at a time"):
        pretrain(recipe, tmp_path / "run", device="cpu", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_and_recomputed_blocks_learn_the_same(tmp_path: Path, method: str) -> None:
    losses = []
    for name, change in (("plain", {}), ("both", {"compile": "blocks", "recompute": True})):
        recipe = small(method, epochs=1, **change)
        pretrain(recipe, tmp_path / name, device="cpu", progress=False)
        losses.append(log_of(tmp_path / name)[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    execution = json.loads((tmp_path / "both" / "run.json").read_text())["execution"]
    assert execution["compile"] == "blocks"


def test_threads_are_the_recipes_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Run, "advance", lambda self: seen.append(torch.get_num_threads()) or 1 / 0)
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        pretrain("digits_mae", tmp_path / "a", progress=False)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_a_directory_where_a_run_is_at_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("mae", tmp_path / "run")
    advance, said = Run.advance, []

    def second(run: Run) -> None:
        if run.step == 1:
            for options in ({"resume": True}, {"force": True}):
                with pytest.raises(ResultError, match="Another run is at work") as refusal:
                    train("mae", tmp_path / "run", **options)
                said.append(refusal)
        advance(run)

    monkeypatch.setattr(Run, "advance", second)
    train("mae", tmp_path / "run", force=True)
    assert len(said) == 2


def test_a_logger_that_is_not_there_costs_no_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = train("mae", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    for option in ({"force": True}, {}):
        with pytest.raises(LoggerError, match="'wandb' needs a package"):
            train("mae", tmp_path / ("run" if option else "new"), loggers=["wandb"], **option)
    assert encoder.exists()
    assert not (tmp_path / "new").exists()


def test_held_out_images_without_labels_are_not_scored(tmp_path: Path) -> None:
    digits = load_labelled("digits")
    assert digits.test is not None
    bare = replace(digits, test=replace(digits.test, labels=None))
    pretrain(small("supervised", epochs=1, knn=5), tmp_path / "run", data=bare, device="cpu")
    assert not {"test_accuracy", "knn_accuracy"} & log_of(tmp_path / "run")[-1].keys()
