"""`vitprobe evaluate detection` and `segmentation` from end to end, small."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vitprobe as vp
from vitprobe.cli import main
from vitprobe.data.coco import load_coco
from vitprobe.data.shapes import Shapes, write_shapes
from vitprobe.errors import DataError, RecipeError
from vitprobe.evaluation.dense.recipe import load_dense_recipe
from vitprobe.evaluation.dense.run import DetectionRun
from vitprobe.models import load
from vitprobe.scores import open_scores

TINY = {
    "epochs": 2, "batch_size": 4, "image_size": 32, "threads": 1, "precision": "fp32",
    "optimizer.lr": 0.02, "optimizer.warmup_epochs": 0,
}  # fmt: skip
DETECTOR = {
    "detector.channels": 8, "detector.fully_connected": 8, "detector.proposals": 10,
    "detector.regions_sampled": 8, "backbone.window": 2, "backbone.drop_path": 0.2,
}  # fmt: skip
SEGMENTER = {"segmenter.channels": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, and a few shapes in both formats."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    torch.save(module.state_dict(), folder / "small.pth")
    write_shapes(folder / "shapes", Shapes(train=10, val=3, size=32))
    return folder


def spec(place):
    return f"Small={place}/small.pth,heads=2"


def model(place):
    return load(f"{place}/small.pth,heads=2", name="Small")


def run(place, **changes):
    recipe = load_dense_recipe("shapes_vitdet", TINY | DETECTOR | changes)
    data = load_coco(place / "shapes" / "coco")
    made = model(place)
    return DetectionRun(recipe.for_model(made, "shapes"), data, made, torch.device("cpu"))


def set_of(overrides):
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def command(*args):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, args)])
    return stop.value.code


def test_detection_leaves_scores_and_what_they_are_of(place, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--recipe", "shapes_vitdet", "--set", *set_of(TINY | DETECTOR), "--device", "cpu"]
    data = place / "shapes" / "coco"
    assert command("detection", spec(place), "--data", data, "--out", out, *options) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "scores.json")
    scores = open_scores(out)
    assert {row.metric for row in scores.rows} == {
        f"{kind}_{name}"
        for kind in ("box", "mask")
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    }
    first = scores.rows[0]
    assert (first.model, first.protocol, first.images) == ("Small", "detection", 3)
    assert first.settings["recipe"] == "shapes_vitdet"
    assert len(first.sha256) == 64
    assert 0 <= first.value <= 1
    kept = out / "training"
    assert (kept / "classes.csv").read_text().startswith("class,box_ap,mask_ap\ncircle,")
    json.loads((kept / "detections.json").read_text())
    lines = [json.loads(line) for line in (kept / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "objectness", "mask"} <= lines[0].keys()
    # A finished one that is resumed is tested again, with the same outcome.
    again = command("detection", spec(place), "--data", data, "--out", out, *options, "--resume")
    assert again == 0
    assert open_scores(out).to_dataframe().equals(scores.to_dataframe())
    other = [*options, "--resume", "--set", *set_of(TINY | DETECTOR | {"seed": 3})]
    assert command("detection", spec(place), "--data", data, "--out", out, *other[2:]) == 2


@pytest.mark.parametrize("head", ["linear", "multiscale"])
def test_segmentation_leaves_scores(place, head):
    frozen = {"backbone.frozen": head == "linear", "segmenter.head": head}
    scores = vp.evaluate(
        "segmentation",
        model(place),
        place / "shapes" / "voc",
        recipe="shapes_segmentation",
        overrides=TINY | SEGMENTER | frozen,
        device="cpu",
        progress=False,
    )
    miou, accuracy = scores.rows
    assert (miou.metric, accuracy.metric) == ("miou", "pixel_accuracy")
    assert miou.low <= miou.value <= miou.high
    assert miou.settings["head"] == head
    changed = {key for key in TINY if key not in ("seed", "threads", "epochs", "image_size")}
    assert changed <= set(miou.settings)


def test_a_run_that_was_stopped_goes_on_to_the_bit(place):
    whole, stopped = run(place), run(place)
    for _ in range(4):
        whole.advance()
    stopped.advance()
    state = stopped.state()
    state = {**state, "method": {k: v.clone() for k, v in state["method"].items()}}
    again = run(place)
    assert again.restore(state) == []
    while again.step < 4:
        again.advance()
    assert whole.latest() == again.latest()
    for name, tensor in whole.method.state_dict().items():
        assert torch.equal(tensor, again.method.state_dict()[name]), name
    with pytest.raises(RecipeError, match="seed was 0, now 1"):
        run(place, seed=1).restore(state)


def test_rates_fall_to_a_tenth_at_milestones(place):
    made = run(place, milestones=[0.5, 0.75])
    rates = []
    for step in range(4):
        made.step = step
        rates.append(made.lr)
    top = 0.02 * 4 / 256
    assert rates == pytest.approx([top, top, top / 10, top / 100])
    assert run(place).lr == pytest.approx(top)


def test_workers_give_what_this_process_does(place):
    recipe = load_dense_recipe("shapes_vitdet", TINY | DETECTOR)
    made, data = model(place), load_coco(place / "shapes" / "coco")
    losses = []
    for workers in (0, 2):
        one = DetectionRun(
            recipe.for_model(made, "x"), data, made, torch.device("cpu"), workers=workers
        )
        one.advance()
        losses.append(one.latest())
        one.close()
    assert losses[0] == losses[1]


def test_dry_runs_say_what_it_would_take(place, capsys):
    data = ["--data", "shapes", "--out", place / "run", "--dry-run"]
    assert command("segmentation", spec(place), *data, "--recipe", "shapes_segmentation") == 0
    printed = capsys.readouterr().out
    assert "# steps: 600 (6 epochs x 100)" in printed.splitlines()
    assert "800 to train on, 200 to test on" in printed
    assert "# classes: 5" in printed.splitlines()
    assert not (place / "run").exists()


@pytest.mark.slow
def test_the_papers_recipe_is_planned_without_its_data(place, capsys):
    data = ["--data", place / "none", "--out", place / "run", "--dry-run"]
    assert command("detection", "init:deit_tiny_patch16_224", *data) == 0
    printed = capsys.readouterr().out
    for line in ("epochs = 100", "batch_size = 64", "image_size = 640", "window = 14"):
        assert line in printed.splitlines()
    figures = dict(line[2:].split(": ", 1) for line in printed.splitlines() if line[:2] == "# ")
    assert figures["steps"].startswith("unknown: no folder")
    assert figures["classes"] == "80, assumed: those of COCO"
    assert "M in the backbone" in figures["parameters"]
    assert float(figures["FLOPs per image"].split()[0]) > 100


def test_sets_are_made_on_demand(tmp_path, capsys):
    out = tmp_path / "made"
    assert command("shapes", "--out", out, "--train", 2, "--val", 1, "--size", 32) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert len(load_coco(out / "coco").test) == 1
    assert command("shapes", "--out", out) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--data": "none"}, "no folder 'none'"),
        ({"--data": "shapes:x"}, "names no seed"),
        ({"--recipe": "segmentation_linear"}, "is for vitprobe evaluate segmentation"),
        ({"--recipe": "coco_vitdet"}, "Did you mean 'coco_vitdet_tiny'"),
        ({"--set": "image_size=33"}, "must be a multiple of the 8 pixels of a patch"),
        ({"--set": "batch_size=64"}, "batch_size 64 is more than the"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(place, tmp_path, capsys, changes, words):
    options = {"--data": place / "shapes" / "coco", "--recipe": "shapes_vitdet"} | changes
    flat = [text for pair in options.items() for text in pair]
    out = tmp_path / "run"
    assert command("detection", spec(place), "--out", out, "--device", "cpu", *flat) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (out / "scores.json").exists()


def test_a_missing_mask_is_told_as_training_meets_it(place, tmp_path):
    source = place / "shapes" / "coco"
    content = json.loads((source / "annotations" / "instances_train.json").read_text())
    for one in content["annotations"]:
        del one["segmentation"]
    path = source / "annotations" / "bare.json"
    path.write_text(json.dumps(content))
    (source / "bare").symlink_to(source / "train")
    options = {"recipe": "shapes_vitdet", "device": "cpu", "progress": False}
    data = f"train={path},test={source}/annotations/instances_val.json"
    with pytest.raises(DataError, match=r"set detector.masks=false"):
        vp.evaluate("detection", model(place), data, overrides=TINY | DETECTOR, **options)
    boxes = TINY | DETECTOR | {"detector.masks": False, "epochs": 1}
    scores = vp.evaluate("detection", model(place), data, overrides=boxes, **options)
    assert {row.metric.split("_")[0] for row in scores.rows} == {"box"}
    assert not math.isnan(scores.rows[0].value)
    path.unlink()
    (source / "bare").unlink()


@pytest.mark.slow
def test_processes_of_torchrun_share_training_and_testing(place, tmp_path):
    out, data = tmp_path / "run", place / "shapes" / "coco"
    found = {}
    for processes in (1, 2):
        arguments = ["detection", spec(place), "--data", data, "--out", out / str(processes)]
        arguments += ["--recipe", "shapes_vitdet", "--device", "cpu", "--workers", "1"]
        arguments += ["--set", *set_of(TINY | DETECTOR | {"epochs": 1, "detector.proposals": 40})]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        line = [sys.executable, *launch, "-m", "vitprobe", "evaluate", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(out / str(processes) / "scores.json")
        kept = out / str(processes) / "training"
        log = json.loads((kept / "log.jsonl").read_text().splitlines()[0])
        seen = {one["image_id"] for one in json.loads((kept / "detections.json").read_text())}
        found[processes] = log, seen
    (one, images), (two, images_of_two) = found[1], found[2]
    # The losses of proposals are means over as many anchors of every image; the others are means
    # over the objects of a share.
    assert two["objectness"] == pytest.approx(one["objectness"], rel=1e-4)
    assert images == images_of_two
