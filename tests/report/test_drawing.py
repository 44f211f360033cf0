"""Figures of a report by several processes: the same as by one, and none is lost."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from plots.synthetic import Subject, comparison

from vitprobe.report import drawing
from vitprobe.report.drawing import draw
from vitprobe.report.lists import lists_of


@pytest.fixture(scope="module")
def result():
    return comparison({"MAE": Subject(2, 2), "DeiT": Subject(2, 2)})


@pytest.fixture(scope="module")
def alone(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "figures"
    return draw(result, folder, lists_of(result), processes=1), contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_figures_do_not_depend_on_how_many_drew_them(result, alone, tmp_path):
    pictures = draw(result, tmp_path / "figures", lists_of(result), processes=2)
    assert pictures == alone[0]
    assert contents(tmp_path / "figures") == alone[1]
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    assert all(picture.svg and picture.points for picture in pictures.selves)


def test_what_a_helper_did_not_bring_is_drawn_all_the_same(result, alone, tmp_path, monkeypatch):
    expected = {name: data for name, data in alone[1].items() if name.endswith(".svg")}
    for program, processes in (("/bin/false", 2), ("/no/such/program", 3)):
        monkeypatch.setattr(sys, "executable", program)
        folder = tmp_path / str(processes)
        drawn = draw(result, folder, lists_of(result), processes=processes, formats=["svg"])
        assert drawn == alone[0]
        assert contents(folder) == expected


def test_warnings_of_helpers_are_given_again(tmp_path):
    # No font of matplotlib's has this letter.
    result = comparison({"模型": Subject(2, 2), "DeiT": Subject(2, 2)})
    with warnings.catch_warnings(record=True) as first:
        warnings.simplefilter("always")
        draw(result, tmp_path / "one", lists_of(result), processes=1, formats=["svg"])
    with warnings.catch_warnings(record=True) as second:
        warnings.simplefilter("always")
        draw(result, tmp_path / "two", lists_of(result), processes=2, formats=["svg"])
    texts = [{str(one.message) for one in told} for told in (first, second)]
    assert texts[0]
    assert texts[0] == texts[1]


def test_measures_of_a_users_own_are_drawn_by_the_process_that_knows_them(
    result, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr(drawing, "is_ours", lambda name: name != "cka")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert draw(result, tmp_path / "figures", lists_of(result), processes=2) == alone[0]


def test_a_figure_that_fails_fails_here_and_leaves_no_helper(result, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no figure")

    monkeypatch.setattr(drawing, "_drawn", broken)
    started = []
    original = subprocess.Popen

    def popen(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(ValueError, match="no figure"):
        draw(result, tmp_path / "figures", lists_of(result), processes=2)
    assert [process.poll() is None for process in started] == [False]
