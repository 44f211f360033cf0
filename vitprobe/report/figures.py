"""Which figures a report has, and what is said of each; `drawing` draws them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from vitprobe import plots
from vitprobe.measures.registry import MEASURES
from vitprobe.plots.accuracy_panels import by_protocol
from vitprobe.plots.attention import heads, limits_of
from vitprobe.plots.depth import panels_of
from vitprobe.plots.differences import forest
from vitprobe.plots.pictures import telling_heads
from vitprobe.plots.style import (
    attention_noun,
    has_prefix,
    measured,
    subjects,
)
from vitprobe.report import findings, numbers
from vitprobe.wording import join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vitprobe.report.lists import Lists
    from vitprobe.report.numbers import Numbers
    from vitprobe.results import Comparison

_MOST_WIDTHS = 15
"""Heatmaps up to which each has a figure of the widths of its intervals: those of five models."""
_MOST_CELLS = 20_000
"""Cells of other measures of similarity whose numbers the page holds."""
_UNDRAWN = Markup("")


@dataclass
class Picture:
    """A figure as the page shows it."""

    name: str
    """File name under figures/ without ending."""
    caption: tuple[str, ...]
    width: Picture | None = None
    """Of a heatmap, the widths of its intervals."""
    wide: bool = False
    """Made for a page and not for a column."""
    models: tuple[str, ...] = ()
    """Which one or two models a figure is of, where the page can choose among them."""
    svg: Markup = _UNDRAWN
    """Inline SVG with ids of its own, colours that follow the page's theme, and a label."""
    numbers: tuple[Numbers, ...] = ()
    """What it shows, an axes a table."""
    points: int = 0
    """Its width in pt, by which the page scales all figures alike."""


@dataclass(frozen=True)
class Job:
    """A figure to draw."""

    name: str
    """File name under figures/ without ending."""
    plot: Callable[[], Axes | Figure]
    label: str = ""
    """What it is, for those who do not see it."""
    numbers_of: Callable[..., Sequence[Numbers]] | None = None
    picture: Picture | None = None
    """Where it goes on the page; None of figures that are for papers alone."""


@dataclass(frozen=True)
class Pictures:
    map: tuple[Picture, ...]
    """Which models are alike; none of fewer than three."""
    depth: tuple[Picture, ...]
    """Similarity, attention and accuracy along depth."""
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
    photographs: dict[str, tuple[Picture, ...]]
    """By model, its attention over the first images, where maps were kept."""
    tokens: tuple[Picture, ...]
    """Token measures of all models in one axes."""
    spectra: tuple[Picture, ...]
    """Fourier amplitudes of each model."""
    differences: tuple[Picture, ...]
    """Paired differences between models, by measure."""
    seeds: tuple[Picture, ...]
    """Seeds of each method, by measure."""
    accuracy: tuple[Picture, ...]
    """Scores of whole models, where some are joined to the result."""
    wholes: tuple[tuple[str, str], ...]
    """(file name, what it shows) of the figures saved for papers, which the page only links."""
    images: dict[str, Markup]
    """Bitmaps that the figures show, by id: each is on the page once."""


def plan(result: Comparison, lists: Lists) -> tuple[Pictures, list[Job]]:
    """The figures of a report, not drawn yet, and what draws each: the same list every time.

    Beside what the page shows, there are figures that a paper needs: the grid of all CKA heatmaps
    and one row a model for the main attention measures.
    """
    jobs: list[Job] = []
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
    picture = partial(_picture, jobs)
    heatmaps = len(names) * (len(names) + 1) // 2

    def heatmap(a: str, b: str) -> Picture:
        name = f"cka_{slugs[a]}" if a == b else f"cka_{slugs[a]}_{slugs[b]}"
        width = None
        if heatmaps <= _MOST_WIDTHS and result.interval("cka", a, b)[0].notnull().any():
            width = picture(
                partial(plots.interval_width, result, "cka", a, b),
                f"{name}_width",
                "Heatmap of the widths of the intervals of CKA",
                [findings.widths(result, "cka", a, b)],
                lambda ax: [numbers.of_heatmap(result, "cka", a, b, ax)],
            )
        return picture(
            partial(plots.cka_heatmap, result, a, b),
            name,
            "Heatmap of CKA between layers",
            findings.similarity(result, a, b),
            lambda ax: [numbers.of_heatmap(result, "cka", a, b, ax)],
            width=width,
            models=(a, b),
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
            picture(
                partial(plots.first_direction_share, result),
                "first_direction_share",
                "First-direction share by layer, all models",
                [
                    findings.largest_share(result),
                    findings.band_of_tokens(result, "first_direction_share"),
                ],
                lambda ax: [numbers.of_tokens(result, "first_direction_share", ax)],
            )
        )
        jobs.append(Job("cka_all", partial(plots.similarity_grid, result, "cka", models=names)))
        wholes.append(("cka_all", "CKA of all models"))

    cells = 0

    def grid(measure: str) -> Picture:
        nonlocal cells
        layers = sum(result.similarity(measure, a, a).sizes["layer_a"] for a in names)
        cells += layers**2
        within = cells <= _MOST_CELLS
        caption = findings.grid(result, measure, names)
        if not within:
            caption.append(f"Its numbers are in tables/{measure}.csv alone: there are too many.")

        def of_grid(figure: Figure) -> list[Numbers]:
            return numbers.of_grid(result, measure, names, figure)

        return picture(
            partial(plots.similarity_grid, result, measure, models=names),
            measure,
            f"Heatmaps of {MEASURES[measure].title} between layers, all pairs of models",
            caption,
            of_grid if within else None,
            wide=len(names) > 1,
        )

    grids = [
        grid(measure)
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
                picture(
                    partial(heads, result, measure, name, relative=relative, limits=limits),
                    f"{measure}_{slugs[name]}",
                    f"{title} of every head by {attention_noun(result, (name,))}",
                    [findings.trend(result, measure, name)],
                    partial(_of_heads, result, measure, name, relative),
                )
            )
        panels = partial(plots.attention_panels, result, measure, models=names)
        jobs.append(Job(f"{measure}_all", panels))
        wholes.append((f"{measure}_all", f"{title} of every head, all models"))

    def overlay(measure: str) -> Picture:
        title, having = MEASURES[measure].title, measured(result, measure, subjects(result))
        fused = result.attention(measure, having[0]).sizes["head"] == 1
        about = [] if measure in main else [MEASURES[measure].what]
        # What is the same in all other figures is said once above them.
        band = [findings.band_of_overlay(result, measure)] if measure in main or fused else []
        return picture(
            partial(plots.attention_overlay, result, measure),
            measure,
            f"{title} by {attention_noun(result, having)}, all models",
            [*about, *band],
            lambda ax: [numbers.of_attention(result, measure, ax)],
        )

    tokens = [
        picture(
            partial(plots.token_curves, result, measure),
            measure,
            f"{MEASURES[measure].title} by layer, all models",
            [
                MEASURES[measure].what,
                findings.token_trend(result, measure),
                findings.band_of_tokens(result, measure),
            ],
            partial(_of_tokens, result, measure),
        )
        for measure in of_tokens
    ]
    spectra = [
        picture(
            partial(plots.fourier_curves, result, name),
            f"fourier_{slugs[name]}",
            f"Fourier amplitudes of the tokens of {name}, by layer",
            [findings.spectrum(result, name)],
            partial(_of_spectrum, result, name),
        )
        for name in (names if "fourier_amplitude" in of_tokens else ())
        if findings.is_defined(result, "fourier_amplitude", (name,))
    ]
    table = lists.differences
    drawn = table[table["model_a"].isin(names)]
    drawn = drawn[drawn["model_b"].isin([*names, *result.references.values()])]
    forests = [
        picture(
            partial(forest, result, drawn[drawn["measure"] == measure]),
            f"differences_{measure}",
            f"Paired differences in {MEASURES[measure].title} between models",
            [findings.forest(drawn[drawn["measure"] == measure], len(table))],
            partial(numbers.of_forest, drawn[drawn["measure"] == measure]),
        )
        for measure in [*main, *by_group["tokens"]]
        if (drawn["measure"] == measure).any()
    ]
    means = lists.group_means
    seeds = [
        picture(
            partial(plots.group_spread, result, measure),
            f"seeds_{measure}",
            f"{MEASURES[measure].title} of every seed, by method",
            [findings.seeds(means, measure)],
            partial(_of_seeds, result, measure),
        )
        for measure in [*main, *of_tokens]
        if means is not None
        and findings.several_seeds(result)
        and (means["seeds"][means["measure"] == measure] > 0).all()
    ]
    scored = by_protocol(result)
    accuracy = [
        picture(
            partial(plots.accuracy_panels, result),
            "accuracy",
            "Accuracy of every model under every protocol",
            findings.accuracy_caption(scored),
            partial(numbers.of_scores, scored),
            wide=len(scored) > 1,
        )
        for _ in scored[:1]
    ]
    pictures = Pictures(
        _map(result, lists, picture),
        _depth(result, picture),
        tuple(pairs),
        tuple(selves),
        tuple(twins),
        tuple(shares),
        tuple(grids),
        tuple(overlay(measure) for measure in main),
        {name: tuple(pictures) for name, pictures in by_model.items() if pictures},
        tuple(overlay(measure) for measure in others),
        {
            name: tuple(_photographs(result, name, slugs[name], picture))
            for name in names
            if result.samples(name) is not None
        },
        tuple(tokens),
        tuple(spectra),
        tuple(forests),
        tuple(seeds),
        tuple(accuracy),
        tuple(wholes),
        {},
    )
    return pictures, jobs


def _map(result: Comparison, lists: Lists, picture: Callable[..., Picture]) -> tuple[Picture, ...]:
    names, table = subjects(result), lists.models
    if len(names) < 3 or table is None or table["distance"].isnull().any():
        return ()
    return (
        picture(
            partial(plots.model_map, result),
            "models",
            "Dendrogram of the models beside the matrix of their mean CKA",
            findings.map_caption(result, table),
            lambda figure: [numbers.of_map(table, names, figure)],
            wide=True,
        ),
    )


def _depth(result: Comparison, picture: Callable[..., Picture]) -> tuple[Picture, ...]:
    # Token measures and similarity of other kinds alone have no common axis.
    if not panels_of(result):
        return ()
    caption, numbers_of = findings.depth_caption(result), partial(numbers.of_depth, result)
    drawn = partial(plots.depth_view, result)
    return (picture(drawn, "depth", "Along depth", caption, numbers_of, wide=True),)


def _photographs(
    result: Comparison, name: str, slug: str, picture: Callable[..., Picture]
) -> list[Picture]:
    maps = result.samples(name)
    noun = attention_noun(result, (name,))
    found = [
        picture(
            partial(plots.attention_maps, result, name),
            f"maps_{slug}",
            f"Attention of the patches of {name} over three images, by {noun}",
            [f"Where the patches of {name} look, mean over heads, by {noun}."],
            wide=True,
        )
    ]
    if maps is not None and int(maps.attrs["prefix_tokens"]):
        found.append(
            picture(
                partial(plots.attention_maps, result, name, query="class"),
                f"maps_class_{slug}",
                f"Attention of the first prefix token of {name} over three images, by {noun}",
                [f"Where the first prefix token of {name} looks, mean over heads, by {noun}."],
                wide=True,
            )
        )
    if telling := telling_heads(result, name):
        listed = join([f"{one.why} ({noun} {one.layer}, head {one.head})" for one in telling])
        found.append(
            picture(
                partial(plots.head_maps, result, name, telling),
                f"maps_heads_{slug}",
                f"Attention of single heads of {name} from one patch over three images",
                [f"What single heads of {name} look at from the marked patch: {listed}."],
                wide=True,
            )
        )
    return found


def _of_heads(
    result: Comparison, measure: str, name: str, relative: bool, ax: Axes
) -> list[Numbers]:
    return [numbers.of_heads(result, measure, name, relative=relative, ax=ax)]


def _of_tokens(result: Comparison, measure: str, ax: Axes) -> list[Numbers]:
    return [numbers.of_tokens(result, measure, ax)]


def _of_spectrum(result: Comparison, name: str, ax: Axes) -> list[Numbers]:
    return [numbers.of_spectrum(result, name, ax)]


def _of_seeds(result: Comparison, measure: str, ax: Axes) -> list[Numbers]:
    return [numbers.of_seeds(result, measure, ax)]


def file_names(models: tuple[str, ...]) -> dict[str, str]:
    """A file-name part for every model: safe on every system, and different for each."""
    names: dict[str, str] = {}
    for model in models:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.") or "model"
        # `plots.save` would take it for the ending of a file.
        slug = re.sub(r"\.(pdf|svg|png)$", r"-\1", slug)
        taken = {name.lower() for name in names.values()}
        unique, number = slug, 2
        while unique.lower() in taken:
            unique, number = f"{slug}-{number}", number + 1
        names[model] = unique
    return names


def _picture(
    jobs: list[Job],
    plot: Callable[[], Axes | Figure],
    name: str,
    kind: str,
    caption: list[str],
    numbers_of: Callable[..., Sequence[Numbers]] | None = None,
    *,
    width: Picture | None = None,
    wide: bool = False,
    models: tuple[str, ...] = (),
) -> Picture:
    picture = Picture(name, tuple(caption), width, wide, models)
    jobs.append(Job(name, plot, f"{kind}. {' '.join(caption)}", numbers_of, picture))
    return picture
