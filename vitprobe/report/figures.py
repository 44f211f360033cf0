"""Every figure of a report: drawn once, saved as PDF, SVG and PNG, and made fit for a page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from markupsafe import Markup, escape

from vitprobe import plots
from vitprobe.measures.registry import MEASURES
from vitprobe.plots.attention import heads, limits_of
from vitprobe.plots.differences import forest
from vitprobe.plots.style import (
    COLORS,
    GRID,
    INK,
    MUTED,
    attention_noun,
    figure_of,
    has_prefix,
    measured,
    subjects,
)
from vitprobe.report import findings

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison


# Cells of a heatmap or colour bar, as matplotlib writes them one after another.
_CELL = re.compile(
    r'<path d="M ([\d.-]+) ([\d.-]+) L ([\d.-]+) ([\d.-]+) L ([\d.-]+) ([\d.-]+) L [^"]+" '
    r'clip-path="[^"]+" style="fill: (#\w+)(?:; stroke: \7;[^"]*)?"/>'
)
_CELLS = re.compile(r'(?:<path d="[^"]+" fill="#\w+"/> ?)+')
# Cells that do not exceed their floor: nothing else has these colours.
_DOTS = re.compile(
    r'<use href="[^"]+" x="[^"]+" y="[^"]+" style="fill: (?P<color>#ffffff|#111111)"/>'
    r'(?: ?<use href="[^"]+" x="[^"]+" y="[^"]+" style="fill: (?P=color)"/>)*'
)
# Marks and lines in a row that look the same.
_MARKS = re.compile(
    r'(?P<use><use href="[^"]+") (?P<at>x="[^"]+" y="[^"]+") (?P<style>style="[^"]*")/>'
    r'(?: ?(?P=use) x="[^"]+" y="[^"]+" (?P=style)/>)+'
)
_LINES = re.compile(
    r'<path d="[^"]+" (?P<look>(?:clip-path="[^"]+" )?style="fill: none[^"]*")/>'
    r'(?: ?<path d="[^"]+" (?P=look)/>)+'
)
_THEMED = {
    INK: "figure-ink",
    MUTED: "figure-muted",
    GRID: "figure-grid",
    **{color: f"model-{index}" for index, color in enumerate(COLORS)},
}
"""CSS variables that stand for the colours of a figure on a page."""


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    name: str
    """File name under figures/ without ending."""
    svg: Markup
    """Inline SVG with ids of its own, colours that follow the page's theme, and a label."""
    caption: tuple[str, ...]
    width: Picture | None = None
    """Of a heatmap, the widths of its intervals."""
    wide: bool = False
    """Made for a page and not for a column."""


@dataclass(frozen=True)
class Pictures:
    pairs: tuple[Picture, ...]
    """CKA of two models."""
    selves: tuple[Picture, ...]
    """CKA of a model with itself."""
    twins: tuple[Picture, ...]
    """CKA of a model with its untrained twin."""
    shares: tuple[Picture, ...]
    """First-direction shares, where CKA was measured."""
    grids: tuple[Picture, ...]
    """Every other similarity measure of all pairs of models, where it is defined for some."""
    overlays: tuple[Picture, ...]
    """The main attention measures, of all models in one axes."""
    heads: dict[str, tuple[Picture, ...]]
    """By model, every head of every main attention measure that can differ from 0."""
    others: tuple[Picture, ...]
    """All other attention measures, of all models in one axes."""
    tokens: tuple[Picture, ...]
    """Token measures of all models in one axes."""
    spectra: tuple[Picture, ...]
    """Fourier amplitudes of each model."""
    differences: tuple[Picture, ...]
    """Paired differences between models, by measure."""
    seeds: tuple[Picture, ...]
    """Seeds of each method, by measure."""
    wholes: tuple[tuple[str, str], ...]
    """(file name, what it shows) of the figures saved for papers, which the page only links."""


def draw(result: Comparison, folder: Path, lists: Lists) -> Pictures:
    """Draw and save everything below `folder`.

    Beside what the page shows, figures that a paper needs are saved: the grid of all CKA heatmaps
    and one row a model for the main attention measures.
    """
    folder.mkdir()
    names = findings.shown(result)
    slugs = file_names(result.models)
    by_group = {
        group: [name for name in result.measures if result.group_of(name) == group]
        for group in ("similarity", "attention", "tokens")
    }
    attention = by_group["attention"]
    main = [name for name in attention if name in findings.MAIN]
    wholes: list[tuple[str, str]] = []
    others = [
        name for name in attention if name not in main and findings.is_defined(result, name, names)
    ]
    of_tokens = [name for name in by_group["tokens"] if findings.is_defined(result, name, names)]

    def heatmap(a: str, b: str) -> Picture:
        name = f"cka_{slugs[a]}" if a == b else f"cka_{slugs[a]}_{slugs[b]}"
        width = None
        if result.interval("cka", a, b)[0].notnull().any():
            width = _picture(
                partial(plots.interval_width, result, "cka", a, b),
                folder / f"{name}_width",
                "Heatmap of the widths of the intervals of CKA",
                [findings.widths(result, "cka", a, b)],
            )
        return _picture(
            partial(plots.cka_heatmap, result, a, b),
            folder / name,
            "Heatmap of CKA between layers",
            findings.similarity(result, a, b),
            width=width,
        )

    pairs: list[Picture] = []
    selves: list[Picture] = []
    twins: list[Picture] = []
    shares: list[Picture] = []
    if "cka" in result.measures:
        for i, a in enumerate(names):
            selves.append(heatmap(a, a))
            pairs += [heatmap(a, b) for b in names[i + 1 :]]
            if a in result.references:
                twins.append(heatmap(a, result.references[a]))
        shares.append(
            _picture(
                partial(plots.first_direction_share, result),
                folder / "first_direction_share",
                "First-direction share by layer, all models",
                [
                    findings.largest_share(result),
                    findings.band_of_tokens(result, "first_direction_share"),
                ],
            )
        )
        _save(plots.similarity_grid(result, "cka", models=names), folder / "cka_all")
        wholes.append(("cka_all", "CKA of all models"))
    grids = [
        _picture(
            partial(plots.similarity_grid, result, measure, models=names),
            folder / measure,
            f"Heatmaps of {MEASURES[measure].title} between layers, all pairs of models",
            findings.grid(result, measure, names),
            wide=len(names) > 1,
        )
        for measure in by_group["similarity"]
        if measure != "cka" and findings.is_defined(result, measure, names)
    ]

    by_model: dict[str, list[Picture]] = {name: [] for name in names}
    for measure in main:
        relative = result.needs_relative(measure, subjects(result))
        limits = limits_of(result, measure, names, relative=relative)
        title = MEASURES[measure].title
        for name in measured(result, measure, names):
            if measure == "sink_mass" and not has_prefix(result, name):
                continue
            by_model[name].append(
                _picture(
                    partial(heads, result, measure, name, relative=relative, limits=limits),
                    folder / f"{measure}_{slugs[name]}",
                    f"{title} of every head by {attention_noun(result, (name,))}",
                    [findings.trend(result, measure, name)],
                )
            )
        _save(plots.attention_panels(result, measure, models=names), folder / f"{measure}_all")
        wholes.append((f"{measure}_all", f"{title} of every head, all models"))

    def overlay(measure: str) -> Picture:
        title, having = MEASURES[measure].title, measured(result, measure, subjects(result))
        fused = result.attention(measure, having[0]).sizes["head"] == 1
        about = [] if measure in main else [MEASURES[measure].what]
        # What is the same in all other figures is said once above them.
        band = [findings.band_of_overlay(result, measure)] if measure in main or fused else []
        return _picture(
            partial(plots.attention_overlay, result, measure),
            folder / measure,
            f"{title} by {attention_noun(result, having)}, all models",
            [*about, *band],
        )

    tokens = [
        _picture(
            partial(plots.token_curves, result, measure),
            folder / measure,
            f"{MEASURES[measure].title} by layer, all models",
            [
                MEASURES[measure].what,
                findings.token_trend(result, measure),
                findings.band_of_tokens(result, measure),
            ],
        )
        for measure in of_tokens
    ]
    spectra = [
        _picture(
            partial(plots.fourier_curves, result, name),
            folder / f"fourier_{slugs[name]}",
            f"Fourier amplitudes of the tokens of {name}, by layer",
            [findings.spectrum(result, name)],
        )
        for name in (names if "fourier_amplitude" in of_tokens else ())
        if findings.is_defined(result, "fourier_amplitude", (name,))
    ]
    table = lists.differences
    drawn = table[table["model_a"].isin(names)]
    drawn = drawn[drawn["model_b"].isin([*names, *result.references.values()])]
    forests = [
        _picture(
            partial(forest, result, drawn[drawn["measure"] == measure]),
            folder / f"differences_{measure}",
            f"Paired differences in {MEASURES[measure].title} between models",
            [findings.forest(drawn[drawn["measure"] == measure], len(table))],
        )
        for measure in [*main, *by_group["tokens"]]
        if (drawn["measure"] == measure).any()
    ]
    means = lists.group_means
    seeds = [
        _picture(
            partial(plots.group_spread, result, measure),
            folder / f"seeds_{measure}",
            f"{MEASURES[measure].title} of every seed, by method",
            [findings.seeds(means, measure)],
        )
        for measure in [*main, *of_tokens]
        if means is not None
        and findings.several_seeds(result)
        and (means["seeds"][means["measure"] == measure] > 0).all()
    ]
    return Pictures(
        tuple(pairs),
        tuple(selves),
        tuple(twins),
        tuple(shares),
        tuple(grids),
        tuple(overlay(measure) for measure in main),
        {name: tuple(pictures) for name, pictures in by_model.items() if pictures},
        tuple(overlay(measure) for measure in others),
        tuple(tokens),
        tuple(spectra),
        tuple(forests),
        tuple(seeds),
        tuple(wholes),
    )


def inline(svg: str, *, prefix: str, label: str) -> Markup:
    """An SVG file from matplotlib as an element for an HTML page.

    Ids get `prefix`, so that several figures can share a page; colours of text, axes and models
    become CSS variables, so that they follow the theme; coordinates keep two decimals (1/100 pt).
    """
    _, box, _ = re.split(r'viewBox="([^"]+)"', svg, maxsplit=1)
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><")
    body = re.sub(r"<style.*?</style>", "", body)
    body = re.sub(r'<g id="[^"]+">', "<g>", body)
    body = re.sub(r'<g id="[^"]+"/>', "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    # Inside tags alone: a tick label of 0.005 is no coordinate.
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), body)
    body = re.sub(r" font-family: [^;]+;", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]+"', "", body)
    # Paths that show nothing, such as undefined cells.
    body = re.sub(r'<path d="[^"]+"(?: clip-path="[^"]+")? style="fill: none"/> ?', "", body)
    body = _CELLS.sub(_merged, _CELL.sub(_cell, body))
    body = _DOTS.sub(_dotted, body)
    body = _MARKS.sub(_with_style_once, body)
    body = _LINES.sub(_as_one_path, body)
    for color, variable in _THEMED.items():
        body = body.replace(color, f"var(--{variable})")
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{body}')


def file_names(models: tuple[str, ...]) -> dict[str, str]:
    """A file-name part for every model: safe on every system, and different for each."""
    names: dict[str, str] = {}
    for model in models:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.") or "model"
        taken = {name.lower() for name in names.values()}
        unique, number = slug, 2
        while unique.lower() in taken:
            unique, number = f"{slug}-{number}", number + 1
        names[model] = unique
    return names


def _cell(path: re.Match[str]) -> str:
    """A cell in few bytes: to 1/10 pt, and unclipped, for it lies inside the axes."""
    x, y, x_1, y_1, right, top = map(float, path.groups()[:6])
    if (x_1, y_1) not in ((right, y), (x, top)):
        return path.group()
    ends = (f"{end:.1f}".removesuffix(".0") for end in (x, y, right, top))
    return '<path d="M{0} {1}H{2}V{3}H{0}z" fill="{4}"/>'.format(*ends, path[7])


def _merged(run: re.Match[str]) -> str:
    """Cells side by side as one path for each colour, and neighbours of one colour as one cell.

    The page draws them with crisp edges, and printed with an edge of their colour, so that no seams
    part them.
    """
    by_color: dict[str, list[list[str]]] = {}
    cells = re.findall(r'd="M(\S+) (\S+)H(\S+)V(\S+)H\S+z" fill="([^"]+)"', run.group())
    for left, low, right, top, color in cells:
        drawn = by_color.setdefault(color, [])
        if drawn and drawn[-1][1:] == [low, left, top]:
            drawn[-1][2] = right
        else:
            drawn.append([left, low, right, top])
    paths = "".join(
        f'<path d="{"".join("M{0} {1}H{2}V{3}H{0}z".format(*cell) for cell in drawn)}" '
        f'color="{color}"/>'
        for color, drawn in by_color.items()
    )
    return f'<g class="cells">{paths}</g>'


def _dotted(run: re.Match[str]) -> str:
    """Dots as one path of lines without length, which the page draws with round ends."""
    places = re.findall(r'x="([^"]+)" y="([^"]+)"', run.group())
    path = "".join(f"M{float(x):.1f} {float(y):.1f}h0" for x, y in places)
    return f'<path class="dots" d="{path}" stroke="{run["color"]}"/>'


def _with_style_once(run: re.Match[str]) -> str:
    marks = run.group().replace(f" {run['style']}", "").replace("/> <", "/><")
    return f"<g {run['style']}>{marks}</g>"


def _as_one_path(run: re.Match[str]) -> str:
    paths = "".join(re.findall(r'd="([^"]+)"', run.group()))
    return f'<path d="{paths}" {run["look"]}/>'


def _picture(
    plot: Callable[[], Axes | Figure],
    stem: Path,
    kind: str,
    caption: list[str],
    *,
    width: Picture | None = None,
    wide: bool = False,
) -> Picture:
    _save(plot(), stem)
    svg = stem.with_name(f"{stem.name}.svg").read_text(encoding="utf-8")
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", stem.name)
    label = f"{kind}. {' '.join(caption)}"
    return Picture(stem.name, inline(svg, prefix=prefix, label=label), tuple(caption), width, wide)


def _save(drawn: Figure | Axes, stem: Path) -> None:
    plots.save(drawn, stem)
    plt.close(figure_of(drawn))
