"""`vitprobe evaluate` and `--scores` as a user types them."""

from __future__ import annotations

import importlib
import signal
import warnings

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe import cli


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a command in-process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        formatter = warnings.formatwarning
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main([str(argument) for argument in arguments])
        finally:
            warnings.formatwarning = formatter
            for number, handler in before.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return command


@pytest.fixture
def files(tmp_path):
    """A checkpoint `a.pth` and labelled images `data.npz`."""
    torch.save({"model": tiny(depth=2).module.state_dict()}, tmp_path / "a.pth")
    images = (squares(48) * 255).to(torch.uint8).numpy()
    labels = np.arange(48) % 3
    np.savez(
        tmp_path / "data.npz",
        images=images[:32],
        labels=labels[:32],
        test_images=images[32:],
        test_labels=labels[32:],
    )


def test_the_path_alone_is_on_stdout_and_the_scores_on_stderr(run, files):
    status, out, err = run(
        "evaluate", "frozen", "A=a.pth,heads=3", "--data", "data.npz", "--out", "runs/a",
        "--k", 1, 3, "--l2", 0.01, "--features", "cls", "mean", "--labels", 0.5, "--seed", 2,
    )  # fmt: skip
    assert (status, out) == (0, "runs/a/scores.json\n")
    rows = vp.open_scores("runs/a").rows
    assert [row.protocol for row in rows] == ["knn"] * 4 + ["linear"]
    assert {(row.model, row.labels, row.seed) for row in rows} == {("A", 0.5, 2)}
    assert [row.settings["k"] for row in rows[:4]] == [1, 3, 1, 3]
    assert err.count("A: knn top1") == 4


def test_what_is_there_is_replaced_only_by_force(run, files):
    again = ("evaluate", "knn", "init:a.pth,heads=3", "--data", "data.npz", "--out", "runs")
    assert run(*again, "--k", 1)[0] == 0
    status, _, err = run(*again)
    assert (status, err.count("\n")) == (2, 1)
    assert "'runs' exists; give another --out, or --force" in err
    assert run(*again, "--k", 2, "--force")[0] == 0
    assert vp.open_scores("runs").rows[0].settings["k"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("knm", "a.pth"), "Available subcommands: head, knn"),
        (("knn", "missing.pth", "--data", "data.npz", "--out", "x"), "missing.pth"),
        (("knn", "tim:a", "--data", "data.npz", "--out", "x"), "Did you mean 'timm'?"),
        (("knn", "a.pth,heads=3", "--data", "other", "--out", "x"), "no labelled images 'other'"),
        (("head", "a.pth,heads=3", "--data", "data.npz", "--out", "x"), "no classification head"),
        (
            ("knn", "a.pth,heads=3", "--data", "data.npz", "--out", "x", "--features", "clss"),
            "no features 'clss'",
        ),
        (
            ("linear", "a.pth,heads=3", "--data", "data.npz", "--out", "x", "--labels", "0"),
            "share of labels of 0",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run, files, arguments, said, tmp_path):
    status, out, err = run("evaluate", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "x").exists()


def test_scores_go_with_a_comparison(run, files, monkeypatch, tmp_path):
    for name, k in (("A", 1), ("elsewhere", 3)):
        made = ("--data", "data.npz", "--out", name, "--k", k)
        assert run("evaluate", "knn", f"{name}=a.pth,heads=3", *made)[0] == 0
    model = vp.load("a.pth,heads=3", name="A")
    vp.compare([model], squares(8), ["cka"], progress=False, device="cpu").save("result.nc")
    given = {}
    # The package's name is that of the function, as seen from vitprobe.
    monkeypatch.setattr(
        importlib.import_module("vitprobe.report"),
        "report",
        lambda result, out, **_: given.update(r=result) or out,
    )
    both = ("--scores", "A", "elsewhere")
    assert run("report", "result.nc", "--out", "page", *both)[0] == 0
    assert list(given["r"].scores["model"]) == ["A", "A"]

    torch.save({"model": tiny(depth=2, seed=1).module.state_dict()}, tmp_path / "b.pth")
    other = ("compare", "B=b.pth,heads=3", "--images", "photos", "--out", "page")
    (tmp_path / "photos").mkdir()
    status, _, err = run(*other, *both)
    assert (status, err.count("\n")) == (2, 1)
    assert "the scores of 'A' (a.pth,heads=3) belong to no model compared" in err
    assert "no scores 'nothing" in run(*other, "--scores", "nothing")[2]
