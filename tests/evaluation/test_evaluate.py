"""`vp.evaluate`: known answers through every protocol on features, folders, and clear errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import vitprobe as vp
from vitprobe.data.parts import Arrays, Labelled
from vitprobe.errors import CheckpointError, DataError, MeasureError, ResultError, VitprobeError
from vitprobe.evaluation import features as features_module
from vitprobe.evaluation.features import extract, parse_choice


def marked(n: int, classes: int, seed: int, strength: float = 0.35) -> Arrays:
    """Noise in which class j brightens the j-th of the image's rows of patches, somewhat."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = squares(n, seed=seed).numpy() * 0.6
    for image, label in zip(images, labels, strict=True):
        image[:, 8 * label : 8 * label + 8] += strength * generator.uniform(0, 1)
    return Arrays(images.clip(0, 1).astype(np.float32), labels.astype(np.int64))


@pytest.fixture(scope="module")
def data() -> Labelled:
    return Labelled("marks", marked(160, 4, 0), marked(80, 4, 1), ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def model():
    return tiny(depth=2)


def headed():
    model = tiny(depth=2)
    model.module.reset_classifier(4)
    with torch.no_grad():
        model.module.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.module.head.bias.zero_()
    return model


def cramped(most):
    """A model whose last block has no room for more than so many images, and what it was given."""
    model = headed()
    given = []

    def check(module, args):
        given.append(len(args[0]))
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.module.blocks[-1].register_forward_pre_hook(check)
    return model, given


def banks_of(model, data, text):
    choice = parse_choice(text, model)
    banks = extract(
        model,
        [(data.train, None), (data.test, None)],
        [choice],
        batch_size=64,
        device=torch.device("cpu"),
        precision="fp32",
        workers=1,
        progress=False,
    )
    return [bank[choice].double().numpy() for bank in banks]


def test_knn_is_scikit_learns(model, data):
    train, test = banks_of(model, data, "cls")
    for k, temperature in ((1, 0.07), (20, 0.07), (7, 0.5)):
        (row,) = vp.evaluate("knn", model, data, k=k, temperature=temperature).rows
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        ).fit(train, data.train.labels)
        assert row.value == theirs.score(test, data.test.labels)
        assert row.low < row.value < row.high
        assert row.settings == {"features": "cls", "k": k, "temperature": temperature}


def test_linear_is_scikit_learns(model, data):
    train, test = banks_of(model, data, "cls+mean")
    (row,) = vp.evaluate("linear", model, data, features="cls+mean", l2=1e-2).rows
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=1 / (160 * 1e-2), max_iter=2000)
    theirs.fit(scaler.transform(train), data.train.labels)
    assert 0.3 < row.value < 1
    assert row.value == pytest.approx(theirs.score(scaler.transform(test), data.test.labels))


def test_what_is_best_is_chosen_without_the_test_images(model, data):
    """Other test images and labels change the accuracy, and nothing of what is chosen."""
    other = replace(data, test=marked(80, 4, 2, strength=0.0))
    rows = [
        vp.evaluate("linear", model, one, l2=(1e-2, 1e-3)).rows[0] for one in (data, other, data)
    ]
    assert rows[0] == rows[2]
    assert rows[0].settings == rows[1].settings
    assert rows[0].settings["chosen_among"] == ["cls", "cls+mean"]
    assert rows[1].value < rows[0].value
    assert rows[0].value > 0.5


def test_frozen_is_both_from_one_pass(model, data):
    options = {"k": (1, 5), "layers": "residual"}
    penalties = {"l2": (1e-1, 1e-2)}
    seen = []
    hook = model.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    both = vp.evaluate("frozen", model, data, batch_size=60, **options, **penalties)
    hook.remove()
    assert seen == [60, 60, 40, 60, 20]
    knn = vp.evaluate("knn", model, data, **options).rows
    linear = vp.evaluate("linear", model, data, layers="residual", **penalties).rows
    assert both.rows == (*knn, *linear)
    assert [row.layer for row in linear] == [None, 0, 1, 2]
    assert [(row.layer, row.settings["k"]) for row in knn[:4]] == [
        (None, 1),
        (None, 5),
        (0, 1),
        (0, 5),
    ]
    assert knn[2].settings["layers"] == "residual"


def test_labels_are_a_share_of_every_class(model, data):
    seen = []
    hook = model.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    (row,) = vp.evaluate("knn", model, data, labels=0.1, seed=3, k=20).rows
    hook.remove()
    assert sum(seen) == 16 + 80
    assert (row.labels, row.seed) == (0.1, 3)
    assert (row.settings["k"], row.settings["k_asked"]) == (16, 20)


def test_one_image_a_class_leaves_nothing_to_choose_by(model, data):
    (row,) = vp.evaluate("linear", model, data, labels=0.001).rows
    assert row.settings["held_out"] == 0
    assert row.settings["l2"] == 1e-1
    assert 0 <= row.value <= 1


class Answers(torch.nn.Module):
    """Answers with the row of patches that is brightest against what the others are."""

    num_classes = 4

    def __init__(self, encoder, answers=4):
        super().__init__()
        self.encoder, self.answers = encoder, answers

    def forward(self, images):
        self.encoder(images)
        return images.mean(dim=(1, 3)).unflatten(1, (4, 8)).mean(dim=2)[:, : self.answers]


def test_head_is_the_models_own_answer(data):
    encoder = tiny(depth=2)
    model = vp.wrap(Answers(encoder.module), name="a", input_size=(3, 32, 32))
    scores = vp.evaluate("head", model, data, batch_size=33)
    images = torch.from_numpy(data.test.images)
    said = images.mean(dim=(1, 3)).unflatten(1, (4, 8)).mean(dim=2).argmax(dim=1)
    (row,) = scores.rows
    assert row.value == (said.numpy() == data.test.labels).mean()
    assert 0.3 < row.value < 1
    assert (row.protocol, row.dataset, row.images, row.metric) == ("head", "marks", 80, "top1")
    assert "head top1" in scores.to_text()


def test_a_head_that_cannot_answer_is_refused(data):
    with pytest.raises(CheckpointError, match="'tiny' has no classification head"):
        vp.evaluate("head", tiny(), data)
    few = Answers(tiny(depth=2).module, answers=3)
    with pytest.raises(CheckpointError, match="tells 3 classes apart and the data have 4"):
        vp.evaluate("head", vp.wrap(few, name="a", input_size=(3, 32, 32)), data)
    few.num_classes = 3
    with pytest.raises(CheckpointError, match="tells 3 classes apart and the data have 4"):
        vp.evaluate("head", vp.wrap(few, name="a", input_size=(3, 32, 32)), data)


def test_a_folder_is_made_whole_or_not_at_all(model, data, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "run"
    vp.evaluate("knn", model, data, out, k=3)
    assert [path.name for path in out.iterdir()] == ["scores.json"]
    again = vp.open_scores(out)
    assert again.rows[0].settings["k"] == 3
    assert again.provenance[0]["options"]["k"] == [3]
    assert again.provenance[0]["model"]["name"] == "tiny"
    with pytest.raises(ResultError, match="exists; choose another folder, or force"):
        vp.evaluate("knn", model, data, out)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitprobe.evaluation.pooled.extract", stopped)
    with pytest.raises(KeyboardInterrupt):
        vp.evaluate("knn", model, data, out, k=5, force=True)
    assert vp.open_scores(out).rows == again.rows
    with pytest.raises(KeyboardInterrupt):
        vp.evaluate("knn", model, data, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_of_something_else_is_left_alone(model, data, tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(ResultError, match="holds files but no evaluation"):
        vp.evaluate("knn", model, data, tmp_path, force=True)
    with pytest.raises(ResultError, match="is no folder"):
        vp.evaluate("knn", model, data, tmp_path / "holiday.jpg", force=True)


@pytest.mark.parametrize(
    ("protocol", "options", "error", "said"),
    [
        ("knm", {}, VitprobeError, "no protocol 'knm'; .* Did you mean 'knn'?"),
        ("knn", {"kk": 3}, VitprobeError, "knn has no option 'kk'; .* Did you mean 'k'?"),
        ("head", {"labels": 0.1}, VitprobeError, "head has no option 'labels'"),
        ("knn", {"k": 0}, MeasureError, r"k of \(0,\) is none"),
        ("knn", {"temperature": 0}, MeasureError, "temperature must be a number above 0"),
        ("knn", {"labels": 2}, DataError, "share of labels of 2"),
        ("knn", {"seed": -1}, DataError, "seed of -1"),
        ("knn", {"batch_size": 0}, DataError, "batch size of 0"),
        ("knn", {"workers": 0}, DataError, "number of workers of 0"),
        ("knn", {"precision": "fp16"}, VitprobeError, "unknown precision 'fp16'"),
        ("knn", {"layers": "all"}, MeasureError, "unknown layers 'all'"),
        ("linear", {"l2": (1e-3, -1)}, MeasureError, "l2 of 0.001, -1 is no strength"),
        ("linear", {"features": "cls7"}, MeasureError, "'cls7' are of 7 blocks"),
        ("frozen", {"l2": ()}, MeasureError, "l2 of nothing"),
        ("knn", {"resume": True}, VitprobeError, "keeps nothing to go on with"),
    ],
)
def test_what_cannot_be_followed_is_refused(model, data, protocol, options, error, said):
    with pytest.raises(error, match=said):
        vp.evaluate(protocol, model, data, **options)


def test_data_that_cannot_be_evaluated_on_are_refused(model, data):
    with pytest.raises(DataError, match="'marks' holds no test images; give 'train=marks,test=…'"):
        vp.evaluate("knn", model, replace(data, test=None))
    bare = replace(data, test=Arrays(data.test.images, None))
    with pytest.raises(DataError, match="the test images of 'marks' have no labels"):
        vp.evaluate("knn", model, bare)
    with pytest.raises(DataError, match="no labelled images 'nowhere'"):
        vp.evaluate("knn", model, "nowhere")


def test_features_that_do_not_fit_memory_are_refused_at_once(model, data, monkeypatch):
    monkeypatch.setattr(features_module, "_free", lambda _: 1e4)
    with pytest.raises(MeasureError, match=r"features of 240 images take 0.0 GB and cpu has 0.0"):
        vp.evaluate("knn", model, data)


@pytest.mark.parametrize("protocol", ["head", "knn"])
def test_out_of_memory_halves_the_passes_and_changes_no_score(protocol, data):
    whole = vp.evaluate(protocol, headed(), data)
    small, given = cramped(20)
    with pytest.warns(UserWarning, match="ran out of memory with .* goes on with") as told:
        found = vp.evaluate(protocol, small, data, batch_size=80)
    assert len(told) == 2
    assert given[:4] == [80, 40, 20, 20]
    assert set(given[2:]) == {20}
    assert found.rows == whole.rows


def test_no_room_for_a_single_image_is_told(data):
    with (
        pytest.warns(UserWarning, match="goes on with 1;"),
        pytest.raises(VitprobeError, match=r"no room on cpu for a single image .*another dev"),
    ):
        vp.evaluate("knn", cramped(0)[0], data, batch_size=2)


def test_bf16_changes_little(model, data):
    exact, half = (
        vp.evaluate("knn", model, data, precision=precision).rows[0].value
        for precision in ("fp32", "bf16")
    )
    assert half == pytest.approx(exact, abs=0.1)


def test_a_spec_and_a_saved_source_do_as_well(data, tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save({"model": tiny(depth=2).module.state_dict()}, path)
    np.savez(
        tmp_path / "marks.npz",
        images=(data.train.images * 255).astype(np.uint8),
        labels=data.train.labels,
        test_images=(data.test.images * 255).astype(np.uint8),
        test_labels=data.test.labels,
    )
    source = str(tmp_path / "marks.npz")
    scores = vp.evaluate("knn", f"{path},heads=3", source, tmp_path / "out", name="MAE")
    (row,) = scores.rows
    assert (row.model, row.spec, row.dataset) == ("MAE", f"{path},heads=3", source)
    assert len(row.sha256) == 64
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert saved["rows"][0]["value"] == row.value
    assert not math.isnan(row.low)


@pytest.mark.slow
def test_the_fashion_mnist_vit_scores_what_its_authors_say(shared):
    weights = shared / "weights" / "fmnist_vit_d128l6h4_timm.pth"
    try:
        from vitprobe.data.labelled import load_labelled

        found = load_labelled("fashion-mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is not installed")
    spec = f"{weights},heads=4,mean=0.5,std=0.5"
    (row,) = vp.evaluate("head", spec, found, batch_size=500).rows
    assert row.value == pytest.approx(0.9077, abs=1e-4)
    assert row.images == 10_000
    scores = vp.evaluate("frozen", spec, found, batch_size=500, labels=0.1)
    knn, linear = (one.value for one in scores.rows)
    assert 0.87 < knn < 0.93
    assert 0.87 < linear < 0.93


def test_a_strength_given_twice_counts_once(model, data):
    once, twice = (
        vp.evaluate("linear", model, data, device="cpu", progress=False, l2=l2).rows[0]
        for l2 in ((1.0, 1e-3), (1.0, 1.0, 1e-3))
    )
    assert once == twice
