"""The page of a report: what the template shows, gathered from a result."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from vitprobe.measures.registry import MEASURES
from vitprobe.plots.accuracy_panels import by_protocol
from vitprobe.plots.differences import UNDECIDED, rows_of
from vitprobe.plots.style import (
    FORMATS,
    attention_noun,
    has_prefix,
    kind_of,
    measured,
    subjects,
)
from vitprobe.report import findings
from vitprobe.report.cards import card, heads, parameters, sides
from vitprobe.report.methods import method, renormalised, settings
from vitprobe.report.words import (
    LEVEL,
    NBSP,
    bracket,
    count,
    digits_of,
    of_difference,
    p_value,
    show,
    spread,
)
from vitprobe.wording import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from vitprobe.report.figures import Pictures
    from vitprobe.report.lists import Lists
    from vitprobe.results import Comparison

_HERE = Path(__file__).parent
# Up to so many, all figures stand side by side; of more, the reader chooses.
_MOST_PAIRS = 3
_MOST_MODELS = 3

# Columns of accuracy in the table of models; the section on accuracy has all.
_MOST_SCORES = 2

GENERATOR = '<meta name="generator" content="vitprobe">'
"""By this line an earlier report is known."""


def render(
    result: Comparison, pictures: Pictures, lists: Lists, formats: Sequence[str] = FORMATS
) -> str:
    """The whole page as HTML text. formats: of the files of figures that it links."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    provenance = result.provenance
    undefined, refused = _undefined(result), findings.refused(result)
    created = datetime.fromisoformat(provenance["created"])
    names = subjects(result)
    measures = [*result.measures, *(["first_direction_share"] if pictures.shares else [])]
    attention = tuple(name for name in measures if result.group_of(name) == "attention")
    relative = [findings.in_text(name) for name in attention if result.needs_relative(name, names)]
    several = "the attention measures in px or nats"
    return environment.get_template("template.html").render(
        generator=Markup(GENERATOR),
        formats=formats,
        css=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "script.js").read_text(encoding="utf-8")),
        title=_title(tuple(dict.fromkeys(kind_of(result, name) for name in names))),
        lead=_lead(result),
        created=f"{created.day} {created:%B %Y}",
        contents=_contents(pictures, lists, undefined, bool(refused)),
        headline=findings.headline(result, lists),
        summary=findings.summary(result, lists),
        glance=_glance(result),
        models=[card(result, name) for name in names],
        twins=[(name, twin) for name, twin in result.references.items()],
        left_out=_left_out(result),
        assumed_heads=findings.assumed_heads(result),
        assumed=findings.other_assumptions(result),
        intervals=provenance["estimator"] == "unbiased",
        pictures=pictures,
        explanations=[_explanation(name, attention) for name in attention if name in findings.MAIN],
        band=_band(result, attention),
        undefined=undefined,
        noun=attention_noun(result, names),
        refused=refused,
        remarks=findings.remarks(result),
        without_prefix=_without_prefix(result, attention),
        windowed=join(findings.windowed(result, names)),
        relative=join(relative) if len(relative) <= 3 else several,
        differences=_differences(lists.differences),
        level=LEVEL,
        seeds=_seeds(result, lists),
        tables=[*measures, *lists.tables()],
        scores=_scores(result),
        choose=_choosing(pictures),
        measures={name: MEASURES[name] for name in measures},
        methods=[(MEASURES[name], method(MEASURES[name])) for name in measures],
        settings=settings(result, attention),
        notes=result.notes,
        details=_details(provenance),
        citation=_citation(provenance["versions"].get("vitprobe"), created.year),
    )


def _band(result: Comparison, attention: tuple[str, ...]) -> str:
    """What line, band and bars are in the figures of heads beyond the main ones."""
    names = subjects(result)
    others = (measure for measure in attention if measure not in findings.MAIN)
    of_heads = (
        measure
        for measure in others
        if result.attention(measure, measured(result, measure, names)[0]).sizes["head"] > 1
    )
    measure = next(of_heads, None)
    return "" if measure is None else findings.band_of_overlay(result, measure)


def _undefined(result: Comparison) -> dict[str, str]:
    """By group, a sentence on the measures that have no value anywhere, and so no figure."""
    titles: dict[str, list[str]] = {"similarity": [], "attention": [], "tokens": []}
    for measure in result.measures:
        if not findings.is_defined(result, measure, subjects(result)):
            titles[result.group_of(measure)].append(MEASURES[measure].title)
    return {
        group: f"Undefined in every layer, as the notes say: {join(found)}." if found else ""
        for group, found in titles.items()
    }


def _title(models: tuple[str, ...]) -> str:
    if len(models) == 1:
        return f"{models[0]}, layer by layer"
    if len(models) > 5:
        return f"{', '.join(models[:3])} and {len(models) - 3} more"
    return join(models)


def _lead(result: Comparison) -> str:
    images, models = result.provenance["images"], subjects(result)
    subject = "One model" if len(models) == 1 else f"{len(models)} models"
    if result.groups:
        subject += f" ({count(len(result.groups), 'method')} in several seeds)"
    titles = [MEASURES[name].in_text for name in result.measures]
    # A list of everything says nothing.
    listed = join(titles) if len(titles) <= 6 else f"{len(titles)} measures"
    return f"{subject} on {count(images['count'], 'image')} from {images['source']}: {listed}."


def _contents(
    pictures: Pictures, lists: Lists, undefined: dict[str, str], refused: bool
) -> list[tuple[str, str]]:
    attention = pictures.overlays or pictures.others or undefined["attention"] or refused
    sections = [
        ("overview", "Overview", pictures.map or pictures.depth),
        ("models", "Models", True),
        ("similarity", "Similarity", pictures.selves or pictures.grids or undefined["similarity"]),
        ("attention", "Attention", attention),
        ("photographs", "Photographs", pictures.photographs),
        ("tokens", "Tokens", pictures.tokens or undefined["tokens"]),
        ("accuracy", "Accuracy", pictures.accuracy),
        ("differences", "Differences", len(lists.differences)),
        ("seeds", "Seeds", lists.group_means is not None),
    ]
    return [
        ("summary", "Summary"),
        *((id_, name) for id_, name, held in sections if held),
        ("files", "Files"),
        ("methods", "Methods"),
        ("notes", "Notes"),
        ("provenance", "Provenance"),
        ("cite", "How to cite"),
    ]


def _left_out(result: Comparison) -> str:
    """What of the models has no figure of its own, and where its numbers are."""
    sentences = []
    if result.references:
        sentences.append(
            "An untrained twin (the same architecture with random weights) is shown only beside "
            "its model; what it has in common with other models is in the tables."
        )
    if len(shown := findings.shown(result)) < len(subjects(result)):
        sentences.append(
            f"Of several seeds, figures of single models show the first ({join(shown)}); all seeds "
            "are in the overlays, in the Seeds section and in the tables."
        )
    return " ".join(sentences)


def _differences(table: pd.DataFrame) -> list[dict[str, Any]]:
    """By measure, a heading and the rows of the table of paired differences."""
    return [
        {
            "title": MEASURES[str(measure)].title,
            "stand": int((rows["verdict"] != UNDECIDED).sum()),
            "count": len(rows),
            "rows": [
                (
                    f"{row.model_a} − {row.model_b}",
                    bracket(row.difference, row.low, row.high, of_difference(row.units)),
                    p_value(row.p_holm),
                    row.verdict,
                )
                for row in rows_of(rows)
            ],
        }
        for measure, rows in table.groupby("measure", sort=False)
    ]


def _choosing(pictures: Pictures) -> dict[str, bool]:
    """Of which figures there are so many that the page shows one at a time."""
    return {
        "pairs": len(pictures.pairs) > _MOST_PAIRS,
        "heads": len(pictures.heads) > _MOST_MODELS,
        "photographs": len(pictures.photographs) > 2,
    }


def _scores(result: Comparison) -> list[dict[str, Any]]:
    """By protocol, a heading and the rows of its table, best model first."""
    found = []
    for table in by_protocol(result):
        units = str(table.attrs["units"])
        ranked = table.sort_values("value", ascending=False, kind="stable")
        rows = [
            (
                row.model,
                bracket(row.value, row.low, row.high, units),
                str(row.images),
                str(row.seeds),
            )
            for row in rows_of(ranked)
        ]
        found.append({"title": table.attrs["title"], "metric": table.attrs["metric"], "rows": rows})
    return found


def _seeds(result: Comparison, lists: Lists) -> dict[str, Any] | None:
    """The tables of the section about seeds; None without groups."""
    if lists.group_means is None or lists.group_differences is None:
        return None
    means = [
        (
            MEASURES[row.measure].title,
            row.group,
            bracket(
                row.mean, row.low, row.high, row.units, digits_of(row.between_seeds, row.units)
            ),
            str(row.seeds),
            spread(row.between_seeds, row.units),
        )
        for row in rows_of(lists.group_means)
    ]
    differences = [
        (
            MEASURES[row.measure].title,
            f"{row.group_a} − {row.group_b}",
            bracket(
                row.difference,
                row.low,
                row.high,
                of_difference(row.units),
                digits_of(row.between_seeds, row.units),
            ),
            spread(row.between_seeds, row.units),
            p_value(row.p_holm),
            row.verdict,
        )
        for row in rows_of(lists.group_differences)
    ]
    similarity = [
        (
            MEASURES[measure].title,
            row.group_a if row.group_a == row.group_b else f"{row.group_a} and {row.group_b}",
            bracket(row.mean, row.low, row.high, least=2),
            str(row.pairs),
        )
        for measure, table in lists.group_similarity.items()
        for row in rows_of(table)
        if row.pairs
    ]
    return {
        "several": findings.several_seeds(result),
        "means": means,
        "differences": differences,
        "similarity": similarity,
    }


def _glance(result: Comparison) -> dict[str, Any]:
    """Columns of the table of models, each a value per model."""
    names = subjects(result)
    noun = attention_noun(result, names)
    columns: dict[str, dict[str, str]] = {"Parameters": {}, "Blocks × heads": {}, "Patch grid": {}}
    for name in names:
        description = result.describe(name)
        facts = {key: fact["value"] for key, fact in description["facts"].items()}
        columns["Parameters"][name] = parameters(description["parameters"])
        depth = show(facts["depth"])
        numbered = f"{depth}{NBSP}×{NBSP}{heads(facts['heads'])}" if facts.get("heads") else depth
        columns["Blocks × heads"][name] = numbered
        columns["Patch grid"][name] = _grids(result, name)
    for measure in ("attention_distance", "attention_entropy"):
        if measure in result.measures:
            title = f"{MEASURES[measure].title}, first to last {noun}"
            columns[title] = {name: _first_to_last(result, measure, name) for name in names}
    if "sink_mass" in result.measures:
        title = f"{MEASURES['sink_mass'].title}, mean"
        having = measured(result, "sink_mass", names)
        columns[title] = {
            name: findings.overall(result, "sink_mass", name) if name in having else "–"
            for name in names
        }
    for table in by_protocol(result)[:_MOST_SCORES]:
        units = str(table.attrs["units"])
        texts = {row.model: bracket(row.value, row.low, row.high, units) for row in rows_of(table)}
        title = f"{table.attrs['title']}, {table.attrs['metric']}"
        columns[title] = {name: texts.get(name, "–") for name in names}
    return {
        "columns": list(columns),
        "rows": list(columns.values()),
        "attention": any(name in result.measures for name in findings.MAIN),
    }


def _grids(result: Comparison, name: str) -> str:
    """The grid of patches in a model's first layer, and in its last where that is another."""
    description = result.describe(name)
    grids = [layout["grid"] for layout in description.get("layouts", ())]
    grids = grids or [description["facts"]["grid"]["value"]]
    return " → ".join(dict.fromkeys(map(sides, (grids[0], grids[-1]))))


def _first_to_last(result: Comparison, measure: str, name: str) -> str:
    if name not in measured(result, measure, subjects(result)):
        return "–"
    if not (layers := findings.patch_layers(result, name)):
        return "not between patches"
    relative = result.needs_relative(measure, subjects(result))
    table = result.by_layer(measure, name, relative=relative).isel(layer=layers)
    units, table = table.attrs["units"], table.where(table["value"].notnull(), drop=True)
    if not table.sizes["layer"]:
        return "undefined"
    first, last = (findings.of_layer(table.isel(layer=index), units) for index in (0, -1))
    return f"{first} → {last}"


def _explanation(measure: str, attention: tuple[str, ...]) -> str:
    """What a measure is; of sink mass also what it hides from the measures of this result."""
    what = MEASURES[measure].what
    if measure != "sink_mass":
        return what
    hidden = renormalised(attention)
    what = what.partition(";")[0].removesuffix(".")
    verb = "describes" if len(hidden) == 1 else "describe"
    return f"{what}; {join(hidden)} {verb} only the rest." if hidden else f"{what}."


def _without_prefix(result: Comparison, attention: tuple[str, ...]) -> dict[str, str]:
    """By model without prefix tokens, why it has no figure of sink mass."""
    if "sink_mass" not in attention:
        return {}
    return {
        name: f"{name} has no prefix tokens, so its sink mass is 0 by construction."
        for name in measured(result, "sink_mass", findings.shown(result))
        if not has_prefix(result, name)
    }


def _details(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the provenance table, one level of nesting opened."""
    rows = []
    for key, value in provenance.items():
        if key in ("models", "notes", "preprocessing") or value in (None, [], {}):
            continue
        inner = value if isinstance(value, dict) and key != "versions" else {"": value}
        rows += [
            (f"{key} {part}".strip().replace("_", " "), show(item))
            for part, item in inner.items()
            if item not in (None, [], {})
        ]
    return rows


def _citation(version: str | None, year: int) -> str:
    return f"""@software{{vitprobe,
  title   = {{vitprobe: probe and compare what Vision Transformers learned}},
  author  = {{{{The vitprobe authors}}}},
  version = {{{version or "unknown"}}},
  year    = {{{year}}}
}}"""
