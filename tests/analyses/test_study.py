"""The study's list of runs: resumable, done ones left alone. Nothing is trained here."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from analyses.fashion import compare, findings, study
from analyses.fashion.reading import Study
from analyses.fashion.study import Job, Schedule, evaluation, main, model_spec, training
from analyses.fashion.tables import recipe_of
from analyses.sections import fill
from vitprobe.commands.arguments import named
from vitprobe.errors import DataError, RecipeError, ResultError
from vitprobe.evaluation.finetune import Finetune
from vitprobe.models.sources import parse_spec


@pytest.fixture
def short():
    return Schedule.read("short")


@pytest.fixture
def ran(monkeypatch):
    """Commands that were run. One makes its outcome, unless it is told to fail."""
    commands = []

    def run(command, *, stdout, stderr):
        commands.append(command[3:])
        if "fail" in command:
            return SimpleNamespace(returncode=1)
        Path(command[3]).touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def job(folder, name, *words, **more):
    outcome = folder / name / "done"
    return Job(name, [str(outcome), *words], outcome, **more)


def test_every_schedule_is_read_and_another_is_refused():
    for name in ("gpu", "cpu", "short"):
        assert Schedule.read(name).name == name
    with pytest.raises(RecipeError, match="no schedule 'long'; choose one of gpu, cpu, short"):
        Schedule.read("long")


def test_bf16_becomes_fp32_where_it_is_slow_and_only_there(monkeypatch):
    for slow in (False, True):
        monkeypatch.setattr(study, "slow_bf16", lambda device, slow=slow: slow or None)
        plan = Schedule.read("short")
        assert plan.overrides("mae", 0)["precision"] == ("fp32" if slow else "bf16")
        assert plan.changes["finetune"]["precision"] == ("fp32" if slow else "bf16")
    assert "precision" not in Schedule.read("gpu").overrides("mae", 0)


def test_seed_0_of_all_systems_comes_first_and_systems_of_one_seed_come_once(short):
    names = [job.name for job in training(short, Path("runs"), Path("data.npz"))]
    assert {name.rsplit("-", 1)[0] for name in names[:6]} == set(study.SYSTEMS)
    assert names.count("teacher-0") == names.count("dino-0") == 1
    assert "teacher-1" not in names
    assert {"mae-2", "dmae-2", "dmae-hidden"} <= set(names)
    assert len(names) == len(set(names))


def test_distillation_waits_for_its_teacher(short):
    jobs = training(short, Path("runs"), Path("data.npz"))
    order = [job.name for job in jobs]
    for one in jobs:
        if one.name.startswith("dmae"):
            assert one.after == ("teacher-0",)
            assert order.index("teacher-0") < order.index(one.name)
            assert "distill.teacher=run:runs/teacher-0" in one.command
        else:
            assert one.after == ()


def test_overrides_of_a_system_win_over_those_of_all(short):
    plan = replace(short, changes={"every": {"batch_size": 96}, "dino": {"batch_size": 8}})
    assert plan.overrides("dino", 2)["batch_size"] == 8
    assert plan.overrides("mae", 2) == {
        "epochs": 6,
        "seed": 2,
        "snapshots": [0, 1, 3, 6],
        "batch_size": 96,
    }


def test_evaluations_wait_for_the_encoder_that_they_score(short):
    runs = Path("runs")
    jobs = {job.name: job for job in evaluation(short, runs, Path("data.npz"))}
    assert all(one.needs is not None for one in jobs.values())
    assert jobs["finetune-dmae-1-0.01"].needs == runs / "dmae-1" / "encoder.safetensors"
    kept = jobs["finetune-mae-0-1-kept3"].command
    assert kept[kept.index("--kept") + 1] == "3"
    assert kept[kept.index("--labels") + 1] == "1.0"
    assert {name for name in jobs if name.startswith("finetune-mae-1-0.01")} == {
        "finetune-mae-1-0.01", "finetune-mae-1-0.01-kept0", "finetune-mae-1-0.01-kept6"
    }  # fmt: skip
    name, spec, needed = model_spec("random", 1, runs)
    assert (name, spec) == ("Random 1", str(needed))
    assert needed == runs / "mae-1" / "snapshots" / "epoch_0000.safetensors"
    assert model_spec("dmae-all", 0, runs)[:2] == ("D-MAE all 0", "run:runs/dmae-all")


@pytest.mark.parametrize("name", ["gpu", "cpu", "short"])
def test_fine_tunings_are_of_so_many_updates_and_not_epochs(name):
    plan = Schedule.read(name)
    jobs = evaluation(plan, Path("runs"), Path("data.npz"))
    words = next(job.command for job in jobs if job.name == "finetune-mae-0-0.01")
    assert words[words.index("--updates") + 1] == str(plan.finetune_updates)
    changes = words[words.index("--set") + 1 :]
    Finetune(
        recipe="fashion_finetune",
        updates=plan.finetune_updates,
        overrides=dict(change.split("=") for change in changes),
    )


def test_commands_can_read_the_names_of_all_models(short):
    for job in evaluation(short, Path("runs"), Path("data.npz")):
        name, spec = named(job.command[2])
        assert name
        parse_spec(spec)


def test_done_runs_are_left_alone_and_halves_are_resumed(tmp_path, ran):
    done, half, new = (job(tmp_path, name) for name in ("done", "half", "new"))
    done.outcome.parent.mkdir()
    done.outcome.touch()
    state = tmp_path / "half" / "state.pt"
    state.parent.mkdir()
    state.touch()
    study._run([done, replace(half, resumable=state), new], 1)
    assert [command[1:] for command in ran] == [["--resume"], ["--force"]]
    study._run([done, half, new], 1)
    assert len(ran) == 2


def test_what_a_run_needs_and_is_not_there_leaves_it_out(tmp_path, ran, capsys):
    study._run([job(tmp_path, "scores", needs=tmp_path / "encoder")], 1)
    assert ran == []
    assert "scores: left out, since there is no" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_stops_what_waits_for_it(tmp_path, ran):
    jobs = [
        job(tmp_path, "teacher", "fail"),
        job(tmp_path, "student", after=("teacher",)),
        job(tmp_path, "other"),
    ]
    with pytest.raises(DataError, match=r"teacher failed with status 1; see '.*teacher\.log'"):
        study._run(jobs, 1)
    assert (tmp_path / "other" / "done").exists()
    assert not (tmp_path / "student" / "done").exists()


def test_a_part_of_the_study_is_chosen_by_name(short):
    jobs = training(short, Path("runs"), Path("data.npz"))
    assert [one.name for one in study._chosen(jobs, ("mae-1", "dino-0"))] == ["dino-0", "mae-1"]
    with pytest.raises(RecipeError, match=r"no run 'mae-7'; there are 18, .*mean 'd?mae-\d'\?"):
        study._chosen(jobs, ("mae-7",))


def test_names_of_runs_go_with_stages_that_have_runs(tmp_path):
    with pytest.raises(RecipeError, match="--only is of runs to train or evaluate"):
        main(study.Study("short", tmp_path / "runs", ("compare",), ("mae-0",)))
    with pytest.raises(RecipeError, match="no run 'mae-0'; there are "):
        main(study.Study("short", tmp_path / "runs", ("evaluate",), ("mae-0",)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("Teacher 0", "fashion_teacher"),
        ("MoCo-v3 2", "fashion_mocov3"),
        ("D-MAE all 0", "fashion_dmae"),
        ("Random 1", "fashion_mae"),
        ("MAE fine-tuned 2", "fashion_finetune"),
    ],
)
def test_the_recipe_of_a_model_follows_from_its_name(name, recipe):
    assert recipe_of(name) == recipe


def test_a_part_of_a_page_is_replaced_and_the_rest_is_left(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- runs -->\nold\n<!-- /runs -->\nbelow\n")
    fill(page, "runs", "new")
    fill(page, "runs", "newer")
    assert page.read_text() == "above\n<!-- runs -->\nnewer\n<!-- /runs -->\nbelow\n"
    with pytest.raises(ResultError, match="no part between <!-- other -->"):
        fill(page, "other", "text")


@pytest.mark.slow
def test_one_system_goes_from_images_to_findings(tmp_path, monkeypatch, short):
    plan = replace(
        short,
        images=96,
        epochs=2,
        seeds=1,
        snapshots=(0, 2),
        finetune_updates=2,
        changes={
            "every": {"batch_size": 32, "threads": 1, "optimizer.warmup_epochs": 0},
            "finetune": {"threads": 1},
        },
    )
    monkeypatch.setattr(Schedule, "read", lambda name: plan)
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(compare, "IMAGES", 48)
    rng = np.random.default_rng(0)
    data = tmp_path / "runs" / "data" / "fashion_96.npz"
    data.parent.mkdir(parents=True)
    np.savez(
        data,
        images=rng.integers(0, 256, (96, 1, 28, 28), np.uint8),
        labels=np.arange(96) % 10,
        test_images=rng.integers(0, 256, (50, 1, 28, 28), np.uint8),
        test_labels=np.arange(50) % 10,
    )
    for only in ("mae-0", "frozen-mae-0", "finetune-mae-0-0.1"):
        main(study.Study("short", tmp_path / "runs", ("train", "evaluate"), (only,)))
    main(study.Study("short", tmp_path / "runs", ("compare",)))
    found = Study(tmp_path / "results")
    assert found.methods == ("MAE", "Random")
    assert found.systems.provenance["images"]["count"] == 48
    assert set(found.training.models) == {"MAE 0", "MAE 2"}
    assert set(found.costs) == {"MAE 0"}
    assert len(found.by_layer("MAE 0", "linear")) == 13
    assert found.accuracy(("MAE 0",), "knn").between(0, 100).all()
    assert len(found.accuracy(("MAE 0",), "finetune", labels=0.1)) == 1
    assert findings.findings(found)["verdict"].str.endswith("not measured").all()
