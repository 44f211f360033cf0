"""Cards of models: what was compared, how each fact about it is known, and what it scores."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any

from vitprobe.plots.accuracy_panels import by_protocol
from vitprobe.plots.differences import rows_of
from vitprobe.plots.style import attention_noun, color_index
from vitprobe.report.words import NBSP, bracket, count, number, percent, show
from vitprobe.wording import dotted, join

if TYPE_CHECKING:
    from vitprobe.results import Comparison

_READING_ORDER = (
    "width",
    "depth",
    "heads",
    "patch_size",
    "grid",
    "prefix_tokens",
    "mlp_ratio",
    "activation",
    "norm_eps",
    "final_norm",
    "position_embedding",
    "mean",
    "std",
)

_KINDS = {
    "global": "global",
    "windows": "in windows",
    "pooled keys": "over pooled keys",
    "class token": "of the class token",
    "channels": "over channels",
    "unknown places": "of unknown places",
}


def card(result: Comparison, name: str) -> dict[str, Any]:
    """What a model's card shows: its description, how it was trained, and what it scores."""
    description = result.describe(name)
    known = description["training"] or {}
    size = " × ".join(map(str, result.input_size(name)))
    headline = f"{parameters(description['parameters'])} parameters, input {size}"
    if description["dialect"]:
        headline += f", {description['dialect']} checkpoint"
    training = {
        key.replace("_", " "): value
        for key, value in sorted(known.items(), key=lambda item: (item[0] != "method", item[0]))
        if not isinstance(value, dict | list) and not key.endswith("sha256")
    }
    if training:
        headline += f"; trained by vitprobe: {show(training)}"
    facts = [*_facts(description["facts"]), *_attention_fact(result, name)]
    return {
        **description,
        "facts": facts,
        "assumed": [f"{key} {text}" for key, text, _, is_assumed in facts if is_assumed],
        "metrics": _metrics(known.get("metrics")),
        "recipe": [(key, show(value)) for key, value in dotted(known.get("recipe") or {})],
        "scores": _scores(result, name),
        "color": color_index(result, name),
        "headline": headline,
        "loading": _loading(description["report"]),
        "nonfinite": description["nonfinite"],
        "probe": _probe(description.get("probe")),
    }


def _metrics(metrics: Any) -> str:
    """What training itself ended with."""
    if not isinstance(metrics, dict):
        return ""
    parts = [
        f"{key.replace('_', ' ')} {number(value)}"
        for key, value in metrics.items()
        if isinstance(value, int | float)
    ]
    return f"Its training ended with {join(parts)}." if parts else ""


def _scores(result: Comparison, name: str) -> list[tuple[str, str]]:
    """What the model scores in each evaluation that is joined to the result."""
    return [
        (
            f"{table.attrs['title']}, {table.attrs['metric']}",
            bracket(row.value, row.low, row.high, str(table.attrs["units"])),
        )
        for table in by_protocol(result)
        for row in rows_of(table[table["model"] == name])
    ]


def _probe(probe: dict[str, Any] | None) -> str:
    """What was read in place of the model, and when and where it had been run."""
    if probe is None:
        return ""
    made = datetime.fromisoformat(probe["created"])
    versions = join(
        [
            f"{name} {probe['versions'][name]}"
            for name in ("vitprobe", "torch")
            if name in probe["versions"]
        ]
    )
    return (
        f"Not run here: read from the probe file {probe['file']}, made on {made.day} {made:%B %Y} "
        f"on {probe['device']} with {versions}."
    )


def _facts(facts: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """(name, value, evidence, whether assumed) of every fact, the model's shape first."""
    known = [key for key in _READING_ORDER if key in facts]
    rows = []
    for key in [*known, *sorted(facts.keys() - set(known))]:
        value = facts[key]["value"]
        if value in (None, [], ()):
            continue
        text = show(value)
        if key in ("grid", "patch_size"):
            text = sides(value)
        elif key == "heads":
            text = heads(value)
        evidence, note = facts[key]["evidence"], facts[key].get("note")
        source = f"{evidence}: {note}" if note else evidence
        rows.append((key.replace("_", " "), text, source, evidence == "assumed"))
    return rows


def _attention_fact(result: Comparison, name: str) -> list[tuple[str, str, str, bool]]:
    """What attends to what, where that is not one attention of all patches a block."""
    layers = result.attention_layers(name)
    if not layers:
        reason = result.describe(name).get("no_attention", "")
        return [("attention", f"none: {reason}" if reason else "none", "forward pass", False)]
    kinds = Counter(layer["kind"] for layer in layers)
    if set(kinds) == {"global"} and attention_noun(result, (name,)) == "block":
        return []
    text = ", ".join(f"{number} {_KINDS[kind]}" for kind, number in kinds.items())
    return [("attention layers", f"{len(layers)}: {text}", "forward pass", False)]


def _loading(report: dict[str, Any] | None) -> str:
    if report is None:
        return ""
    text = (
        f"{percent(report['loaded_fraction'])} of the encoder's parameters came from the file: "
        f"{count(len(report['matched']), 'tensor')} matched"
    )
    for key in ("missing", "unexpected", "ignored"):
        if names := report[key]:
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            text += f"; {len(names)} {key} ({listed})"
    if report["branch"]:
        text += f"; branch {report['branch']}"
    return f"{text}."


def parameters(parameters: int) -> str:
    if parameters >= 1e6:
        return f"{number(parameters / 1e6)} M"
    return f"{number(parameters / 1e3)} k" if parameters >= 1e3 else str(parameters)


def sides(value: Any) -> str:
    """A pair of sides, or that of each stage of a model: `56 × 56 / 28 × 28`."""
    if value is None:
        return "unknown"
    if not isinstance(value[0], int | float):
        return " / ".join(map(sides, value))
    return f"{NBSP}×{NBSP}".join(map(show, value))


def heads(value: Any) -> str:
    """A number of heads, or those that attention layers have: `3 / 6 / 12`."""
    return show(list(dict.fromkeys(value)) if isinstance(value, list | tuple) else value)
