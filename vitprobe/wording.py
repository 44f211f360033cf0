"""Lists of names, numbers and settings in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def layers_in_words(layers: Iterable[int], noun: str = "layer") -> str:
    """`layer 3`, `layers 3 to 5 and 9`: runs written as ranges."""
    numbers = ranges(layers)
    return f"{noun}{'' if numbers.isdigit() else 's'} {numbers}"


def ranges(layers: Iterable[int]) -> str:
    """`3 to 5 and 9`."""
    runs: list[list[int]] = []
    for layer in map(int, layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return join([str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs])


def join(items: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def dotted(settings: Mapping[str, Any], inside: str = "") -> list[tuple[str, Any]]:
    """Nested settings with dotted names, `optimizer.lr`, as one writes them to change one.

    Those that are off (None, empty lists and texts) are left out.
    """
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += dotted(value, f"{inside}{key}.")
        elif value not in (None, [], ""):
            rows.append((f"{inside}{key}", value))
    return rows
