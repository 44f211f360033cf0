"""Reading the logs of several runs: a tidy table, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitprobe.errors import ResultError
from vitprobe.runs import COLUMNS, final_values, read_runs, select


def run(folder: Path, method: str, lines: list[dict[str, Any]], *, distilled: bool = False) -> None:
    folder.mkdir(parents=True)
    recipe = f'data = "digits"\n[method]\nname = "{method}"\n'
    if distilled:
        recipe += '[distill]\nteacher = "run:there"\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def line(epoch: int, **values: float | None) -> dict[str, Any]:
    return {"step": 5 * epoch, "epoch": epoch, **values}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run(tmp_path / "b", "supervised", [line(1, loss=2.0), line(2, loss=1.0, test_accuracy=0.5)])
    run(
        tmp_path / "deep" / "a", "mae",
        [line(1, loss=0.9, lr=0.1, images_per_s=12345.6), line(2, loss=0.8, lr=0.2)],
        distilled=True,
    )  # fmt: skip
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "recipe.toml").touch()  # not a run: nothing was logged there
    return tmp_path


def test_every_number_is_a_row(folder: Path) -> None:
    runs = read_runs(folder)
    assert tuple(runs.columns) == COLUMNS
    assert list(runs.itertuples(index=False, name=None)) == [
        ("b", "supervised", 1.0, 5, "loss", 2.0),
        ("b", "supervised", 2.0, 10, "loss", 1.0),
        ("b", "supervised", 2.0, 10, "test_accuracy", 0.5),
        ("deep/a", "mae, distilled", 1.0, 5, "loss", 0.9),
        ("deep/a", "mae, distilled", 1.0, 5, "lr", 0.1),
        ("deep/a", "mae, distilled", 1.0, 5, "images_per_s", 12345.6),
        ("deep/a", "mae, distilled", 2.0, 10, "loss", 0.8),
        ("deep/a", "mae, distilled", 2.0, 10, "lr", 0.2),
    ]


def test_a_run_itself_is_a_folder_of_one_run(folder: Path) -> None:
    assert set(read_runs(folder / "b")["run"]) == {"b"}


def test_what_is_no_number_is_no_row(tmp_path: Path) -> None:
    run(tmp_path / "run", "mae", [line(1, loss=0.5, gap=None) | {"note": "x", "flag": True}])
    assert list(read_runs(tmp_path)["metric"]) == ["loss"]


@pytest.mark.parametrize(
    "damage", ['{"step": 15, "epo', "\x00\x00", '{"step": 15, "loss": 1.0}', "[1, 2]", ""]
)
def test_a_damaged_line_is_left_out_and_said(folder: Path, damage: str) -> None:
    expected = read_runs(folder)
    with (folder / "b" / "log.jsonl").open("a") as log:
        log.write(f"{damage}\n")
    with pytest.warns(UserWarning, match=r"a line of '.*log\.jsonl' cannot be read, left out"):
        assert read_runs(folder).equals(expected)


def test_the_metrics_of_most_interest_come_first_and_others_when_asked_for(folder: Path) -> None:
    runs = read_runs(folder)
    assert list(select(runs)["metric"].unique()) == ["loss", "test_accuracy", "images_per_s"]
    assert list(select(runs, ["lr", "loss", "lr"])["metric"].unique()) == ["lr", "loss"]
    with pytest.raises(ResultError, match=r"logged 'los'; there are loss, .*mean 'loss'\?"):
        select(runs, ["los"])


def test_final_values_are_aligned_text(folder: Path) -> None:
    assert final_values(select(read_runs(folder))).splitlines() == [
        "run     method          epoch  loss  test_accuracy  images_per_s",
        "b       supervised          2     1            0.5             –",
        "deep/a  mae, distilled      2   0.8              –        12,346",
    ]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="there is no folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ResultError, match=r"holds no run of vitprobe pretrain: no folder in it"):
        read_runs(tmp_path)
    run(tmp_path / "new", "mae", [])
    with pytest.raises(ResultError, match="have logged nothing yet"):
        read_runs(tmp_path)


def test_runs_that_have_logged_nothing_are_named(folder: Path) -> None:
    run(folder / "young", "mae", [])
    (folder / "young" / "log.jsonl").unlink()
    (folder / "young" / "state.pt").touch()
    with pytest.warns(UserWarning, match=r"left out, as no epoch .*young'"):
        assert "young" not in final_values(read_runs(folder))


@pytest.mark.parametrize("recipe", ["not toml", "epochs = 3", "method = 3", "[method]"])
def test_a_damaged_recipe_is_named(folder: Path, recipe: str) -> None:
    (folder / "b" / "recipe.toml").write_text(recipe)
    with pytest.raises(ResultError, match=r"b/recipe\.toml' is no recipe of a run \("):
        read_runs(folder)
