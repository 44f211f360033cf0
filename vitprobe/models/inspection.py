"""What `vitprobe inspect` prints: all that is known of a model, and from where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from vitprobe.models.anatomy import Layout, Site
from vitprobe.models.model import Model
from vitprobe.sites import in_words, kind_of, refusals, remarks
from vitprobe.wording import dotted

_SHOWN: Final = 3
# Measures whose refusals are told: one that asks for nothing, and one that asks for places.
_ASKED: Final = ("attention_distance", "attention_entropy")


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
        *((name, _plain(value)) for name, value in dotted(model.training or {}, "training.")),
    ]
    facts = [
        (name, _plain(fact.value), fact.evidence + (f" ({fact.note})" if fact.note else ""))
        for name, fact in model.facts.items()
    ]
    sections = [
        ("Model", _table([row for row in source if row[1] is not None])),
        ("Architecture and evidence", _table(facts)),
        ("Weights", _table(_weights(model))),
        ("Layers to capture", _table(_layers(model))),
        ("Attention layers", _table(_attention(model))),
    ]
    return "\n\n".join(f"{title}\n{body}" for title, body in sections if body)


def _weights(model: Model) -> list[tuple[str, str]]:
    rows = []
    if report := model.report:
        rows = [
            ("loaded", f"{report.loaded_fraction:.1%} of the encoder"),
            *((name, _keys(getattr(report, name))) for name in ("matched", "missing")),
            *((name, _keys(getattr(report, name))) for name in ("unexpected", "ignored")),
        ]
        if report.branch:
            rows.insert(0, ("branch", report.branch))
    if model.nonfinite:
        rows.append(("not finite", _keys(model.nonfinite)))
    return rows


def _layers(model: Model) -> list[tuple[str, str]]:
    anatomy = model.anatomy
    depth = len(anatomy.blocks)
    final = anatomy.final_norm or f"output of {anatomy.blocks[-1]}"
    rows = [
        ("normed", f"0 to {depth - 1}: {anatomy.norms[0]} to {anatomy.norms[-1]}; {depth}: {final}")
        if anatomy.normed
        else ("normed", "none: not every block has a norm before its attention"),
        ("residual", f"0: input of {anatomy.blocks[0]}; 1 to {depth}: output of each block"),
    ]
    layouts = anatomy.normed or anatomy.residual
    rows += [("tokens", f"{where}: {_tokens(layout)}") for where, layout in _runs(layouts)]
    if anatomy.final_norm_pooled:
        rows.append(("note", f"{final} follows the pooling in the model; it is read per token"))
    return rows


def _tokens(layout: Layout) -> str:
    prefix = f"{_count(layout.prefix_tokens, 'prefix token')} and " if layout.prefix_tokens else ""
    if layout.grid is None or layout.patch_size is None:
        patches = f"{layout.patches} tokens, where in the image is not known"
    else:
        rows, columns = layout.grid
        height, width = layout.patch_size
        patches = f"{rows}x{columns} patches of {height:g}x{width:g} pixels"
    return f"{prefix}{patches}, width {layout.width}"


def _attention(model: Model) -> list[tuple[str, str]]:
    anatomy = model.anatomy
    if not anatomy.sites:
        return [("none", anatomy.no_attention)]
    rows: list[tuple[str, str]] = []
    first = 0
    for where, form in _runs([_form(site) for site in anatomy.sites]):
        last = int(where.rpartition(" ")[2])
        paths = dict.fromkeys((anatomy.sites[first].path, anatomy.sites[last].path))
        rows.append((where, f"{' to '.join(paths)}: {form}"))
        first = last + 1
    rows += [("refused", in_words([refusal])) for refusal in refusals(anatomy, _ASKED)]
    rows += [("note", remark) for remark in remarks(anatomy)]
    return rows


def _form(site: Site) -> str:
    """What attends to what in an attention layer."""
    windows = "" if site.windows == 1 else f", {site.windows} windows"
    masked = "" if site.allowed is None else ", masked"
    queries, keys = (
        counted + (f" ({prefix} prefix)" if prefix else "")
        for counted, prefix in (
            (_count(site.queries, "query", "queries"), site.query_prefix),
            (_count(site.keys, "key"), site.key_prefix),
        )
    )
    shape = f"{_count(site.heads, 'head')}{windows} of {queries} to {keys}{masked}"
    return f"{kind_of(site)}, {shape}"


Shown = TypeVar("Shown")


def _runs(values: Sequence[Shown]) -> list[tuple[str, Shown]]:
    """("0 to 3", value) of each run of equal values."""
    runs: list[tuple[str, Shown]] = []
    first = 0
    for i, value in enumerate(values):
        if i + 1 == len(values) or values[i + 1] != value:
            runs.append((str(i) if i == first else f"{first} to {i}", value))
            first = i + 1
    return runs


def _count(number: int, noun: str, several: str = "") -> str:
    return f"{number} {noun if number == 1 else several or f'{noun}s'}"


def _keys(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    return f"{len(keys)}" + (f"  ({shown})" if keys else "")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        nested = any(isinstance(part, tuple | list) for part in value)
        return ("; " if nested else ", ").join(_plain(part) for part in value)
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
