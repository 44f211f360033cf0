"""Fine-tuning end to end on digits, its budget, resumption, transfer and kept layers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vitprobe as vp
from vitprobe.data.labelled import load_labelled
from vitprobe.data.parts import Arrays, Labelled
from vitprobe.errors import DataError, RecipeError, ResultError, SourceError
from vitprobe.evaluation.finetune import LEAST_UPDATES, Finetune, fitting_batch
from vitprobe.evaluation.layers import Layers
from vitprobe.evaluation.transfer import Transfer
from vitprobe.models import load
from vitprobe.training import Terminated
from vitprobe.training.encoder import EncoderConfig, build_encoder, save_encoder
from vitprobe.training.run import Run

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=24, depth=2, heads=2,
    mean=(0.305,), std=(0.376,), positions="sincos",
)  # fmt: skip
QUICK: dict[str, Any] = {"recipe": "digits_finetune", "device": "cpu", "progress": False}
EPOCHS = {"epochs": 3, "batch_size": 128, "optimizer.lr": 1e-2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("init") / "small.safetensors"
    about = {"architecture": ENCODER.architecture(0), "mean": [0.305], "std": [0.376]}
    save_encoder(build_encoder(ENCODER).state_dict(), path, about)
    return str(path)


def _evaluate(checkpoint: str, out: Path | None, **changes: Any) -> vp.Scores:
    options = {**QUICK, "overrides": EPOCHS, **changes}
    return vp.evaluate("finetune", checkpoint, "digits", out, name="small", **options)


@pytest.fixture(scope="module")
def tuned(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    _evaluate(checkpoint, out)
    return out


def test_a_digits_run_is_above_chance_and_says_what_it_was(checkpoint: str, tuned: Path) -> None:
    (row,) = vp.open_scores(tuned).rows
    assert (row.model, row.spec, row.protocol) == ("small", checkpoint, "finetune")
    assert (row.dataset, row.images, row.metric) == ("digits", 360, "top1")
    assert (row.labels, row.seed, row.kept) == (1.0, 0, None)
    assert row.sha256 == load(checkpoint).sha256
    assert 0.2 < row.low < row.value < row.high < 1
    assert row.settings == {
        "recipe": "digits_finetune", "training_images": 1437, "epochs": 3, "updates": 33,
        "batch": 128, "optimizer.lr": 1e-2,
    }  # fmt: skip


def test_what_was_fine_tuned_stays_and_gives_the_same_score(tuned: Path) -> None:
    assert {path.name for path in tuned.iterdir()} == {
        "recipe.toml", "run.json", "log.jsonl", "encoder.safetensors", "scores.json",
    }  # fmt: skip
    (own,) = vp.evaluate("head", f"run:{tuned}", "digits", device="cpu", progress=False).rows
    assert own.value == vp.open_scores(tuned).rows[0].value
    training = load(f"run:{tuned}").training
    assert training is not None
    assert training["method"] == "finetune"
    assert training["init_sha256"] == vp.open_scores(tuned).rows[0].sha256


def test_a_run_that_was_stopped_goes_on_to_the_bit(
    checkpoint: str, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, out = Run.advance, tmp_path / "run"

    def stopped(self: Run) -> None:
        advance(self)
        if self.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "advance", stopped)
    with pytest.raises(Terminated):
        _evaluate(checkpoint, out)
    assert not (out / "scores.json").exists()
    monkeypatch.setattr(Run, "advance", advance)
    scores = _evaluate(checkpoint, out, resume=True, keep_state=True)
    assert scores.rows == vp.open_scores(tuned).rows
    first, second = (folder / "encoder.safetensors" for folder in (tuned, out))
    assert first.read_bytes() == second.read_bytes()
    assert (out / "state.pt").exists()


def test_what_is_done_is_not_done_again(
    checkpoint: str, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vitprobe.evaluation.finetune.pretrain")
    before = vp.open_scores(tuned).rows
    assert _evaluate(checkpoint, tuned, resume=True).rows == before
    with pytest.raises(RecipeError, match=r"otherwise .*optimizer.lr was 0.01, now 0.02"):
        _evaluate(checkpoint, tuned, resume=True, overrides={**EPOCHS, "optimizer.lr": 2e-2})
    about = json.loads((tuned / "run.json").read_text())
    about["data"]["sha256"] = "other"
    original = (tuned / "run.json").read_text()
    (tuned / "run.json").write_text(json.dumps(about))
    with pytest.raises(RecipeError, match="its training images are others"):
        _evaluate(checkpoint, tuned, resume=True)
    (tuned / "run.json").write_text(original)


def test_few_labels_are_of_every_class(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Labelled] = []

    def pretrain(recipe: Any, out: Any, *, data: Labelled, **_: Any) -> None:
        seen.append(data)
        raise KeyboardInterrupt

    monkeypatch.setattr("vitprobe.evaluation.finetune.pretrain", pretrain)
    for labels in (0.001, 0.02):
        with pytest.raises(KeyboardInterrupt):
            _evaluate(checkpoint, None, labels=labels, overrides={}, seed=3)
    train = load_labelled("digits").train
    for data, images in zip(seen, (10, 29), strict=True):
        assert isinstance(data.train, Arrays)
        assert isinstance(train, Arrays)
        assert data.train.labels is not None
        assert set(data.train.labels) == set(range(10))
        assert abs(len(data.train) - images) <= 2
        # They are images of the set with their own labels.
        places = [
            np.flatnonzero((train.images == image).all(axis=(1, 2, 3)))
            for image in data.train.images
        ]
        assert train.labels is not None
        assert all(
            label in train.labels[place]
            for label, place in zip(data.train.labels, places, strict=True)
        )


def test_options_that_the_spec_does_not_have_are_told(checkpoint: str) -> None:
    model = load(checkpoint, mean=0.5)
    with pytest.raises(
        SourceError, match=r"mean is .0.5. and not .0.305.; write them into the spec"
    ):
        Finetune(**QUICK).resolved(model, "digits", 100)


@pytest.mark.parametrize(
    ("batch", "images", "expected"),
    [
        (256, 60_000, 256),
        (256, 1200, 256),
        (256, 600, 128),
        (256, 120, 32),
        (256, 33, 32),
        (256, 10, 8),
        (96, 120, 48),
        (1024, 12_811, 1024),
        (50, 120, 50),
    ],
)
def test_the_batch_shrinks_with_the_images(batch: int, images: int, expected: int) -> None:
    assert fitting_batch(batch, images) == expected
    assert fitting_batch(batch, images) % 2 == 0


def test_a_shared_batch_stays_even_for_every_process() -> None:
    assert fitting_batch(256, 40, multiple=8) == 32
    assert fitting_batch(256, 10, multiple=8) == 16


def _resolved(checkpoint: str, images: int, **options: Any) -> Any:
    model = load(checkpoint)
    return Finetune(**{**QUICK, **options}).resolved(model, "digits", images)


def test_few_labels_are_trained_on_for_enough_updates(checkpoint: str) -> None:
    whole = _resolved(checkpoint, 1437)
    assert (whole.epochs, whole.batch_size, whole.optimizer.warmup_epochs) == (12, 32, 1)
    few = _resolved(checkpoint, 96)
    assert (few.epochs, few.batch_size) == (-(-LEAST_UPDATES // 3), 32)
    assert few.optimizer.warmup_epochs == pytest.approx(few.epochs / 12)


def test_who_gives_epochs_or_updates_decides(checkpoint: str) -> None:
    given = _resolved(checkpoint, 96, overrides={"epochs": 6})
    assert (given.epochs, given.optimizer.warmup_epochs) == (6, 0.5)
    assert _resolved(checkpoint, 1437, updates=100).epochs == 3
    assert _resolved(checkpoint, 96, updates=100).epochs == 34
    own = {"optimizer.warmup_epochs": 2, "batch_size": 16, "seed": 5}
    own_recipe = _resolved(checkpoint, 96, updates=100, overrides=own)
    assert (own_recipe.batch_size, own_recipe.optimizer.warmup_epochs) == (16, 2)


def test_seed_and_kept_reach_the_recipe(checkpoint: str) -> None:
    recipe = _resolved(checkpoint, 1437, seed=4, kept=1)
    assert (recipe.seed, recipe.method.kept, recipe.method.init) == (4, 1, checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": 3}, "3 blocks cannot be kept of 'small', which has 2"),
        ({"kept": -1}, "kept must be at least 0"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"updates": 5, "overrides": {"epochs": 3}}, "updates or epochs, not both"),
        (
            {"recipe": "digits_supervised"},
            "trains by supervised; give one whose method is finetune",
        ),
        ({"overrides": {"method.kpt": 3}}, "unknown key 'method.kpt'. Did you mean 'kept'"),
        ({"overrides": {"batch_size": 2000}}, "batch_size 2000 is more than the 1437"),
        ({"overrides": {"encoder.heads": 3}}, r"encoder.heads is 3, but that of"),
    ],
)
def test_what_cannot_be_followed_is_named(
    checkpoint: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _evaluate(checkpoint, None, **options)


def test_a_module_in_memory_is_refused() -> None:
    module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=8, depth=1, num_heads=1
    )
    model = vp.wrap(module, name="mine", input_size=(1, 8, 8), mean=0.3, std=0.4)
    with pytest.raises(SourceError, match="'mine' is a module in memory"):
        vp.evaluate("finetune", model, "digits", **QUICK)


def test_data_without_labels_are_refused(checkpoint: str) -> None:
    images = np.zeros((20, 1, 8, 8), np.uint8)
    with pytest.raises(DataError, match="have no labels"):
        vp.evaluate("finetune", checkpoint, (images, None), **QUICK)


def test_ranks_count_the_classes_before_the_right_one(checkpoint: str) -> None:
    labels = np.arange(40) % 25
    values = Finetune(**QUICK).values(labels, labels, 25)
    assert values["top1"].value == 2 / 40
    assert values["top5"].value == 10 / 40
    assert "top5" not in Finetune(**QUICK).values(labels, labels, 10)


def test_transfer_scores_classes_alike_where_their_numbers_differ() -> None:
    labels = np.array([0] * 30 + [1] * 10)
    ranks = np.array([0] * 30 + [0] * 5 + [1] * 5)
    values = Transfer(device="cpu").values(ranks, labels, 2)
    assert values["top1"].value == 35 / 40
    assert values["mean_per_class"].value == 0.75
    # Of the ten images alone: a binomial's spread, halved.
    low, high = values["mean_per_class"].low, values["mean_per_class"].high
    assert (low, high) == pytest.approx((0.75 - 0.15, 0.75 + 0.15), abs=0.051)
    assert set(Transfer(device="cpu").values(ranks[20:], labels[20:], 2)) == {"top1"}


def test_only_published_sets_are_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'digits' is not to be downloaded; give one of cifar10"):
        Transfer(download=True).read("digits")
    with pytest.raises(DataError, match="torchvision cannot download Stanford Cars"):
        Transfer(download=True).read(f"cars:{tmp_path}")


def test_transfer_trains_by_sgd(checkpoint: str) -> None:
    recipe = Transfer(device="cpu").resolved(load(checkpoint), "x", 50_000)
    assert (recipe.optimizer.name, recipe.optimizer.clip_total) == ("sgd", 1.0)
    # The paper's code: 0.1 at a batch of 512.
    assert recipe.optimizer.lr * recipe.batch_size / 256 == pytest.approx(0.1)
    assert recipe.augment.rand_augment == 0
    assert recipe.method.mixup == 0  # type: ignore[attr-defined]


def test_layers_fine_tunes_for_each_number_of_blocks(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "layers"
    options: dict[str, Any] = {
        **QUICK, "overrides": {"epochs": 1, "batch_size": 256}, "keep": (2, 0)
    }  # fmt: skip
    scores = vp.evaluate("layers", checkpoint, "digits", out, **options)
    assert [(row.protocol, row.kept) for row in scores.rows] == [("finetune", 2), ("finetune", 0)]
    assert {path.name for path in out.iterdir()} == {"kept_00", "kept_02", "scores.json"}
    assert vp.open_scores(out / "kept_00").rows == scores.rows[1:]
    monkeypatch.delattr("vitprobe.evaluation.finetune.pretrain")
    (out / "scores.json").unlink()
    assert (
        vp.evaluate("layers", checkpoint, "digits", out, resume=True, **options).rows == scores.rows
    )
    fewer = vp.evaluate("layers", checkpoint, "digits", out, resume=True, **options | {"keep": 2})
    assert fewer.rows == scores.rows


def test_layers_keeps_quarters_unless_told(checkpoint: str) -> None:
    assert [one.kept for one in Layers(**QUICK)._each(load(checkpoint))] == [0, 1, 2]
    with pytest.raises(RecipeError, match="keep must be different numbers of blocks from 0"):
        Layers(keep=(1, 1), **QUICK)
    with pytest.raises(RecipeError, match="takes keep, several numbers, and not kept"):
        Layers(kept=1, **QUICK)
    with pytest.raises(RecipeError, match="3 blocks cannot be kept"):
        vp.evaluate("layers", checkpoint, "digits", keep=(0, 3), **QUICK)


def test_options_are_recorded(tuned: Path) -> None:
    (made,) = vp.open_scores(tuned).provenance
    expected = asdict(Finetune(**QUICK, overrides=EPOCHS))
    assert made["options"] == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "digits_finetun"}, "digits_finetun"),
        ({"overrides": {"epoch": 1}}, "epoch"),
        ({"overrides": {"batch_size": 4096}}, "more than"),
        ({"kept": 9}, "cannot be kept"),
    ],
)
def test_a_slip_costs_no_earlier_evaluation(
    checkpoint: str, tuned: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises((RecipeError, DataError), match=said):
        _evaluate(checkpoint, out, force=True, **changes)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises((RecipeError, DataError), match=said):
        _evaluate(checkpoint, tmp_path / "new", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_resuming_goes_on_with_the_same_protocol_and_checkpoint_alone(
    checkpoint: str, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "knn"
    vp.evaluate("knn", checkpoint, "digits", out, device="cpu", progress=False)
    kept = (out / "scores.json").read_bytes()
    with pytest.raises(ResultError, match="holds scores by knn, and finetune cannot go on"):
        _evaluate(checkpoint, out, resume=True)
    assert (out / "scores.json").read_bytes() == kept

    other = tmp_path / "small.safetensors"
    torch.manual_seed(1)
    about = {"architecture": ENCODER.architecture(0), "mean": [0.305], "std": [0.376]}
    save_encoder(build_encoder(ENCODER).state_dict(), other, about)
    done = tmp_path / "run"
    shutil.copytree(tuned, done)
    recipe = done / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(checkpoint, str(other)))
    with pytest.raises(RecipeError, match="its checkpoint was another"):
        _evaluate(str(other), done, resume=True)


def test_a_seed_of_the_recipe_is_that_of_the_score(checkpoint: str) -> None:
    (row,) = _evaluate(checkpoint, None, overrides=EPOCHS | {"epochs": 1, "seed": 7}).rows
    assert row.seed == 7
