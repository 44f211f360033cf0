from __future__ import annotations

import importlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from models_for_tests import squares, tiny
from PIL import Image

import vitprobe as vp
from vitprobe import cli

SVG = ("--formats", "svg")
"""Less to draw, where files of figures are not what is tested."""


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate((squares(12) * 255).to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save({"model": tiny().module.state_dict()}, path)
    return path


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


def left_behind(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name not in ("photos", "tiny.pth"))


def test_compare_writes_a_report_and_prints_its_path_alone(run, checkpoint, photos, tmp_path):
    status, out, err = run(
        "compare",
        f"A={checkpoint},heads=3",
        f"B=init:{checkpoint},seed=1,heads=3",
        *("--images", photos, "--out", "out", "--limit", 10),
        *("--measures", "cka,attention_distance", "attention_entropy"),
    )
    assert (status, out) == (0, "out/report.html\n"), err
    assert {"report.html", "results.nc", "figures", "tables"} <= set(os.listdir(tmp_path / "out"))
    assert left_behind(tmp_path) == ["out"]
    status, out, err = run("report", "out/results.nc", "--out", "again")
    assert (status, out) == (0, "again/report.html\n")
    status, _, err = run("report", "out/results.nc", "--out", "again")
    assert (status, err.count("\n")) == (2, 1)
    assert "'again' exists" in err
    assert run("report", "out/results.nc", "--out", "again", "--force")[0] == 0


def test_models_from_a_file(run, checkpoint, photos, tmp_path):
    with_comma = tmp_path / "a,b.pth"
    checkpoint.rename(with_comma)
    (tmp_path / "models.toml").write_text(f'[One]\nspec = "{with_comma}"\nheads = 3\n')
    status, out, err = run(
        "compare", "--models", "models.toml", "--images", photos, "--out", "out", "--dry-run"
    )
    assert status == 0, err
    assert re.search(r"12 images through 1 models once", out)
    assert "One: 3 blocks, input 3x32x32" in out
    assert not (tmp_path / "out").exists()


def test_groups_of_seeds_and_untrained_twins(run, checkpoint, photos, tmp_path):
    status, out, err = run(
        "compare",
        *(f"A={checkpoint},heads=3", "--group", f"G={checkpoint},heads=3,mean=0.5/0.4/0.3,"),
        *("--images", photos, "--out", "out"),
    )
    assert (status, "a spec between two commas is empty" in err) == (2, True)
    status, out, err = run(
        "compare",
        f"A={checkpoint},heads=3",
        *("--group", f"Seeds={checkpoint},heads=3,mean=0.5/0.4/0.3,init:{checkpoint},heads=3"),
        *("--group", f"One=init:{checkpoint},seed=2,heads=3", "--random-reference"),
        *("--measures", "cka,sink_mass,token_cosine", "--max-images", 8),
        *("--images", photos, "--out", "out"),
        *SVG,
    )
    assert (status, out) == (0, "out/report.html\n"), err
    result = vp.open_result(tmp_path / "out" / "results.nc")
    assert result.groups == {"Seeds": ("Seeds 1", "Seeds 2"), "One": ("One 1",)}
    assert result.describe("Seeds 1")["mean"] == [0.5, 0.4, 0.3]
    assert result.describe("Seeds 2")["spec"].startswith("init:")
    assert result.references == {"A": "A (untrained)", "Seeds 1": "Seeds 1 (untrained)"}
    assert "note: Group One has one seed" in err
    assert result.provenance["max_images"] == 8


def test_a_dry_run_tells_the_memory_of_kept_features(run, checkpoint, photos, tmp_path):
    arguments = (f"A={checkpoint},heads=3", "--images", photos, "--out", "out", "--dry-run")
    status, out, _ = run("compare", *arguments, "--measures", "all", "--random-reference")
    assert status == 0
    assert "1 models and untrained twins once; cka, cka_rbf, svcca" in out
    assert "features of 12 images kept for measures that need them together: " in out
    assert "GB of memory" in out
    assert "features of" not in run("compare", *arguments)[1]
    status, _, err = run("compare", *arguments, "--measures", "svca")
    assert (status, "Did you mean 'svcca'" in err) == (2, True)
    assert left_behind(tmp_path) == []


def test_a_result_outlives_a_report_that_fails(run, checkpoint, photos, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no ink")

    # The package's attribute of that name is the function.
    monkeypatch.setattr(importlib.import_module("vitprobe.report.folder"), "draw", broken)
    arguments = (f"A={checkpoint},heads=3", "--images", photos, "--out", "new/out")
    status, out, err = run("compare", *arguments, "--measures", "sink_mass")
    assert (status, out) == (1, "")
    (kept,) = (tmp_path / "new").iterdir()
    assert f"the report failed; the result is in '{kept}'" in err
    assert vp.open_result(kept).measures == ("sink_mass",)


def test_a_result_that_does_not_fit_beside_the_report_is_kept_elsewhere(
    run, checkpoint, photos, tmp_path, monkeypatch
):
    spare = tmp_path / "spare"
    spare.mkdir()
    write = Path.write_bytes

    def full(self, data):
        if self.parent != spare:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    arguments = (f"A={checkpoint},heads=3", "--images", photos, "--out", "out")
    status, out, err = run("compare", *arguments, "--measures", "sink_mass")
    (kept,) = spare.iterdir()
    assert (status, out) == (2, "")
    assert "No space left on device" in err
    assert f"the result is in '{kept}', for vitprobe report" in err
    assert vp.open_result(kept).measures == ("sink_mass",)
    assert left_behind(tmp_path) == ["spare"]


def test_inspect(run, checkpoint):
    status, out, _ = run("inspect", f"Mine={checkpoint},heads=3")
    assert status == 0
    assert "Mine" in out
    assert "heads" in out
    assert "user" in out


def poison(path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'executed'}",)

    torch.save({"model": Payload()}, path)


def resnet(path):
    names = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")
    torch.save({name: torch.zeros(4, 4, 3, 3) for name in names}, path)


def nan(path):
    state = tiny().module.state_dict()
    state["blocks.1.norm1.weight"][0] = float("nan")
    torch.save({"model": state}, path)


def truncated(path):
    torch.save(tiny().module.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "bad.pth"),
        (lambda path: path.write_text("hello"), "bad.pth"),
        (lambda path: path.write_bytes(b""), "bad.pth"),
        (truncated, "bad.pth"),
        (poison, "bad.pth"),
        (resnet, "bad.pth"),
        (nan, r"'A', block 0 of the images: attention is NaN in layer 1"),
    ],
    ids=["missing", "text", "empty", "truncated", "payload", "resnet", "nan"],
)
def test_bad_checkpoints(run, photos, tmp_path, checkpoint, make, message):
    make(tmp_path / "bad.pth")
    status, out, err = run(
        "compare",
        "A=bad.pth,heads=3",
        f"B={checkpoint},heads=3",
        "--images",
        photos,
        "--out",
        "out",
    )
    lines = [line for line in err.splitlines() if line.startswith("vitprobe:")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert re.search(message, lines[0])
    assert set(left_behind(tmp_path)) <= {"bad.pth"}
    assert not (tmp_path / "executed").exists()


def empty_folder(tmp_path):
    (tmp_path / "none").mkdir()


def broken_images(tmp_path):
    (tmp_path / "none").mkdir()
    for i in range(5):
        (tmp_path / "none" / f"{i}.jpg").write_bytes(b"no")


def three_images(tmp_path):
    (tmp_path / "none").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "none" / f"{i}.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: None, "no images at 'none'"),
        (empty_folder, "'none' holds no image files"),
        (broken_images, r"none of the images in 'none' can be decoded"),
        (three_images, "'none' gives too few images .*, 3: .* needs at least 4"),
    ],
    ids=["missing", "empty", "undecodable", "few"],
)
def test_bad_images(run, tmp_path, checkpoint, make, message):
    make(tmp_path)
    status, _, err = run("compare", f"{checkpoint},heads=3", "--images", "none", "--out", "out")
    assert status == 2
    assert re.search(message, err)
    assert set(left_behind(tmp_path)) <= {"none"}


def test_names_that_are_no_utf8_and_links(run, photos, checkpoint, tmp_path):
    os.rename(photos / "00.png", os.fsencode(photos) + b"/\xff0.png")
    (photos / "more").mkdir()
    (photos / "01.png").rename(photos / "more" / "01.png")
    (photos / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    (photos / "02.png").rename(tmp_path / "elsewhere" / "02.png")
    (tmp_path / "elsewhere" / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    status, _, err = run(
        "compare", f"{checkpoint},heads=3", "--images", photos, "--out", "out", *SVG
    )
    assert status == 0, err
    result = vp.open_result(tmp_path / "out" / "results.nc")
    assert result.provenance["images"]["undecodable"] == ["gone.png"]
    names = result.per_image("sink_mass", "tiny")["image"].values.tolist()
    assert len(names) == 12
    assert {"\\xff0.png", "more/01.png", "linked/02.png"} <= set(names)


def test_small_blocks(run, photos, checkpoint, tmp_path):
    status, _, err = run(
        "compare", f"{checkpoint},heads=3", "--images", photos, "--out", "out", "--block", 4, *SVG
    )
    assert status == 0, err
    result = vp.open_result(tmp_path / "out" / "results.nc")
    assert result.thumbnails().shape[0] == result.samples("tiny").sizes["sample"] == 8


def test_some_undecodable_images_are_counted_named_and_replaced(run, photos, checkpoint, tmp_path):
    (photos / "05.png").write_bytes(b"no")
    given = (f"{checkpoint},heads=3", "--images", photos)
    status, _, err = run("compare", *given, "--out", "out", *SVG)
    assert status == 0
    assert "1 image could not be decoded: 05.png" in err
    assert "05.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A={c}", "A={c}", "--images", "photos", "--out", "out"], "two models are named 'A'"),
        (["A=timm:vit_tiny_patch16_242", "--images", "photos", "--out", "out"], "Did you mean"),
        (["A=nowhere:x", "--images", "photos", "--out", "out"], "nowhere:x"),
        (["A={c},head=3", "--images", "photos", "--out", "out"], "Did you mean 'heads'"),
        (["--images", "photos", "--out", "out"], "no models to compare"),
        (["--group", "{c}", "--images", "photos", "--out", "out"], "is no NAME=SPEC,SPEC"),
        (["--group", "G=", "--images", "photos", "--out", "out"], "'G=' is no NAME=SPEC,SPEC"),
        (
            ["--group", "G=heads=3,{c}", "--images", "photos", "--out", "out"],
            "group 'G': 'heads=3' follows no spec",
        ),
        (
            ["--group", "G={c}", "--group", "G={c}", "--images", "photos", "--out", "out"],
            "group 'G' is given twice",
        ),
        (
            ["G 1={c}", "--group", "G={c}", "--images", "photos", "--out", "out"],
            "two models are named 'G 1'",
        ),
        (["A={c}", "heads=3", "--images", "photos", "--out", "out"], "join it to its spec"),
        (["{c}", "--images", "photos", "--out", "out", "--seed", "-1"], "a seed of -1"),
        (["=x", "--images", "photos", "--out", "out"], "no NAME=SPEC"),
        (["{c}", "--images", "photos", "--out", "photos"], "'photos' exists"),
        (
            ["{c}", "--images", "photos", "--out", "out", "--measures", "cca"],
            "unknown measure 'cca'",
        ),
        (["{c}", "--images", "photos", "--out", "tiny.pth/out"], "tiny.pth' is no folder"),
        (["{c}", "--images", "photos", "--out", "/proc/out"], "cannot write '/proc/out'"),
        (["{c}", "--images", "photos"], "--out"),
        (["{c}", "--images", "photos", "--out", "out", "--limit", "x"], "--limit"),
        (
            ["{c}", "--images", "photos", "--out", "out", "--dry-run", "--block", "0"],
            "a block of 0",
        ),
        (["{c}", "--images", "photos", "--out", "x" * 300], "cannot"),
        (["{c}", "--models", "no.toml", "--images", "photos", "--out", "out"], "'no.toml'"),
    ],
)
def test_bad_usage(run, photos, checkpoint, tmp_path, arguments, message):
    filled = [argument.replace("{c}", f"{checkpoint},heads=3") for argument in arguments]
    status, out, err = run("compare", *filled)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert message in err
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(run, photos, checkpoint, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    status, _, err = run(
        "compare", f"{checkpoint},heads=3", "--images", photos, "--out", "locked/out"
    )
    assert status == 2
    assert "no permission to write" in err


@pytest.mark.parametrize("command", [[], ["foo"], ["inspect"], ["pretrain", "none", "--out", "x"]])
def test_usage_errors_are_one_line(run, command, tmp_path):
    status, _, err = run(*command)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("vitprobe: ")
    assert left_behind(tmp_path) == []


def test_help_is_immediate():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "vitprobe", "--help"], capture_output=True, text=True
        )
        took.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "compare" in done.stdout
    # Half a second on an idle machine; the rest is for one that tests in parallel.
    assert min(took) < 1.5


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_nothing(tmp_path, photos, checkpoint, number, status):
    code = (
        "import sys, vitprobe.data.blocks as d, time, os, signal\n"
        "before = d.resize\n"
        "def slow(*a):\n    time.sleep(0.5)\n    print('decoding', flush=True)\n"
        "    return before(*a)\n"
        "d.resize = slow\n"
        "from vitprobe.cli import main\n"
        f"main(['compare', '{checkpoint},heads=3', '--images', '{photos}', '--out', 'out'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert b"decoding" in process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert b"Traceback" not in err
    assert left_behind(tmp_path) == []


def test_probe_files(run, photos, checkpoint, tmp_path):
    more = ("--images", photos, "--measures", "cka", "attention_entropy", "--device", "cpu")
    for name, spec in (("A", checkpoint), ("B", f"init:{checkpoint},seed=1")):
        status, out, err = run("probe", f"{name}={spec},heads=3", *more, "--out", f"{name}.probe")
        assert (status, out) == (0, f"{name}.probe\n"), err
        assert "heads assumed" not in err
    torch.save({"model": tiny(width=64, depth=1, heads=1).module.state_dict()}, "wide.pth")
    status, _, err = run("probe", "wide.pth", *more, "--out", "C.probe")
    assert status == 0, err
    assert re.search(r"^note: .*: \d+ heads assumed, which nothing in the file says", err, re.M)
    os.remove("C.probe")
    os.remove("wide.pth")
    status, out, _ = run("inspect", "A.probe")
    assert status == 0
    for said in ("Probe file", "cka, attention_entropy, sink_mass", "12 in 1 block", "tiny.pth"):
        assert said in out
    kept = ("--measures", "cka", "attention_entropy", *SVG)
    status, out, err = run("compare", "A=A.probe", "Other=B.probe", *kept, "--out", "out")
    assert (status, out) == (0, "out/report.html\n"), err
    assert vp.open_result("out/results.nc").models == ("A", "Other")
    live = f"C={checkpoint},heads=3"
    status, _, err = run("compare", "B.probe", live, *more, "--out", "mixed", "--dry-run")
    assert status == 0, err
    status, _, err = run("compare", "B.probe", live, *more, "--out", "mixed", *SVG)
    assert status == 0, err
    assert vp.open_result("mixed/results.nc").models == ("B", "C")
    assert left_behind(tmp_path) == ["A.probe", "B.probe", "mixed", "out"]


def test_compare_keeps_probe_files(run, photos, checkpoint, tmp_path):
    given = (f"A={checkpoint},heads=3", "--images", photos, "--measures", "cka", "--probes", "kept")
    given += SVG
    assert run("compare", *given, "--out", "out")[0] == 0
    assert os.listdir(tmp_path / "kept") == ["A.probe"]
    status, _, err = run("compare", *given, "--out", "again")
    assert (status, err.count("\n")) == (2, 1)
    assert "'kept/A.probe' exists" in err
    assert run("compare", *given, "--out", "again", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("probe", "A={c}", "--images", "{p}", "--out", "A.pt"), "ends in .probe"),
        (("probe", "A=A.probe", "--images", "{p}", "--out", "B.probe"), "holds no model to run"),
        (("compare", "A={c}", "--out", "o"), "no images to compare models on; give --images"),
        (("compare", "A=none.probe", "--out", "o"), "no probe file 'none.probe'"),
        (("compare", "A=a.probe,heads=3", "--out", "o"), "was made with them"),
        (("compare", "A={c}", "--images", "{p}", "--out", "o", "--resume"), "--probes; give that"),
        (("inspect", "{c}.probe"), "no probe file"),
    ],
)
def test_bad_use_of_probe_files(run, photos, checkpoint, tmp_path, arguments, message):
    given = [text.format(c=checkpoint, p=photos) for text in arguments]
    status, out, err = run(*given)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_probe_says_how_to_go_on(run, photos, checkpoint, tmp_path, number, status):
    spec = f"A={checkpoint},heads=3"
    given = ["probe", spec, "--images", photos, "--out", "A.probe", "--block", "4"]
    # Blocks are held up, so that the signal comes between them.
    code = (
        "import sys, time; from vitprobe import cli, forward; run = forward.Forward.part\n"
        "def slow(self, block):\n"
        "    if block.first: print('waiting', flush=True); time.sleep(60)\n"
        "    return run(self, block)\n"
        "forward.Forward.part = slow; cli.main(sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    assert child.returncode == status
    assert "whole blocks of 'A.probe' are kept; --resume goes on behind them" in err
    assert "Traceback" not in err
    assert left_behind(tmp_path) == ["A.probe.partial"]
    assert run(*given, "--resume")[:2] == (0, "A.probe\n")
    assert left_behind(tmp_path) == ["A.probe"]


def test_force_on_a_folder_that_is_no_report_is_refused_before_the_work(
    run, photos, checkpoint, tmp_path
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for out in ("mine", "tiny.pth", "photos/00.png"):
        status, _, err = run(
            "compare", f"{checkpoint},heads=3", "--images", photos, "--out", out, "--force"
        )
        assert (status, err.count("\n")) == (2, 1), err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


SMALL = ("encoder.width=16", "encoder.depth=2", "encoder.heads=2", "epochs=1", "batch_size=256")


def test_pretrain_runs_and_export(run, tmp_path):
    status, out, err = run("pretrain", "digits_mae", "--out", "runs/a", "--set", *SMALL)
    assert (status, out) == (0, "runs/a/encoder.safetensors\n"), err
    assert "live on cpu: augmented there" in err
    status, out, err = run("runs", "runs", "--out", "curves.pdf")
    assert status == 0, err
    assert out.endswith("curves.pdf\n")
    assert {f"curves.{kind}" for kind in ("pdf", "svg", "png")} <= set(os.listdir(tmp_path))
    status, _, err = run("runs", "runs", "--out", "curves.jpg")
    assert status == 2
    assert "curves are drawn as .pdf" in err
    status, out, err = run("export", "run:runs/a", "--to", "timm", "--out", "exported")
    assert (status, out) == (0, "exported\n"), err
    assert {"config.json", "model.safetensors"} <= set(os.listdir(tmp_path / "exported"))
    status, _, err = run("export", "run:runs/a", "--to", "timm", "--out", "exported")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("recipe", ["digits_mocov3", "digits_dmae"])
def test_a_dry_run_says_what_would_be_done_and_does_nothing(run, recipe, tmp_path):
    status, out, _ = run("pretrain", recipe, "--dry-run", "--set", "batch_size=32", "epochs=2")
    assert status == 0
    assert "# steps: 88 (2 epochs x 44)" in out
    for figure in ("parameters", "learning rate", "FLOPs per image", "memory"):
        assert f"# {figure}: " in out
    assert ("the teacher is left out" in out) == (recipe == "digits_dmae")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits_mae",), "give --out"),
        (("digits_mae", "--out", "x", "--set", "epochs=1", "--set", "seed=1"), "after one --set"),
        (("digits_mae", "--out", "x", "--sharded"), "Sharding needs several processes"),
        (("digits_mae", "--out", "x", "--resume", "--force"), "give one of them"),
        (("digits_mae", "--out", "x", "--workers", "-1"), "workers must be at least 0"),
        (("digits_mae", "--out", "x", "--device", "mps"), "use --device cpu"),
        (("digits_mocov3", "--out", "x", "--set", "batch_size=1"), "batch_size must be at least 2"),
        (("digits_mocov3", "--out", "x", "--set", "accumulate=2"), "accumulate must be 1"),
    ],
)
def test_what_pretrain_cannot_do_is_one_line(run, arguments, message, tmp_path):
    status, _, err = run("pretrain", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert left_behind(tmp_path) == []


def test_the_version_is_told(run):
    assert run("--version")[:2] == (0, f"vitprobe {vp.__version__}\n")


def test_memory_that_runs_out_is_told_in_a_sentence(run, monkeypatch):
    def full(self):
        raise MemoryError

    monkeypatch.setattr(cli.Inspect, "run", full)
    status, _, told = run("inspect", "any.pth")
    assert status == 2
    assert "memory ran out; give a smaller --batch-size" in told
