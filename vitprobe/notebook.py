"""How models, load reports, comparisons and scores look in a notebook: compact HTML tables.

They take the page's own colours, so that they read on light and dark, and hold no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from vitprobe.models.model import LoadReport, Model
    from vitprobe.results import Comparison
    from vitprobe.scores import Scores

Rows = Iterable[Sequence[Any]]

# Borders of a grey that shows on white and on black; text keeps the notebook's colour and size.
_STYLE = Markup("""<style>
.vitprobe-card{max-width:60em;overflow-x:auto;font-size:.9em;line-height:1.45;color:inherit}
.vitprobe-card table{border-collapse:collapse;margin:.2em 0 .5em;background:none;color:inherit}
.vitprobe-card caption{caption-side:top;text-align:left;font-weight:600;padding:.2em 0;
 color:inherit}
.vitprobe-card th,.vitprobe-card td{text-align:left;vertical-align:top;padding:.15em 1em .15em 0;
 border:0;border-bottom:1px solid rgba(128,128,128,.35);background:none;color:inherit}
.vitprobe-card th{font-weight:600;white-space:nowrap}
.vitprobe-card .num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.vitprobe-card summary{cursor:pointer}
.vitprobe-card code{background:none;color:inherit;padding:0;overflow-wrap:anywhere}
</style>""")
_MOST_ROWS = 20
_MOST_KEYS = 6


def of_model(model: Model) -> str:
    """A `Model`: where it comes from, its shape, and the evidence of every fact."""
    rows = [
        ("spec", _code(model.spec)),
        ("architecture", _shape(model.facts)),
        ("input", _by(model.input_size)),
        ("parameters", f"{sum(p.numel() for p in model.module.parameters()):,}"),
    ]
    if model.report is not None:
        rows.insert(1, ("checkpoint", _loaded(model.report)))
    if model.sha256 is not None:
        rows.append(("sha256", _code(model.sha256[:12] + "…")))
    parts = [_pairs(f"Model {model.name}", rows)]
    assumed = [name for name, fact in model.facts.items() if fact.evidence == "assumed"]
    title = f"Evidence of {len(model.facts)} facts"
    title += f", {len(assumed)} of them assumed: {', '.join(assumed)}" if assumed else ""
    facts = [
        (name, _plain(fact.value, name), _evidence(fact.evidence, fact.note))
        for name, fact in model.facts.items()
    ]
    parts.append(_folded(title, _table("Facts", ("fact", "value", "known from"), facts)))
    if model.report is not None:
        parts.append(_folded("Keys of the checkpoint", _keys(model.report)))
    return _card(parts)


def of_load_report(report: LoadReport) -> str:
    """A `LoadReport`: how much of the encoder the file filled, and which keys it did not use."""
    return _card([_keys(report)])


def of_comparison(result: Comparison) -> str:
    """A `Comparison`: its models, what was measured and what a reader must know."""
    images = result.provenance["images"]["count"]
    count = len(result.models)
    title = f"Comparison of {count} model{'s' * (count != 1)} on {images:,} images"
    models = []
    for name in result.models:
        known = result.describe(name)
        facts = known["facts"]
        shape = ", ".join(
            f"{what} {_plain(facts[what]['value'])}"
            for what in ("width", "depth", "heads")
            if what in facts
        )
        assumed = Markup("<strong>{}</strong>").format(", ".join(known["assumed"]) or "")
        models.append((name, shape, _by(known["input_size"]), assumed, _code(known["spec"])))
    parts = [_table(title, ("model", "architecture", "input", "assumed", "spec"), models)]
    measured = [
        (name, result.group_of(name), _units(result, name), _access(result, name))
        for name in result.measures
    ]
    parts.append(_table("Measures", ("measure", "of", "unit", "read by"), measured))
    if result.groups:
        seeds = [(name, ", ".join(members)) for name, members in result.groups.items()]
        parts.append(_table("Groups of seeds", ("method", "models"), seeds))
    if notes := result.notes:
        items = Markup("").join(Markup("<li>{}</li>").format(note) for note in notes)
        parts.append(_folded(f"Notes ({len(notes)})", Markup("<ul>{}</ul>").format(items)))
    return _card(parts)


def of_scores(scores: Scores) -> str:
    """`Scores`: a row a number, the first of them where there are many."""
    head = ("model", "protocol", "dataset", "metric", "value", "95 % interval", "of", "settings")
    rows = [
        (
            row.model,
            row.protocol,
            row.dataset,
            row.metric,
            _number(f"{row.value:.4g}"),
            _number("" if math.isnan(row.low) else f"{row.low:.4g} to {row.high:.4g}"),
            f"{row.images:,} images",
            ", ".join(_conditions(row)),
        )
        for row in scores.rows[:_MOST_ROWS]
    ]
    count = len(scores)
    parts = [_table(f"{count} score{'s' * (count != 1)}", head, rows)]
    if count > _MOST_ROWS:
        rest = count - _MOST_ROWS
        parts.append(Markup("<p>… and {} more: <code>to_dataframe()</code></p>").format(rest))
    return _card(parts)


def _conditions(row: Any) -> Iterable[str]:
    if row.layer is not None:
        yield f"layer {row.layer}"
    if row.kept is not None:
        yield f"{row.kept} blocks kept"
    if row.labels != 1:
        yield f"{row.labels:.3g} of the labels"
    if row.seed:
        yield f"seed {row.seed}"
    yield from (f"{key} {_plain(value)}" for key, value in row.settings.items())


def _units(result: Comparison, measure: str) -> str:
    units = str(result.tree[result.group_of(measure)][measure].attrs["units"])
    return "" if units == "1" else units


def _access(result: Comparison, measure: str) -> Markup:
    group = result.group_of(measure)
    call = {"similarity": "similarity('{}', a, b)", "attention": "attention('{}', model)"}
    return _code("." + call.get(group, "tokens('{}', model)").format(measure))


def _loaded(report: LoadReport) -> str:
    branch = f", branch {report.branch}" if report.branch else ""
    return f"{report.dialect}{branch}; {_share(report.loaded_fraction)} of the encoder loaded"


def _keys(report: LoadReport) -> Markup:
    rows = [("loaded", _share(report.loaded_fraction) + " of the encoder, by element", "")]
    if report.branch:
        rows.append(("branch", report.branch, ""))
    for name in ("matched", "missing", "unexpected", "ignored"):
        keys = getattr(report, name)
        rows.append((name, f"{len(keys):,} keys", _some(keys)))
    title = f"Checkpoint of dialect {report.dialect}"
    return _table(title, ("", "how much", "such as"), rows)


def _share(fraction: float) -> str:
    # 99.96 % is not all of it.
    return f"{100 if fraction == 1 else min(fraction * 100, 99.9):.3g} %"


def _some(keys: Sequence[str]) -> Markup:
    shown = Markup(", ").join(_code(key) for key in keys[:_MOST_KEYS])
    return shown + (", …" if len(keys) > _MOST_KEYS else "")


def _shape(facts: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_plain(facts[name].value, name)}"
        for name in ("width", "depth", "heads", "patch_size", "prefix_tokens")
        if name in facts
    )


def _evidence(evidence: str, note: str) -> Markup:
    what = Markup("<strong>{}</strong>") if evidence == "assumed" else Markup("{}")
    return what.format(evidence) + (f" ({note})" if note else "")


def _plain(value: Any, name: str = "") -> str:
    """A value in words; sides of a grid or patch are joined by ×, values of stages by a comma."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        nested = any(isinstance(part, tuple | list) for part in value)
        if name in ("grid", "patch_size") and not nested:
            return _by(value)
        return ", ".join(_plain(part, name) for part in value)
    return str(value)


def _by(size: Sequence[float]) -> str:
    return " × ".join(f"{side:g}" for side in size)


def _code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


class _Number(str):
    """A cell that is set to the right."""


def _number(text: str) -> _Number:
    return _Number(text)


def _cell(value: Any) -> Markup:
    place = Markup(' class="num"') if isinstance(value, _Number) else Markup("")
    return Markup("<td{}>{}</td>").format(place, value)


def _table(caption: str, head: Sequence[str], rows: Rows) -> Markup:
    columns = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    return Markup("<table><caption>{}</caption><thead><tr>{}</tr></thead>{}</table>").format(
        caption, columns, _body(rows)
    )


def _pairs(caption: str, rows: Rows) -> Markup:
    return Markup("<table><caption>{}</caption>{}</table>").format(caption, _body(rows))


def _body(rows: Rows) -> Markup:
    lines = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            first, Markup("").join(map(_cell, rest))
        )
        for first, *rest in rows
    )
    return Markup("<tbody>{}</tbody>").format(lines)


def _folded(summary: str, inside: Markup) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(escape(summary), inside)


def _card(parts: Iterable[Markup]) -> str:
    card = Markup('<div class="vitprobe-card">{}{}</div>')
    return str(card.format(_STYLE, Markup("").join(parts)))
