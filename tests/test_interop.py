"""For scripts and other tools: JSON, loggers and the completion of commands in a shell."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import types
import warnings

import pytest
import torch
from models_for_tests import squares, tiny
from PIL import Image
from plots.synthetic import Subject, comparison

import vitprobe as vp
from vitprobe import cli
from vitprobe.errors import LoggerError
from vitprobe.report.logged import send


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
def result():
    subjects = {"A": Subject(2, 2), "B": Subject(2, 2)}
    return comparison(subjects, images=8, measures=("cka", "sink_mass"))


def test_compare_prints_json_alone_where_asked_and_logs(run, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "photos").mkdir()
    for i, image in enumerate((squares(8) * 255).to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i:02}.png")
    torch.save({"model": tiny().module.state_dict()}, tmp_path / "tiny.pth")
    models = ("A=tiny.pth,heads=3", "B=init:tiny.pth,heads=3")
    asked = ("compare", *models, "--images", "photos", "--out", "out", "--json")
    status, _, err = run(*asked, "--dry-run")
    assert (status, err.count("\n")) == (2, 1)
    assert "--json" in err
    status, out, err = run(*asked, "--measures", "mutual_knn", "--log", "tensorboard")
    assert status == 0, err
    told = json.loads(out)
    assert (told["page"], told["result"]) == ("out/report.html", "out/results.nc")
    kept = vp.open_result(tmp_path / told["result"])
    assert told["similarity"] == kept.summary()["similarity"]
    assert told["models"][1]["spec"].startswith("init:")
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    # A new report there says the same, and its folder keeps no events of the one before.
    status, out, _ = run("report", "out/results.nc", "--out", "out", "--force", "--json")
    assert (status, json.loads(out)) == (0, told)
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.fixture
def folder(tmp_path):
    """Of a report with one figure."""
    (tmp_path / "figures").mkdir()
    Image.new("L", (5, 4), 128).save(tmp_path / "figures" / "cka_A_B.png")
    return tmp_path


def test_tensorboard_gets_curves_over_layers_and_figures(result, folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    send(result, folder, ["tensorboard"])
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("sink_mass/A")]
    expected = result.by_layer("sink_mass", "A")["value"].values
    assert curve == [(i, pytest.approx(value, rel=1e-6)) for i, value in enumerate(expected)]
    assert len(events.Scalars("cka/A and B")) == 3
    (mean,) = events.Scalars("means/cka/A and B")
    assert mean.value == pytest.approx(float(result.equal_depth("cka", "A", "B")["value"].mean()))
    assert events.Tags()["images"] == ["figures/cka_A_B"]


def test_wandb_gets_them_layer_by_layer(result, folder, monkeypatch):
    told = []
    place = types.SimpleNamespace(
        define_metric=lambda *args, **kwargs: told.append((args, kwargs)),
        log=told.append,
        finish=lambda: told.append("finished"),
    )
    module = types.ModuleType("wandb")
    module.__dict__.update(init=lambda **_: place, Settings=dict, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    send(result, folder, ["wandb"])
    assert told[:2] == [(("layer",), {}), (("*",), {"step_metric": "layer"})]
    assert told[2]["layer"] == 0
    assert {"sink_mass/A", "cka/A and B", "means/cka/A and B"} <= set(told[2])
    assert told[-2] == {"figures/cka_A_B": str(folder / "figures" / "cka_A_B.png"), "layer": 0}
    assert told[-1] == "finished"


def test_an_unknown_logger_is_refused_before_anything_is_written(result, tmp_path):
    with pytest.raises(LoggerError, match=r"no logger 'tensorbord'.* Did you mean 'tensorboard'\?"):
        vp.report(result, tmp_path / "out", loggers=["tensorbord"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_accepts_the_completion_script(run, shell):
    status, out, err = run("completion", shell)
    assert (status, err) == (0, "")
    assert "compare" in out
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=out, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("vitprobe comp", {"compare", "completion"}), ("vitprobe compare --tok", {"--tokens"})],
)
def test_bash_completes_commands_and_options(run, typed, offered):
    script = run("completion", "bash")[1]
    words = typed.split()
    ask = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{typed}'; "
        f"COMP_POINT={len(typed)}; $(complete -p vitprobe | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == offered, done.stderr
