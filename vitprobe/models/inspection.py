"""What `vitprobe inspect` prints: all that is known of a model, and from where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitprobe.models.model import Model

_SHOWN = 3


def describe_text(model: Model) -> str:
    """A table in plain text: source, architecture with its evidence, keys, capture layers."""
    described = model.describe()
    source = [
        ("name", model.name),
        ("spec", model.spec),
        ("dialect", described["dialect"]),
        ("sha256", model.sha256),
        ("module", type(model.module).__name__),
        ("parameters", f"{described['parameters']:,}"),
        ("input", " x ".join(map(str, model.input_size)) + "  (channels x height x width)"),
        *((f"training.{key}", _plain(value)) for key, value in (model.training or {}).items()),
    ]
    facts = [
        (name, _plain(fact.value), fact.evidence + (f" ({fact.note})" if fact.note else ""))
        for name, fact in model.facts.items()
    ]
    sections = [
        ("Model", _table([row for row in source if row[1] is not None])),
        ("Architecture and evidence", _table(facts)),
        ("Weights", _table(_weights(model, described["nonfinite"]))),
        ("Layers to capture", _table(_layers(model))),
    ]
    return "\n\n".join(f"{title}\n{body}" for title, body in sections if body)


def _weights(model: Model, nonfinite: Sequence[str]) -> list[tuple[str, str]]:
    rows = []
    if report := model.report:
        rows = [
            ("loaded", f"{report.loaded_fraction:.1%} of the encoder"),
            *((name, _keys(getattr(report, name))) for name in ("matched", "missing")),
            *((name, _keys(getattr(report, name))) for name in ("unexpected", "ignored")),
        ]
        if report.branch:
            rows.insert(0, ("branch", report.branch))
    if nonfinite:
        rows.append(("not finite", _keys(nonfinite)))
    return rows


def _layers(model: Model) -> list[tuple[str, str]]:
    anatomy = model.anatomy
    depth = len(anatomy.blocks)
    final = anatomy.final_norm or "none"
    rows = [
        ("normed", f"0 to {depth - 1}: {anatomy.norms[0]} to {anatomy.norms[-1]}; {depth}: {final}")
        if anatomy.pre_norm
        else ("normed", "none: the blocks have no norm before their attention"),
        ("residual", f"0: input of {anatomy.blocks[0]}; 1 to {depth}: output of each block"),
        ("attention", f"{anatomy.attentions[0]} to {anatomy.attentions[-1]}"),
    ]
    if anatomy.final_norm_pooled:
        rows.append(("note", f"{final} follows the pooling in the model; it is read per token"))
    return rows


def _keys(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    return f"{len(keys)}" + (f"  ({shown})" if keys else "")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(_plain(part) for part in value)
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  "
        + "  ".join(
            [
                *(str(cell).ljust(width) for cell, width in zip(row, widths, strict=False)),
                str(row[-1]),
            ]
        )
        for row in rows
    )
