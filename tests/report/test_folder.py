"""The report's folder: written whole or not at all, and nothing of others replaced."""

from __future__ import annotations

import os
import re
import sys

import matplotlib as mpl
import pytest
from plots.synthetic import Subject, comparison

from vitprobe.errors import ResultError
from vitprobe.report import report
from vitprobe.report.figures import file_names


def small() -> object:
    return comparison({"A": Subject(1, 1)}, measures=("attention_entropy",), images=4)


def test_existing_folder_is_refused_and_force_replaces_only_a_report(tmp_path):
    out = tmp_path / "out"
    report(small(), out)
    (out / "figures" / "stale.pdf").write_text("old")
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ResultError, match=r"out' exists"):
        report(small(), out)
    report(small(), out, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    assert not (out / "figures" / "stale.pdf").exists()


def test_formats_say_which_files_of_figures_there_are_and_are_linked(tmp_path):
    page = report(small(), tmp_path / "out", formats=("png",))
    endings = {path.suffix for path in (tmp_path / "out" / "figures").iterdir()}
    assert endings == {".svg", ".png"}
    links = set(re.findall(r'href="figures/[^"]+\.(\w+)"', page.read_text()))
    assert links == {"svg", "png"}
    with pytest.raises(ResultError, match="not written as 'eps'"):
        report(small(), tmp_path / "other", formats=("eps",))
    assert not (tmp_path / "other").exists()


def test_force_never_replaces_other_folders_or_files(tmp_path):
    (tmp_path / "figures").mkdir()
    with pytest.raises(ResultError, match="no vitprobe report"):
        report(small(), tmp_path, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="is no folder"):
        report(small(), tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    assert report(small(), tmp_path / "empty", force=True).is_file()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["vitprobe.report.folder"], "render", fail)
    with pytest.raises(ResultError, match="No space left on device"):
        report(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ResultError, match="Permission denied"):
        report(small(), tmp_path / "out")


def test_parent_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        report(small(), tmp_path / "file" / "out")


def test_report_changes_no_global_style(tmp_path):
    before = dict(mpl.rcParams)
    report(small(), tmp_path / "out")
    assert dict(mpl.rcParams) == before


def test_file_names_are_safe_and_different():
    names = file_names(("a/b", "a b", "A-B", "../x", "日本"))
    assert file_names(("mae.png", "v1.5")) == {"mae.png": "mae-png", "v1.5": "v1.5"}
    assert names["a/b"] == "a-b"
    assert len({name.lower() for name in names.values()}) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name) for name in names.values())
