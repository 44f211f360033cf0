"""The report: whole, self-contained, readable."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from markupsafe import escape
from plots.synthetic import EVERY, Subject, comparison

from vitprobe.measures.registry import MEASURES
from vitprobe.report import report
from vitprobe.report.words import MINUS
from vitprobe.results import open_result

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page: headings, ids, links, labels, and balanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.images: list[str] = []
        self.unlabelled = 0
        self.figures = 0
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag == "image":
            self.images.append(values["href"])
        self.sources += [values[key] for key in ("src", "xlink:href", "srcset") if key in values]
        if tag == "figure":
            self.figures += 1
        if tag == "svg":
            self.unlabelled += not (values.get("role") == "img" and values.get("aria-label"))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def result():
    block = np.full((5, 3), 0.4)
    block[1, 1] = np.nan
    return comparison(
        {
            "MAE <tiny>": Subject(
                4,
                4,
                assumed=("heads", "mean", "std"),
                extra={"training": {"method": "mae", "epochs": 40, "recipe": {"lr": 1}}},
            ),
            "small": Subject(2, 2, grid=(7, 7), patch=4, prefix=0, extra={"report": None}),
        },
        cka={("MAE <tiny>", "small"): block},
        notes=("1 image could not be decoded: broken.jpg.",),
    )


@pytest.fixture(scope="module")
def path(result, tmp_path_factory) -> Path:
    return report(result, tmp_path_factory.mktemp("reports") / "out")


@pytest.fixture(scope="module")
def html(path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_folder_holds_page_figures_tables_and_result(path, result):
    out = path.parent
    assert path.name == "report.html"
    assert {p.name for p in out.iterdir()} == {"report.html", "figures", "tables", "results.nc"}
    assert not list(out.parent.glob(".out.*"))
    assert oct(out.stat().st_mode & 0o777) == "0o755"
    stems = {p.stem for p in (out / "figures").iterdir()}
    assert {"cka_MAE-tiny_small", "cka_all", "attention_distance_all", "sink_mass"} <= stems
    for stem in stems:
        assert {p.suffix for p in (out / "figures").glob(f"{stem}.*")} == {".pdf", ".svg", ".png"}
    table = pd.read_csv(out / "tables" / "attention_distance.csv")
    assert len(table) == 4 * 4 + 2 * 2
    assert (out / "tables" / "first_direction_share.csv").is_file()
    assert open_result(out / "results.nc").models == result.models


def test_page_loads_nothing(page, html):
    assert page.sources == []
    assert not page.tags & {"link", "iframe", "img"}
    assert all(data.startswith("data:image/") for data in page.images)
    assert not re.search(r"url\((?!#)", html)
    assert not [link for link in page.links if "//" in link]


def test_links_lead_somewhere(page, path):
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (path.parent / link).is_file()


def test_ids_are_unique_and_references_resolve(page, html):
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r"url\(#([^)]+)\)", html)) | set(
        re.findall(r'href="#([^"]+)"', html)
    )
    assert references <= set(page.ids)


def test_headings_descend_one_step_at_a_time(page):
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))


def test_every_figure_has_a_label(page):
    # Depth, one pair, two models alone, shares, three overlays, three measures of a model and two
    # of one that has no prefix tokens, three forests of differences.
    assert page.figures == 1 + 1 + 2 + 1 + 3 + 3 + 2 + 3
    assert page.unlabelled == 0


def test_page_says_what_a_reader_needs(html):
    for text in (
        "MAE &lt;tiny&gt;",
        "MAE &lt;tiny&gt;: heads (4) assumed",
        "Assumed, not read: mean (0.485 / 0.456 / 0.406) and std",
        "small has no prefix tokens, so its sink mass is 0 by construction.",
        "rounded up: 1 of 4 in MAE &lt;tiny&gt; and 1 of 2 in small.",
        '<tr class="assumed"><th scope="row">heads</th>',
        "a3" * 32,
        "9f" * 32,
        "1 image could not be decoded: broken.jpg.",
        "1 of 15 layer pairs is undefined",
        "is shown relative to it (attention distance and attention entropy)",
        "A Closer Look at Self-Supervised Lightweight Vision Transformers",
        "@software{vitprobe",
        "trained by vitprobe: method mae, epochs 40",
        "HSIC(K, L)",
        "5 January 2026",
        "5.54 M parameters, input 3 × 224 × 224",
        f"{MINUS}1 to 1; 0 on average",
        "tokens cls and mean",
    ):
        assert text in html, text
    assert "<tiny>" not in html
    assert "as luminance" not in html


def test_page_is_light_in_both_senses(html, path):
    assert path.stat().st_size < 600_000
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "#24292f" not in html.split("</style>", 1)[1]


def text_of(result, folder):
    """The text of a page, without the files of figures that it does not hold."""
    return report(result, folder / "out", formats=["svg"]).read_text(encoding="utf-8")


@pytest.mark.slow
def test_five_models_stay_below_three_megabytes(tmp_path):
    subjects = {f"model {i}": Subject(12, 12) for i in range(5)}
    result = comparison(subjects, images=8, measures=("cka", "attention_distance", "sink_mass"))
    assert report(result, tmp_path / "out").stat().st_size < 3_000_000


@pytest.mark.parametrize("measures", [("cka",), ("attention_entropy", "sink_mass")])
def test_any_subset_of_measures_makes_a_page(measures, tmp_path):
    result = comparison({"A": Subject(2)}, measures=measures)
    page = Page(text_of(result, tmp_path))
    assert ("similarity" in page.ids) == ("cka" in measures)
    assert ("attention" in page.ids) == ("cka" not in measures)


def test_a_measure_that_is_undefined_everywhere_is_a_sentence_and_no_figure(tmp_path):
    gone = {
        "similarity": "svcca",
        "attention": "class_attention_entropy",
        "tokens": "fourier_amplitude",
    }
    measures = ("cka", "procrustes", "sink_mass", "token_cosine", *gone.values())
    result = comparison({"A": Subject(2), "B": Subject(2)}, measures=measures)
    for group, measure in gone.items():
        result.tree[group][measure][:] = np.nan
    result.tree["tokens"] = xr.DataTree(result.tree["tokens"].to_dataset().isel(step=slice(0)))
    html = text_of(result, tmp_path)
    for measure in gone.values():
        title = MEASURES[measure].title
        assert f"Undefined in every layer, as the notes say: {title}." in html
        assert not list((tmp_path / "out/figures").glob(f"*{measure}*"))
        assert (tmp_path / f"out/tables/{measure}.csv").exists()
    assert not list((tmp_path / "out/figures").glob("fourier_*"))
    assert (tmp_path / "out/figures/procrustes.svg").exists()
    assert (tmp_path / "out/figures/token_cosine.svg").exists()


def test_the_page_says_whether_cka_is_of_all_images_or_of_blocks(tmp_path):
    result = comparison({"A": Subject(2)}, measures=("cka",))
    blocked = text_of(result, tmp_path / "blocked")
    result.provenance["cka_value"] = "exact"
    exact = text_of(result, tmp_path / "exact")
    assert "accumulated over blocks of 128 images" in blocked
    assert "over all images at once" in exact
    assert "accumulated over blocks" not in exact


def test_sentences_about_measures_that_are_absent_are_absent(tmp_path):
    result = comparison(
        {"A": Subject(2), "B": Subject(2)},
        measures=("cka", "attention_distance_raw", "attention_entropy_all", "sink_mass"),
        estimator="biased",
    )
    html = text_of(result, tmp_path)
    # What a measure says of itself under Methods may name the others.
    for text in ("describe only the rest.</p>", "renormalise it", "First blocks"):
        assert text not in html, text
    assert "(for entropy over all tokens, over all queries)" in html


def test_images_of_a_model_of_one_channel_are_said_to_be_luminance(tmp_path):
    grey = Subject(1, extra={"input_size": [1, 224, 224]})
    result = comparison({"A": grey, "B": Subject(1)}, measures=("rankme",), images=4)
    html = text_of(result, tmp_path)
    assert "; given to A, of one channel, as luminance." in html


def test_more_than_three_measures_relative_to_uniform_are_not_listed(tmp_path):
    names = [name for name in EVERY if name.startswith("attention_distance")]
    result = comparison(
        {"A": Subject(1), "B": Subject(1, grid=(7, 7))}, measures=tuple(names), images=4
    )
    html = text_of(result, tmp_path)
    assert "is shown relative to it (the attention measures in px or nats)" in html


def of_seeds(seeds: int, folder: Path) -> tuple[str, Path]:
    groups = {method: [f"{method} {i}" for i in range(seeds)] for method in "AB"}
    result = comparison(
        {
            name: Subject(1, sink=np.full((1, 3), 0.1))
            for names in groups.values()
            for name in names
        },
        measures=("svcca", "sink_mass"),
        images=8,
        groups=groups,
    )
    path = report(result, folder / str(seeds), formats=["svg"])
    html = path.read_text(encoding="utf-8")
    return html[html.index('<section id="seeds"') : html.index('<section id="files"')], path


def test_the_section_of_seeds_says_how_its_intervals_are_made(tmp_path):
    section, path = of_seeds(2, tmp_path)
    assert "the jackknife that leaves one seed out" in section
    assert "percentage points" in section
    # Of six pairs of models the forest draws that of the first seeds.
    html = path.read_text(encoding="utf-8")
    assert "over 6 listed differences; hollow and grey: cannot be told apart (1 of 1)." in html
    assert (path.parent / "figures/seeds_sink_mass.svg").is_file()


def test_one_seed_a_method_has_no_interval_and_no_figure_of_seeds(tmp_path):
    section, path = of_seeds(1, tmp_path)
    assert section.count("There is one seed a method, and so no interval.") == 1
    for text in ("95", "jackknife", "Student", "one seed: no interval", "<figure"):
        assert text not in section, text
    assert not (path.parent / "figures/seeds_sink_mass.svg").exists()


def test_a_model_without_prefix_tokens_has_a_page_of_sink_mass_alone(tmp_path):
    result = comparison(
        {"A": Subject(2), "B": Subject(2, prefix=0)}, measures=("sink_mass",), images=4
    )
    page = Page(text_of(result, tmp_path))
    # The overlay, the heads of A, and the forest.
    assert page.figures == 3
    assert {"results.nc", "tables/sink_mass.csv", "figures/sink_mass_all.svg"} <= set(page.links)


def test_cells_of_heatmaps_have_crisp_edges(html):
    assert ".cells { shape-rendering: crispEdges; }" in html
    # Three heatmaps and their widths, and a bar beside each.
    assert len(re.findall(r'<g class="cells">', html)) == 2 * 2 * 3


def test_dots_of_heatmaps_are_on_the_page(tmp_path):
    block = np.full((3, 3), 0.5)
    block[0, 1] = 0.1
    result = comparison(
        {"A": Subject(2), "B": Subject(2)}, measures=("cka",), cka={("A", "B"): block}, floor=0.3
    )
    html = text_of(result, tmp_path)
    assert sum(run.count("h0") for run in re.findall(r'class="dots" d="([^"]+)"', html)) == sum(
        int((result.cka(a, b) <= result.floor("cka", a, b)).sum())
        for a, b in (("A", "B"), ("A", "A"), ("B", "B"))
    )


def test_a_heatmap_can_be_switched_to_the_widths_of_its_intervals(html, page, path):
    switches = re.findall(r'<input type="radio" name="([^"]+)"( checked)?', html)
    assert len(switches) == 2 * 3
    assert [bool(checked) for _, checked in switches] == 3 * [True, False]
    for name in {name for name, _ in switches}:
        assert (path.parent / "figures" / f"{name}_width.pdf").is_file()
    # Without the selector that the switch needs, and in print, both are shown.
    rule = html.index("figure .width, figure:has(")
    supported = html.rindex("@supports selector(:has(*))", 0, rule)
    assert supported < html.rindex("@media screen", 0, rule)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    subjects = {f"{method} {i}": Subject(3) for method in "AB" for i in (1, 2)}
    subjects["A 1 (untrained)"] = Subject(3)
    result = comparison(
        subjects,
        measures=EVERY,
        images=16,
        groups={"A": ["A 1", "A 2"], "B": ["B 1", "B 2"]},
        references={"A 1": "A 1 (untrained)"},
    )
    return report(result, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.slow
def test_every_measure_has_a_figure_a_table_and_its_methods(whole):
    html = whole.read_text(encoding="utf-8")
    page = Page(html)
    for measure, info in MEASURES.items():
        stems = {path.stem for path in (whole.parent / "figures").glob(f"{measure}*.svg")}
        assert stems, measure
        assert f"tables/{measure}.csv" in page.links
        for text in (
            info.formula.replace("`", ""),
            info.source,
            info.interval,
            info.null,
            info.caveats,
        ):
            assert str(escape(text)) in html, (measure, text)
    assert html.count('<details class="method">') == len(MEASURES)
    assert {"similarity", "attention", "tokens", "differences", "seeds"} <= set(page.ids)
    assert page.unlabelled == 0
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.slow
def test_twins_and_further_seeds_have_no_figures_of_their_own(whole):
    stems = {path.stem for path in (whole.parent / "figures").iterdir()}
    assert "cka_A-1_A-1-untrained" in stems
    assert "cka_A-1_B-1" in stems
    assert not [stem for stem in stems if "A-2" in stem or "B-2" in stem]
    assert not [stem for stem in stems if stem.startswith("cka_A-1-untrained")]
    html = whole.read_text(encoding="utf-8")
    assert "is shown only beside its model" in html
    assert "show the first (A 1 and B 1)" in html


@pytest.mark.slow
def test_lists_on_the_page_are_those_of_the_tables(whole):
    html = whole.read_text(encoding="utf-8")
    tables = whole.parent / "tables"
    table = pd.read_csv(tables / "differences.csv")
    words = ("higher", "lower", "cannot be told apart")
    section = html[html.index('id="differences"') : html.index('id="seeds"')]
    for word in words:
        assert (
            section.count(f'<td data-label="A is">{word}</td>') == (table["verdict"] == word).sum()
        )
    seeds = html[html.index('id="seeds"') : html.index('id="files"')]
    table = pd.read_csv(tables / "group_differences.csv")
    for word in words:
        assert seeds.count(f'<td data-label="A is">{word}</td>') == (table["verdict"] == word).sum()
    assert len(pd.read_csv(tables / "group_means.csv")) == seeds.count('data-label="Method"')
    assert (tables / "group_similarity.csv").is_file()


def test_the_same_result_gives_the_same_files(tmp_path):
    result = comparison({"A": Subject(2)}, measures=("cka",))
    for name in ("one", "two"):
        report(result, tmp_path / name)
    for file in (tmp_path / "one").rglob("*"):
        if file.suffix in {".html", ".pdf", ".svg", ".csv"}:
            assert (
                file.read_bytes()
                == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
            )


def test_what_was_refused_is_on_the_page_with_its_reason(tmp_path):
    subjects = {
        "ViT": Subject(depth=4),
        "XCiT": Subject(depth=3, kinds=("global", "channels", "class token"), prefix=0),
        "conv": Subject(depth=2, no_attention="it is convolutional"),
    }
    html = text_of(comparison(subjects, images=8), tmp_path)
    assert "<h3>Not measured</h3>" in html
    assert "conv has no attention: it is convolutional." in html
    rows = re.findall(r"<tr><td data-label=\"Model\">(.*?)</tr>", html)
    texts = [re.sub(r"<[^>]+>", "|", row) for row in rows]
    assert any("XCiT" in row and "|1|" in row and "over channels" in row for row in texts)
    assert any("conv" in row and "has none" in row for row in texts)
    assert "Hollow: not between patches (over channels in attention layer 1 of XCiT and" in html
    assert "figures/attention_entropy_conv" not in html
    assert "3: 1 global, 1 over channels, 1 of the class token" in html


def test_windows_are_said_to_bound_uniform_attention(tmp_path):
    subjects = {
        "ViT": Subject(depth=4),
        "Swin": Subject(depth=3, grid=(7, 7), patch=32, kinds=("windows",) * 3),
    }
    result = comparison(subjects, images=8)
    html = text_of(result, tmp_path)
    assert "which in the windows of Swin means everywhere in its window" in html
    assert "attends most locally for its reach" in html
    assert re.search(r"In pixels, windows and all: .*px in ViT and .*px in Swin\.", html)
