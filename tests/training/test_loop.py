"""The loop: what a run leaves behind, exact resumption, refusals."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import (
    CheckpointError,
    DataError,
    LoggerError,
    RecipeError,
    ResultError,
    VitprobeError,
)
from vitprobe.training import Recipe, Terminated, load_recipe, pretrain
from vitprobe.training.methods.supervised import Supervised
from vitprobe.training.run import Run

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


def _small(method: str, **changes: Any) -> Recipe:
    recipe, own = CHANGES[method]
    return load_recipe(recipe, overrides=SMALL | own | changes)


@pytest.fixture(scope="module", autouse=True)
def _teacher(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the distilled run learns from: another width, other heads."""
    folder = tmp_path_factory.mktemp("teacher")
    wider = SMALL | {"encoder.width": 24, "encoder.heads": 3, "epochs": 1}
    pretrain("digits_mae", folder / "run", overrides=wider, device="cpu", progress=False)
    CHANGES["dmae"][1]["distill.teacher"] = f"run:{folder / 'run'}"


def _train(method: str, out: Path, **options: Any) -> Path:
    return pretrain(_small(method), out, device="cpu", progress=False, **options)


def _log(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def _assert_same_run(a: Path, b: Path) -> None:
    assert (a / "encoder.safetensors").read_bytes() == (b / "encoder.safetensors").read_bytes()
    assert _log(a) == _log(b)
    state_a, state_b = (torch.load(x / "state.pt", weights_only=True) for x in (a, b))
    assert state_a["step"] == state_b["step"]
    for name, tensor in state_a["method"].items():
        assert torch.equal(tensor, state_b["method"][name]), name
    for number, moments in state_a["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, state_b["optimizer"]["state"][number][name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One uninterrupted run of each method."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        _train(method, folder / method)
    return {method: folder / method for method in METHODS}


def test_a_run_leaves_its_recipe_log_state_and_encoder(whole: dict[str, Path]) -> None:
    for method, out in whole.items():
        names = {path.name for path in out.iterdir()}
        assert names - {"pictures"} == {
            "recipe.toml", "run.json", "log.jsonl", "state.pt", "state.previous.pt",
            "encoder.safetensors",
        }  # fmt: skip
        assert ("pictures" in names) == (method in ("mae", "dmae"))
        assert load_recipe(out / "recipe.toml") == _small(method)
        lines = _log(out)
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert [line["step"] for line in lines] == [STEPS_PER_EPOCH * i for i in (1, 2, 3)]
        if method != "dino":  # whose target moves, and sharpens as it warms up
            assert lines[-1]["loss"] < lines[0]["loss"]


def test_test_accuracy_is_logged_when_due_and_at_the_end(whole: dict[str, Path]) -> None:
    due = ["test_accuracy" in line for line in _log(whole["supervised"])]
    assert due == [False, True, True]
    assert not any("test_accuracy" in line for line in _log(whole["mae"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_timms_and_says_where_it_comes_from(
    whole: dict[str, Path], method: str
) -> None:
    path, recipe = whole[method] / "encoder.safetensors", _small(method)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["vitprobe"])
    assert metadata["method"] == {"dmae": "mae"}.get(method, method)
    assert ("teacher_sha256" in metadata) == (method == "dmae")
    assert metadata["recipe"] == recipe.to_dict()
    assert (metadata["seed"], metadata["epochs"]) == (0, 3)
    assert (metadata["mean"], metadata["std"]) == (list(recipe.encoder.mean), [0.376])
    assert metadata["metrics"]["loss"] == _log(whole[method])[-1]["loss"]
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
            _train(method, out)
    assert not (out / "encoder.safetensors").exists()
    # A different generator state must not matter.
    torch.manual_seed(99)
    _train(method, out, resume=True)
    _assert_same_run(out, whole[method])


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
            _train(method, out)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(out / "state.pt", weights_only=True)["step"] == step
    _train(method, out, resume=True)
    _assert_same_run(out, whole[method])


def test_epochs_logged_after_the_last_state_are_not_logged_twice(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, advance = _small("mae", save_every=2), Run.advance

    def killed(run: Run) -> None:
        if run.step == STEPS_PER_EPOCH + 1:
            raise KeyboardInterrupt
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "run", device="cpu", progress=False)
    assert len(_log(tmp_path / "run")) == 1
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "ep')
    pretrain(recipe, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert _log(tmp_path / "run") == _log(whole["mae"])


def test_resuming_a_finished_run_changes_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    _train("mae", tmp_path / "run")
    _train("mae", tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole["mae"])


def test_the_global_generator_is_left_alone_and_the_seed_decides(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    other = pretrain(
        _small("mae", seed=1, epochs=1), tmp_path / "run", device="cpu", progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    names = ("blocks.0.attn.qkv.weight", "cls_token")
    ours, theirs = load_file(whole["mae"] / "encoder.safetensors"), load_file(other)
    assert not any(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_run_in_another_thread_needs_no_signals(tmp_path: Path) -> None:
    thread = threading.Thread(target=_train, args=("mae", tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match="exists; resume it"):
        _train("mae", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_force_replaces_the_run_and_nothing_else(whole: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "log.jsonl").write_text("old\n")
    _train("mae", tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    _assert_same_run(tmp_path, whole["mae"])


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(ResultError, match="file"):
            _train("mae", tmp_path / "file", force=force)
    with pytest.raises(ResultError, match="Cannot write to"):
        _train("mae", tmp_path / "file" / "run")


def test_resuming_what_was_never_started_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No training state"):
        _train("mae", tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resuming_under_another_recipe_names_the_difference(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.lr was 0\.016, now 0\.5"):
        pretrain(_small("mae", **{"optimizer.lr": 0.5}), whole["mae"], resume=True, device="cpu")
    with pytest.raises(RecipeError, match=r"method\.name was 'mae', now 'supervised'"):
        pretrain(_small("supervised"), whole["mae"], resume=True, device="cpu")


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    _train("mae", tmp_path / "run")
    for name in ("state.pt", "state.previous.pt"):
        state = tmp_path / "run" / name
        state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*nor can the one before"):
        _train("mae", tmp_path / "run", resume=True)


def test_a_damaged_last_state_falls_back_to_the_one_before_and_says_so(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    _train("mae", out)
    content = bytearray((out / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "state.pt").write_bytes(content)
    pretrain(_small("mae"), out, device="cpu", resume=True)
    assert "state.pt is damaged" in (said := capsys.readouterr().err)
    assert "going on from state.previous.pt" in said
    _assert_same_run(out, whole["mae"])


def test_a_state_that_is_not_this_methods_is_refused(tmp_path: Path) -> None:
    _train("mae", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    (tmp_path / "run" / "state.previous.pt").unlink()
    for broken in ({**state, "method": {}}, {"step": 3}, [1]):
        torch.save(broken, tmp_path / "run" / "state.pt")
        with pytest.raises(CheckpointError, match="not a training state of this recipe"):
            _train("mae", tmp_path / "run", resume=True)


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
        _train("supervised", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == STEPS_PER_EPOCH
    assert all(tensor.isfinite().all() for tensor in state["method"].values())


def test_a_loss_that_is_not_finite_at_once_is_not_blamed_on_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_from(0, monkeypatch)
    with pytest.raises(RecipeError, match=r"at step 0 .* no learning rate is to blame"):
        _train("supervised", tmp_path / "run")


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
    pretrain(_small("mae", epochs=1), tmp_path / "run", device="cpu", progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_starts_from_the_same_weights_and_learns_the_same(tmp_path: Path) -> None:
    recipe = _small("mae", epochs=1, precision="fp32")
    losses = []
    for device in ("cpu", "cuda"):
        pretrain(recipe, tmp_path / device, device=device, progress=False)
        losses.append(_log(tmp_path / device)[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_no_epochs_leave_the_untrained_start(tmp_path: Path) -> None:
    first = pretrain("digits_mae", tmp_path / "a", overrides={"epochs": 0}, progress=False)
    trained = load_recipe("digits_mae", overrides={"epochs": 1})
    start = Run(trained, load_labelled("digits"), torch.device("cpu")).method.encoder.state_dict()
    with safe_open(first, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), start[name]) for name in start)
        assert json.loads(file.metadata()["vitprobe"])["metrics"] == {}


def test_resuming_with_another_teacher_is_refused(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    for seed in (0, 1):
        changes = SMALL | {"epochs": 0, "seed": seed}
        pretrain("digits_mae", teacher, overrides=changes, force=True, progress=False, device="cpu")
        recipe = _small("dmae", **{"distill.teacher": f"run:{teacher}", "epochs": 1})
        if seed == 0:
            pretrain(recipe, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(RecipeError, match="teacher's weights are not those"):
        pretrain(recipe, tmp_path / "run", device="cpu", progress=False, resume=True)


def test_an_odd_share_cannot_be_mixed(tmp_path: Path) -> None:
    recipe = _small("supervised", batch_size=250, accumulate=2)
    with pytest.raises(RecipeError, match="each process works on 125 at a time"):
        pretrain(recipe, tmp_path / "run", device="cpu", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_and_recomputed_blocks_learn_the_same(tmp_path: Path, method: str) -> None:
    losses = []
    for name, change in (("plain", {}), ("both", {"compile": "blocks", "recompute": True})):
        recipe = _small(method, epochs=1, **change)
        pretrain(recipe, tmp_path / name, device="cpu", progress=False)
        losses.append(_log(tmp_path / name)[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    execution = json.loads((tmp_path / "both" / "run.json").read_text())["execution"]
    assert execution["compile"] == "blocks"


def test_resume_without_its_log_is_refused(tmp_path: Path) -> None:
    overrides = {"epochs": 1, "batch_size": 256}
    pretrain("digits_mae", tmp_path / "a", overrides=overrides, progress=False)
    (tmp_path / "a" / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="has lines for 0 of the 1 epochs"):
        pretrain("digits_mae", tmp_path / "a", overrides=overrides, resume=True, progress=False)


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
            _train("mae", tmp_path / "run")
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 7
    _train("mae", tmp_path / "run", resume=True)
    _assert_same_run(tmp_path / "run", whole["mae"])


def test_a_directory_where_a_run_is_at_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train("mae", tmp_path / "run")
    advance, said = Run.advance, []

    def second(run: Run) -> None:
        if run.step == 1:
            for options in ({"resume": True}, {"force": True}):
                with pytest.raises(ResultError, match="Another run is at work") as refusal:
                    _train("mae", tmp_path / "run", **options)
                said.append(refusal)
        advance(run)

    monkeypatch.setattr(Run, "advance", second)
    _train("mae", tmp_path / "run", force=True)
    assert len(said) == 2


def test_a_logger_that_is_not_there_costs_no_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _train("mae", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    for option in ({"force": True}, {}):
        with pytest.raises(LoggerError, match="'wandb' needs a package"):
            _train("mae", tmp_path / ("run" if option else "new"), loggers=["wandb"], **option)
    assert encoder.exists()
    assert not (tmp_path / "new").exists()


def test_held_out_images_without_labels_are_not_scored(tmp_path: Path) -> None:
    digits = load_labelled("digits")
    assert digits.test is not None
    bare = replace(digits, test=replace(digits.test, labels=None))
    pretrain(_small("supervised", epochs=1, knn=5), tmp_path / "run", data=bare, device="cpu")
    assert not {"test_accuracy", "knn_accuracy"} & _log(tmp_path / "run")[-1].keys()
