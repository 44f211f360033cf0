"""Figures of the study: drawn from the committed results alone, byte for byte."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import zlib
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import vitprobe as vp
from analyses.fashion import findings, tables
from analyses.fashion.reading import RESULTS, Study
from figures.__main__ import FIGURES, captions
from figures.common import write

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "figures"
DRAWN_WITH = ("matplotlib", "numpy", "scipy", "pandas", "xarray", "pillow", "fonttools")
"""Packages whose versions may move a byte."""
ZLIB = "4c606a53bd9647ddd726e0dabed9b0ee"
MAY_IMPORT = re.compile(
    r"__future__|collections\.abc|pathlib|typing|numpy|matplotlib.*|PIL"
    r"|analyses\.fashion\.reading|figures\.(common|heads)|vitprobe\.(plots\.style|statistics)"
)
READS = {"open", "open_result", "open_scores", "read_text", "read_bytes", "load", "loadtxt", "glob"}


@pytest.fixture(scope="module")
def study():
    if not (RESULTS / "systems.nc").exists():
        pytest.skip("there are no committed results in analyses/fashion/results")
    return Study()


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pinned():
    """Skips where other versions than those of constraints.txt would draw."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    for package in DRAWN_WITH:
        if version(package) != pins[package]:
            pytest.skip(
                f"{package} is {version(package)}, the figures were drawn by {pins[package]}"
            )
    packed = zlib.compress(b"".join(i.to_bytes(2, "big") for i in range(20_000)), 6)
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != ZLIB:
        pytest.skip(f"zlib {zlib.ZLIB_RUNTIME_VERSION} packs otherwise than that of the figures")


def _redrawn(study, name, folder):
    with vp.plots.paper_style():
        return write(importlib.import_module(f"figures.{name}").draw(study), folder / name)


def test_a_figure_is_redrawn_byte_for_byte(study, pinned, tmp_path):
    for path in _redrawn(study, "f10_cost", tmp_path):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_redrawn_byte_for_byte(study, pinned, name, tmp_path):
    for path in _redrawn(study, name, tmp_path):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name


def test_every_figure_is_committed_with_fonts_in_it_and_a_caption(study):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FIGURES:
        data = (FOLDER / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in data
        assert b"/Type3" not in data
        assert (FOLDER / f"{name}.png").exists()
        assert f"]({name}.png)" in page


def test_figures_and_results_take_three_megabytes_at_most(study):
    paths = [path for path in FOLDER.iterdir() if path.suffix in (".pdf", ".png")]
    paths += list(RESULTS.iterdir())
    assert sum(path.stat().st_size for path in paths) < 3e6


def test_captions_and_tables_are_those_of_the_results(study):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert captions(study) in page
    judged = findings.findings(study)
    assert findings.findings_table(judged) in (ROOT / "analyses" / "README.md").read_text("utf-8")
    own = (ROOT / "analyses" / "fashion" / "README.md").read_text(encoding="utf-8")
    assert tables.accuracies(study) in own
    assert tables.runs(study) in own


def test_every_number_leads_to_a_recipe_a_seed_and_a_checkpoint(study):
    known = {study.systems.describe(name)["sha256"] for name in study.systems.models}
    known |= {study.distillation.describe(name)["sha256"] for name in study.distillation.models}
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in known)
    assert set(study.scores["sha256"]) <= known


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_figures_read_nothing_but_what_the_study_hands_them(path):
    if path.stem in ("demo", "__main__"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(MAY_IMPORT.fullmatch(one.name) for one in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert MAY_IMPORT.fullmatch(node.module or ""), ast.unparse(node)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            assert called not in READS, ast.unparse(node)


class Reduced(Study):
    """The committed results without DINO and fine-tuning, and with one seed of MAE."""

    def seeds(self, method):
        return {"DINO": (), "MAE": super().seeds("MAE")[:1]}.get(method, super().seeds(method))

    @property
    def scores(self):
        table = Study.scores.func(self)
        return table[table["protocol"] != "finetune"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_cope_with_seeds_and_systems_that_are_not_there(study, name):
    module = importlib.import_module(f"figures.{name}")
    with vp.plots.paper_style():
        figure = module.draw(Reduced())
        figure.draw_without_rendering()
    assert "nan" not in module.caption(Reduced())
