"""Writes measures.md from what every measure says about itself: `python docs/measures.py`."""

from __future__ import annotations

from pathlib import Path

from vitprobe.measures.base import Group, Info
from vitprobe.measures.registry import ATTENTION, MEASURES

PAGE = Path(__file__).with_suffix(".md")

OPENING = """# The measures

Written by `docs/measures.py` from the measures' own descriptions (`vitprobe.measures.MEASURES`),
which the Methods section of a report quotes too. The name in brackets is what `--measures` and
`compare(measures=[...])` take; `all` takes every one, and `first_direction_share` comes with `cka`.

- **Invariant to**: what may be done to the input without changing the number, and nothing else may.
  Transformations, scaling and shift are of the features of one layer (of either of two); images are
  reordered in both; tokens or keys are reordered in every image alike.
- **Streams**: *exact*: any split of the images gives the same number; *blocked*: the number belongs
  to the block size (`--block`); *subset*: it is of the first `--max-images` images.
- **Attention layers**: of which of a model's attention layers it is. Others have no number of it
  (nan), and the notes of a result say which and why; models without attention have none at all.
- **Intervals** are pointwise, at 95 % unless asked otherwise. Differences between models are paired
  over the same images; claims about methods take seeds as the unit; lists are corrected by Holm's
  method.
"""

GROUPS: dict[Group, str] = {
    "similarity": "Similarity of two layers",
    "attention": "Attention of a head",
    "tokens": "Tokens of a layer",
}


def page() -> str:
    """The whole of measures.md."""
    parts = [OPENING]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(info) for info in MEASURES.values() if info.group == group]
    return "\n".join(parts)


LAYERS = {
    "rows": "all, those over channels and of a class token alone too, which are labelled",
    "patches": "those between patches",
    "places": "those between patches whose places in the image are known",
    "class": "those with a class token among their queries",
}


def _layers(name: str) -> str:
    measure = ATTENTION[name]
    if measure.per_block:
        return "those of models in which each block is one map of the same patches"
    return (
        "those that are one map of all patches" if measure.needs == "map" else LAYERS[measure.asks]
    )


def _entry(info: Info) -> str:
    of_layers = {"Attention layers": _layers(info.name)} if info.group == "attention" else {}
    lines = {
        "Formula": info.formula,
        "Source": info.source,
        "Unit": info.unit or "none",
        "Range": info.range,
        "Direction": info.direction,
        "Invariant to": ", ".join(info.invariances) or "nothing listed above",
        **of_layers,
        "Streams": info.streams,
        "Interval": info.interval,
        "Null": info.null,
        "Compares": ", ".join(f"only models of equal {fact}" for fact in info.alike)
        or "any models",
        "Caveats": info.caveats,
        "Elsewhere": info.elsewhere,
    }
    items = "\n".join(f"- **{key}**: {_plain(text)}" for key, text in lines.items())
    return f"### {info.title} (`{info.name}`)\n\n{_plain(info.what)}\n\n{items}\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("*", r"\*").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
