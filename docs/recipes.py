"""Writes recipes.md from the bundled recipes and their first lines: `python docs/recipes.py`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "vitprobe" / "training" / "recipes"
PAGE = Path(__file__).with_suffix(".md")
FIELDS = ("Source", "Command", "Expected")

OPENING = """# The recipes

Written by `docs/recipes.py` from the recipes themselves (`vitprobe/training/recipes/`).

A recipe is a TOML file; `vitprobe pretrain` takes the name of a bundled one or a file, which may
begin with `inherits = "digits_mae"` and change what it wants. Single keys are changed by
`--set epochs=30 optimizer.lr=0.01`. An unknown key is an error that suggests the nearest.
`--dry-run` prints the resolved recipe, parameters, FLOPs, steps and memory.

```sh
vitprobe pretrain digits_mae --dry-run
vitprobe pretrain digits_mae --out runs/mae --set epochs=30 optimizer.lr=0.01 'snapshots=[10]'
vitprobe pretrain runs/mae/recipe.toml --out runs/mae --resume
vitprobe runs runs/ --out curves.pdf
```

`optimizer.lr` is for 256 images: the rate used is lr x batch / 256. Any method can be distilled: a
table `[distill]` names a teacher and weighs its attention maps, its hidden states and, for
supervised training, its logits. What a run leaves is an ordinary checkpoint: `run:runs/mae` for
`vitprobe compare`.

| recipe | method | encoder | epochs | batch |
|---|---|---|---|---|
"""


def names() -> list[str]:
    """The bundled recipes, without those that others inherit alone."""
    return sorted(p.stem for p in FOLDER.glob("*.toml") if not p.stem.startswith("_"))


def tables(name: str) -> dict[str, Any]:
    """A recipe with what it inherits."""
    own = tomllib.loads(_text(name))
    parent = tables(own.pop("inherits")) if "inherits" in own else {}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(parent.get(key), dict)
        parent[key] = {**parent[key], **value} if both else value
    return parent


def _text(name: str) -> str:
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def page() -> str:
    """The whole of recipes.md."""
    return OPENING + "".join(map(_row, names())) + "".join(map(_entry, names()))


def _row(name: str) -> str:
    recipe = tables(name)
    method = recipe["method"]["name"] + (", distilled" if "distill" in recipe else "")
    shape = "its checkpoint's"
    if "width" in (one := recipe.get("encoder", {})):
        shape = f"width {one['width']}, depth {one['depth']}, {one['heads']} heads"
        shape += f", patch {one['patch_size']} at {one['image_size']} px"
    counts = f"{recipe['epochs']} | {recipe['batch_size']}"
    return f"| [`{name}`](#{name}) | {method} | {shape} | {counts} |\n"


def _entry(name: str) -> str:
    title, facts = _opening(_text(name))
    body = "".join(
        f"\n```sh\n{fact}\n```\n" if key == "Command" else f"\n- **{key}**: {_plain(fact)}\n"
        for key, fact in facts.items()
    )
    return f"\n## {name}\n\n{_plain(title)}\n{body}"


def _opening(text: str) -> tuple[str, dict[str, str]]:
    """The first lines of a recipe: what it is, and what follows `Source:`, `Command:`, …."""
    title: list[str] = []
    facts: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        line = line.removeprefix("#").strip()
        first, colon, rest = line.partition(": ")
        if colon and first in FIELDS:
            key, facts[first] = first, rest
        elif key == "Command":
            facts[key] += f"\n    {line}"
        elif key:
            facts[key] += f" {line}"
        else:
            title.append(line)
    return " ".join(title), facts


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("*", r"\*").replace("<", "&lt;").replace("[", r"\[")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
