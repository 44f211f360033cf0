"""Figures in general: given axes, global style, files, names, bytes that repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from plots.synthetic import ALL, Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.style import layer_ticks, shorten, subjects


def save_some(out: Path) -> None:
    block = np.full((3, 3), 0.5)
    block[0, 0] = np.nan
    result = comparison({"A": Subject(2), "B": Subject(2)}, cka={("A", "B"): block})
    plots.save(plots.cka_grid(result), out / "grid")
    plots.save(plots.attention_panels(result, "attention_distance"), out / "panels")
    plots.save(plots.attention_overlay(result, "attention_entropy"), out / "overlay")
    plots.save(plots.interval_width(result, "cka", "A", "B"), out / "width")
    plots.save(plots.differences(result), out / "differences")


def test_untrained_twins_are_dashed_in_the_colour_of_their_model():
    result = comparison(
        {name: Subject(2) for name in ("A", "B", "B (untrained)")},
        measures=(*ALL, "token_cosine"),
        references={"B": "B (untrained)"},
    )
    assert subjects(result) == ("A", "B")
    for ax in (
        plots.attention_overlay(result, "attention_distance"),
        plots.token_curves(result, "token_cosine"),
    ):
        own, twin = ax.lines[1:3]
        assert (own.is_dashed(), twin.is_dashed()) == (False, True)
        assert own.get_color() == twin.get_color()
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["A", "B", "untrained twin"]
    assert len([ax for ax in plots.cka_grid(result).axes if ax.get_aspect() == 1]) == 3


def test_axes_given_are_used_and_returned(alike):
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.cka_heatmap(alike, "MAE", "DeiT", ax=left) is left
    assert plots.attention_distance(alike, "MAE", ax=right) is right
    assert plots.attention_overlay(alike, "sink_mass", ax=right) is right
    assert plt.get_fignums() == [figure.number]


def test_global_style_stays_as_it_was(alike):
    before = dict(mpl.rcParams)
    plots.cka_grid(alike)
    plots.attention_overlay(alike, "attention_distance")
    assert dict(mpl.rcParams) == before


def test_unknown_names_are_refused(alike):
    with pytest.raises(ResultError, match="no model 'MEA'"):
        plots.cka_heatmap(alike, "MEA", "DeiT")
    with pytest.raises(ResultError, match="was not measured"):
        plots.attention_panels(alike, "attention_distanc")


def test_saved_pdf_embeds_truetype_fonts_and_svg_keeps_text(alike, tmp_path):
    paths = plots.save(plots.cka_heatmap(alike, "MAE", "DeiT"), tmp_path / "cka")
    assert [path.name for path in paths] == ["cka.pdf", "cka.svg", "cka.png"]
    pdf = paths[0].read_bytes()
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf
    svg = paths[1].read_text()
    assert ">Layer of MAE</text>" in svg
    assert "<dc:date>" not in svg


@pytest.mark.slow
def test_pdf_and_svg_are_byte_identical_in_another_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    save_some(here)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from plots.test_style import save_some; save_some(Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).resolve().parents[1]), str(there)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "agg"},
    )
    files = [path for path in here.iterdir() if path.suffix in {".pdf", ".svg"}]
    assert len(files) == 10
    for path in files:
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name


def test_figures_stay_small(tmp_path):
    result = comparison({"A": Subject(depth=24, heads=16)})
    _, svg, _ = plots.save(plots.cka_heatmap(result, "A", "A"), tmp_path / "cka")
    assert svg.stat().st_size < 200_000
    assert "<image" not in svg.read_text()


@pytest.mark.parametrize(
    ("last", "most", "expected"),
    [
        (12, 13, list(range(13))),
        (24, 13, list(range(0, 25, 2))),
        (12, 5, [0, 3, 6, 9, 12]),
        (0, 13, [0]),
        (6, 5, [0, 2, 4, 6]),
    ],
)
def test_layer_ticks_reach_the_last_layer(last, most, expected):
    assert layer_ticks(np.arange(last + 1), most) == expected


def test_shorten_keeps_both_ends():
    assert shorten("short", 10) == "short"
    cut = shorten("DINOv2 small, patch 14, with registers", 20)
    assert len(cut) <= 20
    assert cut.startswith("DINOv2")
    assert cut.endswith("sters")


def test_formats_may_be_fewer(alike, tmp_path):
    ax = plots.sink_mass(alike, "MAE")
    assert plots.save(ax, tmp_path / "few", ["png", "pdf"]) == [
        tmp_path / "few.pdf",
        tmp_path / "few.png",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"few.pdf", "few.png"}
    with pytest.raises(ResultError, match="not written as 'eps'; choose from pdf, svg and png"):
        plots.save(ax, tmp_path / "none", ["eps"])
    with pytest.raises(ResultError, match=r"\['png'\] and not 'png'"):
        plots.save(ax, tmp_path / "none", "png")


def test_a_name_may_say_its_ending(alike, tmp_path):
    ax = plots.sink_mass(alike, "MAE")
    for name in ("first.v2", "second.pdf"):
        made = plots.save(ax, tmp_path / name)
        stem = name.removesuffix(".pdf")
        assert [path.name for path in made] == [f"{stem}.{kind}" for kind in ("pdf", "svg", "png")]
