"""What notebooks show: whole tables, escaped, readable in any theme and by a screen reader."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from models_for_tests import tiny
from plots.synthetic import Subject, comparison

import vitprobe as vp
from vitprobe.scores import Score, Scores

HOSTILE = "<script>alert('x')</script>&\""
SCORE = Score("MAE", "mae.pth", "knn", "digits", 1360, "top1", 0.912, 0.87, 0.93, layer=3)


class Page(HTMLParser):
    """Balance of tags, text of cells, and what a screen reader is told of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.scopes = 0
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)
        self.scopes += tag == "th" and dict(attrs)["scope"] in ("row", "col")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("loaded") / "tiny.pth"
    torch.save({"model": tiny().module.state_dict() | {"mask_token": torch.zeros(1)}}, path)
    return vp.load(str(path), name=HOSTILE, heads=3)


def shown() -> dict[str, object]:
    subjects = {HOSTILE: Subject(2), "B": Subject(3, assumed=("heads",))}
    result = comparison(subjects, notes=(HOSTILE,))
    return {"comparison": result, "scores": Scores([replace(SCORE, model=HOSTILE)] * 25)}


@pytest.mark.parametrize("what", ["model", "report", "comparison", "scores"])
def test_cards_are_whole_escaped_and_told_to_screen_readers(what, loaded):
    known = {"model": loaded, "report": replace(loaded.report, dialect=HOSTILE), **shown()}
    html = known[what]._repr_html_()
    page = Page(html)
    assert "script" not in page.seen
    assert HOSTILE in " ".join(page.text)
    assert page.seen.count("caption") == page.seen.count("table") > 0
    assert page.scopes == page.seen.count("th")
    # Colours are the theme's own; no link or picture is fetched.
    assert "http" not in html
    assert not re.search(r":\s*#", html)
    assert len(html) < 12_000


def test_a_model_tells_assumptions_and_what_the_file_filled(tmp_path):
    path = tmp_path / "tiny.pth"
    torch.save(tiny().module.state_dict(), path)
    model = vp.load(str(path), name="A", heads=3)
    text = " ".join(Page(model._repr_html_()).text)
    assert "100 % of the encoder loaded" in text
    assert "of them assumed: " in text
    assert f"{sum(p.numel() for p in model.module.parameters()):,}" in text
    assert "matched" in text
    assert model.sha256[:12] in text


def test_a_fraction_below_one_is_not_rounded_to_all(loaded):
    html = replace(loaded.report, loaded_fraction=0.99999)._repr_html_()
    assert "99.9 %" in html
    assert "100 %" not in html


def test_a_comparison_tells_how_its_measures_are_read():
    result = comparison({"A": Subject(2), "B": Subject(2)}, groups={"G": ["A", "B"]})
    text = " ".join(Page(result._repr_html_()).text)
    assert "Comparison of 2 models on 64 images" in text
    assert ".similarity('cka', a, b)" in text
    assert ".attention('attention_distance', model)" in text
    assert "A, B" in text


def test_scores_say_their_conditions_and_how_many_are_left_out():
    rows = [replace(SCORE, seed=i, kept=4, settings={"k": 20}) for i in range(25)]
    text = " ".join(Page(Scores(rows)._repr_html_()).text)
    assert "25 scores" in text
    assert "0.87 to 0.93" in text
    assert "layer 3, 4 blocks kept, seed 1, k 20" in text
    assert "… and 5 more" in text
    assert "nan" not in Scores([replace(SCORE, low=float("nan"))])._repr_html_()
