"""The report in Chromium: it says its numbers, loads nothing, and fits every reader.

Skipped where there is no Chromium; `VITPROBE_CHROMIUM` names another than the system's.
"""

from __future__ import annotations

import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from plots.synthetic import Subject, comparison

from vitprobe.report import report
from vitprobe.scores import Score, Scores

CHROMIUM = os.environ.get("VITPROBE_CHROMIUM") or shutil.which("chromium") or ""
NAMES = ("MAE", "MoCo-v3", "Supervised", "a much longer name of a model, distilled")
MEASURES = ("cka", "attention_distance", "sink_mass")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
# WCAG 2.2, success criterion 1.4.3, for text of ordinary size.
LEAST_CONTRAST = 4.5

CONTRASTS = """
() => {
  const parse = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, under) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * under[i]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) layers.push(color);
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("script, .tip")) continue;
    // Numbers on the cells of a matrix have the cell behind them, which is no element around them.
    const drawn = element.closest("svg");
    if (drawn && /white|#fff|#111111/.test(element.getAttribute("style") || "")) continue;
    const style = getComputedStyle(element);
    const back = ground(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), back);
    const [a, b] = [luminance(ink), luminance(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    """The report of four models, with everything that a page can hold."""
    block = np.linspace(0.05, 0.9, 25).reshape(5, 5)
    block[4, 0] = 0.42
    subjects = {
        name: Subject(4, 3, grid=(6, 6), assumed=("heads",) if name == "MAE" else ())
        for name in NAMES
    }
    result = comparison(
        subjects, measures=MEASURES, images=16, samples=3, cka={("MAE", "MoCo-v3"): block}
    )
    rows = [
        Score(name, f"{name}.pth", "knn", "digits", 360, "top1", value, value - 0.02, value + 0.02)
        for name, value in zip(NAMES, (0.7, 0.8, 0.9, 0.75), strict=True)
    ]
    rows += [
        Score(name, f"{name}.pth", "linear", "digits", 360, "top1", 0.5 + 0.1 * layer, layer=layer)
        for name in NAMES
        for layer in range(5)
    ]
    result = result.with_scores(Scores(rows))
    return report(result, tmp_path_factory.mktemp("browser") / "out", formats=("svg",))


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here: install it, or set VITPROBE_CHROMIUM")
    with playwright.sync_playwright() as running:
        # Tests may run as root in a container, where Chromium has no sandbox.
        browser = running.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, timeout=120_000
        )
        yield browser
        browser.close()


class Seen:
    """A page in the browser, with all that it asked for and complained of."""

    def __init__(self, browser, path: Path, viewport=None, **options) -> None:
        # Without motion, for a place on the screen shall stay where it is.
        options = {"viewport": viewport or DESKTOP, "reduced_motion": "reduce", **options}
        self.context = browser.new_context(**options)
        # A busy machine is slow, and no failure.
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())


@pytest.fixture(scope="session")
def open_page(browser, path):
    opened: dict[str, Seen] = {}

    def of(key: str = "desktop", **options) -> Seen:
        if key not in opened:
            opened[key] = Seen(browser, path, **options)
        return opened[key]

    yield of
    for seen in opened.values():
        seen.context.close()


@pytest.fixture
def page(open_page):
    """The page on a desktop; tests leave no pointer on it."""
    seen = open_page()
    yield seen.page
    seen.page.keyboard.press("Escape")


def tip(page) -> str | None:
    found = page.locator(".tip")
    return found.inner_text() if found.is_visible() else None


def in_view(place) -> None:
    """Scroll to it and wait for the frame that tells the page so: scrolling ends what is shown."""
    place.scroll_into_view_if_needed()
    place.page.evaluate(
        "new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
    )


def cell(page, figure: str, row: int, column: int) -> tuple[float, float]:
    """Where on the screen a cell of a heatmap of 5 by 5 layers lies."""
    plot = page.locator(f"{figure} .plot").first
    in_view(plot)
    at = plot.evaluate(
        """(plot, [row, column]) => {
          const [, x, y, width, height] = JSON.parse(plot.dataset.places)[0];
          const [across, up] = [(column + 0.5) * width / 5, (row + 0.5) * height / 5];
          const point = new DOMPoint(x + across, y + height - up);
          const found = point.matrixTransform(plot.querySelector("svg").getScreenCTM());
          return [found.x, found.y];
        }""",
        [row, column],
    )
    return at[0], at[1]


def test_no_error_and_no_request_but_the_page_itself(open_page, path):
    seen = open_page()
    seen.page.wait_for_load_state("load")
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [path.as_uri()]


def test_the_page_itself_forbids_requests(page):
    failed = page.evaluate(
        "fetch('https://example.org').then(() => 'fetched', (error) => error.name)"
    )
    assert failed == "TypeError"
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert policy.startswith("default-src 'none'")


def test_hovering_a_cell_tells_layers_value_and_interval(page):
    page.mouse.move(*cell(page, "#pairs figure.chosen", 4, 0))
    text = tip(page)
    assert "0.42 [0.38," in text
    assert "MAE, layer 4" in text
    assert "MoCo-v3, layer 0" in text
    assert "CKA" in text
    # The cell is outlined, and leaving it ends both.
    assert page.locator("svg .mark").count() == 1
    page.mouse.move(2, 2)
    assert tip(page) is None
    assert page.locator("svg .mark").count() == 0


def test_every_number_of_a_figure_is_under_the_pointer(page):
    table = page.locator("#pairs figure.chosen .numbers tbody")
    for row, column in ((0, 0), (2, 3), (4, 4)):
        expected = table.locator("tr").nth(row).locator("td").nth(column).text_content()
        page.mouse.move(*cell(page, "#pairs figure.chosen", row, column))
        assert tip(page).startswith(expected)


def test_the_point_of_a_line_tells_its_model(page):
    figure = page.locator("#attention figure").first
    in_view(figure)
    x, y = figure.locator(".plot").evaluate(
        """(plot) => {
          const [, x, y] = JSON.parse(plot.dataset.places)[0];
          const onScreen = plot.querySelector("svg").getScreenCTM();
          const found = new DOMPoint(x + 2, y - 1).matrixTransform(onScreen);
          return [found.x, found.y];
        }"""
    )
    page.mouse.move(x, y)
    text = tip(page)
    assert "block 0" in text
    assert any(name in text for name in NAMES)
    assert re.search(r"\d\spx \[", text)


def test_arrow_keys_go_from_number_to_number(page):
    plot = page.locator("#pairs figure.chosen .plot").first
    plot.focus()
    assert plot.evaluate("(plot) => document.activeElement === plot")
    page.keyboard.press("ArrowRight")
    assert "MAE, layer 0 · MoCo-v3, layer 0" in tip(page)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert "MAE, layer 1 · MoCo-v3, layer 1" in tip(page)
    # The same cell under the pointer, for it is that one which is outlined.
    page.keyboard.press("Escape")
    assert tip(page) is None
    # At an edge the last one stays.
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert "MoCo-v3, layer 4" in tip(page)


def test_a_tap_tells_as_a_pointer_does(open_page):
    seen = open_page("touch", viewport=PHONE, has_touch=True)
    seen.page.touchscreen.tap(*cell(seen.page, "#pairs figure.chosen", 2, 2))
    assert "MAE, layer 2" in tip(seen.page)
    box = seen.page.locator(".tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]


def test_choosing_a_pair_shows_it_alone(page):
    first, second = (page.locator("#pairs select").nth(i) for i in (0, 1))
    assert page.locator("#pairs figure:visible").count() == 1
    first.select_option("Supervised")
    second.select_option("MAE")
    figure = page.locator("#pairs figure:visible")
    assert figure.count() == 1
    assert {figure.get_attribute("data-a"), figure.get_attribute("data-b")} == {"MAE", "Supervised"}
    # A model with itself is a choice too.
    second.select_option("Supervised")
    figure = page.locator("#pairs figure:visible")
    assert figure.get_attribute("data-a") == figure.get_attribute("data-b") == "Supervised"
    first.select_option("MAE")
    second.select_option("MoCo-v3")


def test_a_click_on_the_map_of_models_chooses_the_pair(page):
    plot = page.locator("#overview .plot[data-chooses]")
    plot.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    text = tip(page)
    page.keyboard.press("Enter")
    figure = page.locator("#pairs figure:visible")
    assert figure.get_attribute("data-a") in text
    assert figure.get_attribute("data-b") in text
    page.locator("#pairs select").first.select_option("MAE")
    page.locator("#pairs select").nth(1).select_option("MoCo-v3")


def test_without_script_everything_can_be_reached(open_page):
    seen = open_page("unscripted", java_script_enabled=False)
    page = seen.page
    # Six pairs and four models with themselves.
    assert page.locator("#pairs > figure:visible").count() == 10
    assert page.locator("select").count() == 0
    numbers = page.locator("#pairs figure .numbers").first
    assert not numbers.locator("table").is_visible()
    numbers.locator("summary").click()
    assert numbers.locator("table").is_visible()
    assert "0.42 [0.38," in numbers.inner_text()


def test_the_switch_to_interval_widths_works(page):
    figure = page.locator("#pairs figure.chosen")
    assert figure.locator("> .value").is_visible()
    assert not figure.locator("> .width").is_visible()
    figure.get_by_text("interval width", exact=True).click()
    assert figure.locator("> .width").is_visible()
    assert not figure.locator("> .value").is_visible()
    figure.get_by_text("value", exact=True).click()


@pytest.mark.parametrize("viewport", [PHONE, {"width": 768, "height": 900}, DESKTOP])
def test_nothing_makes_the_page_wider_than_the_screen(open_page, viewport):
    page = open_page("touch", viewport=PHONE, has_touch=True).page
    page.set_viewport_size(viewport)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    page.evaluate("document.querySelectorAll('.numbers').forEach((one) => { one.open = false })")
    page.set_viewport_size(PHONE)
    assert wide <= 0


@pytest.mark.parametrize("viewport", [PHONE, {"width": 1000, "height": 900}, DESKTOP])
def test_tiles_and_lists_hold_the_longest_of_numbers_and_names(open_page, viewport):
    page = open_page("longest").page
    page.set_viewport_size(viewport)
    beyond = page.evaluate(
        """() => [...document.querySelectorAll(".tiles li")].map((tile) => {
          tile.querySelector(".value").firstChild.data = "3.56474";
          tile.querySelector(".unit").textContent = " % of uniform";
          tile.querySelector(".range").textContent = "[3.56461,\u00a03.56488]";
          tile.querySelector(".whose").textContent = "vit_tiny_patch16_224_mae_pretrain_seed0";
          document.querySelector(".list td").textContent = "vit_tiny_patch16_224_mae_".repeat(4);
          return tile.scrollWidth - tile.clientWidth;
        })"""
    )
    assert beyond == [0] * 4
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_on_its_ground(open_page, scheme):
    page = open_page().page
    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    page.emulate_media(color_scheme="light")
    assert len(found) > 300
    assert [one for one in found if one[0] < LEAST_CONTRAST] == []


def test_dark_is_dark_in_the_figures_too(open_page):
    page = open_page().page
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('figure svg text')).fill"
    light = page.evaluate(f"[{ground}, {ink}]")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(f"[{ground}, {ink}]")
    page.emulate_media(color_scheme="light")
    assert light[0] == "rgb(255, 255, 255)"
    assert light[0] != dark[0]
    assert light[1] != dark[1]


def test_print_is_a_document(open_page):
    page = open_page().page
    page.emulate_media(media="print", color_scheme="dark")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    hidden = page.evaluate(
        "[...document.querySelectorAll('nav, .bar, .files, .numbers, .recipe')]"
        ".filter((one) => one.checkVisibility()).length"
    )
    method = page.locator(".method dl").first.is_visible()
    # Browsers leave grounds out, and without theirs models have no colour.
    dot = page.evaluate("getComputedStyle(document.querySelector('.dot')).printColorAdjust")
    page.emulate_media(media="screen", color_scheme="light")
    # Paper is white in a dark room too.
    assert ground == "rgb(255, 255, 255)"
    assert hidden == 0
    assert method
    assert dot == "exact"
    pdf = page.pdf(format="A4")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 60


def test_headings_and_landmarks(page):
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')]"
        ".filter((one) => one.checkVisibility()).map((one) => +one.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(f"body > {landmark}").count() == 1, landmark
    assert page.locator("html").get_attribute("lang") == "en"


def test_every_figure_has_words(page):
    figures = page.locator("figure")
    count = figures.count()
    assert count > 20
    missing = page.evaluate(
        """() => [...document.querySelectorAll("figure")].filter((figure) =>
          [...figure.querySelectorAll(".plot > svg")].some((svg) =>
            svg.getAttribute("role") !== "img" || !(svg.getAttribute("aria-label")?.length > 40))
          || !figure.querySelector("figcaption p")).length"""
    )
    assert missing == 0
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("a, button, select, input, [tabindex]")].filter(
          (one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).length"""
    )
    assert nameless == 0


def test_the_first_tab_skips_to_the_summary(open_page):
    page = open_page("untouched").page
    page.keyboard.press("Tab")
    link = page.evaluate("document.activeElement.textContent")
    box = page.locator(".skip").bounding_box()
    assert link == "Skip to the summary"
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#summary")


def test_numbers_of_every_figure_lie_inside_it(page):
    """A wrong transform would put them beside."""
    outside = page.evaluate(
        """() => [...document.querySelectorAll(".plot[data-places]")].flatMap((plot) => {
          const { width, height } = plot.querySelector("svg").viewBox.baseVal;
          const beyond = (one, i) => one < -1 || one > 1 + (i % 2 ? height : width);
          return JSON.parse(plot.dataset.places).flatMap(([kind, ...numbers]) =>
            numbers.filter((one, i) => one !== null && beyond(one, i)));
        }).length"""
    )
    assert outside == 0


def test_photographs_are_on_the_page_once(page, path):
    html = path.read_text(encoding="utf-8")
    images = re.findall(r'href="(data:image/[^"]+)"', html)
    assert len(images) == len(set(images)) > 6
    # Every use of a bitmap shows something.
    assert (
        page.evaluate(
            "[...document.querySelectorAll('#photographs use')]"
            ".filter((use) => !document.querySelector(use.getAttribute('href'))).length"
        )
        == 0
    )
    assert path.stat().st_size < 2_000_000


def test_it_opens_within_a_second(browser, path):
    """Of the processor's time, for on a busy machine a clock tells of its other work."""
    page = browser.new_context(viewport=DESKTOP).new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri(), timeout=120_000)
    found = session.send("Performance.getMetrics")["metrics"]
    page.context.close()
    assert {one["name"]: one["value"] for one in found}["TaskDuration"] < 1
