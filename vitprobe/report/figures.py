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
from vitprobe.plots.attention import heads, needs_relative
from vitprobe.plots.style import COLORS, GRID, INK, MUTED, figure_of
from vitprobe.report import findings

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.results import Comparison


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


@dataclass(frozen=True)
class Pictures:
    pairs: tuple[Picture, ...]
    """Heatmaps of two models."""
    selves: tuple[Picture, ...]
    """Heatmaps of a model with itself."""
    shares: tuple[Picture, ...]
    """First-direction shares, where CKA was measured."""
    overlays: tuple[Picture, ...]
    """An attention measure of all models in one axes."""
    heads: dict[str, tuple[Picture, ...]]
    """By model, every head of every attention measure that can differ from 0."""
    wholes: tuple[tuple[str, str], ...]
    """(file name, what it shows) of the figures saved for papers, which the page only links."""


def draw(result: Comparison, folder: Path, attention: tuple[str, ...]) -> Pictures:
    """Draw and save everything below `folder`; `attention` names the attention measures to draw.

    Beside what the page shows, figures that a paper needs are saved: the grid of all heatmaps and
    one row a model for every attention measure.
    """
    folder.mkdir()
    slugs = file_names(result.models)
    pairs: list[Picture] = []
    selves: list[Picture] = []
    shares: list[Picture] = []
    wholes: list[tuple[str, str]] = []
    if "cka" in result.measures:
        for i, a in enumerate(result.models):
            for b in result.models[i:]:
                name = f"cka_{slugs[a]}" if a == b else f"cka_{slugs[a]}_{slugs[b]}"
                caption = findings.similarity(result, a, b)
                picture = _picture(
                    partial(plots.cka_heatmap, result, a, b),
                    folder / name,
                    "Heatmap of CKA between layers",
                    caption,
                )
                (selves if a == b else pairs).append(picture)
        shares.append(
            _picture(
                partial(plots.first_direction_share, result),
                folder / "first_direction_share",
                "First-direction share by layer, all models",
                [findings.largest_share(result)],
            )
        )
        _save(plots.cka_grid(result), folder / "cka_all")
        wholes.append(("cka_all", "CKA of all models"))

    overlays: list[Picture] = []
    by_model: dict[str, list[Picture]] = {name: [] for name in result.models}
    for measure in attention:
        relative = needs_relative(result, measure)
        title = str(result.attention(measure, result.models[0]).attrs["long_name"])
        if len(result.models) > 1:
            overlays.append(
                _picture(
                    partial(plots.attention_overlay, result, measure),
                    folder / measure,
                    f"{title} by block, all models",
                    [f"{title}: line, median head; band, middle half of the heads."],
                )
            )
        for name in result.models:
            if measure == "sink_mass" and not findings.has_prefix(result, name):
                continue
            by_model[name].append(
                _picture(
                    partial(heads, result, measure, name, relative=relative, shared=True),
                    folder / f"{measure}_{slugs[name]}",
                    f"{title} of every head by block",
                    [findings.trend(result, measure, name)],
                )
            )
        _save(plots.attention_panels(result, measure), folder / f"{measure}_all")
        wholes.append((f"{measure}_all", f"{title} of every head, all models"))
    return Pictures(
        tuple(pairs),
        tuple(selves),
        tuple(shares),
        tuple(overlays),
        {name: tuple(pictures) for name, pictures in by_model.items() if pictures},
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
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)
    body = re.sub(r" font-family: [^;]+;", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]+"', "", body)
    # Cells of a heatmap or colour bar. They lie inside the axes, so clipping them only costs bytes;
    # the page draws them with crisp edges, so that neither seams nor strokes part them.
    body = re.sub(
        r'<path (d="M[^A-KN-Za-y"]+") clip-path="[^"]+" '
        r'style="fill: (#\w+)(?:; stroke: \2;[^"]*)?"/>',
        r'<path class="cell" \1 fill="\2"/>',
        body,
    )
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


def _picture(plot: Callable[[], Axes], stem: Path, kind: str, caption: list[str]) -> Picture:
    _save(plot(), stem)
    svg = stem.with_name(f"{stem.name}.svg").read_text(encoding="utf-8")
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", stem.name)
    label = f"{kind}. {' '.join(caption)}"
    return Picture(stem.name, inline(svg, prefix=prefix, label=label), tuple(caption))


def _save(drawn: Figure | Axes, stem: Path) -> None:
    plots.save(drawn, stem)
    plt.close(figure_of(drawn))
