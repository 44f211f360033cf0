"""Numbers and lists as words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
LEVEL = f"95{NBSP}%"


def number(value: float) -> str:
    """Three significant digits, at most six decimals, with a real minus sign."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 99.96 has three digits as 100, not as 100.0
    digits = max(0, 2 - int(np.floor(np.log10(abs(rounded)))))
    return _fixed(value, min(digits, 6))


def two_digits(value: float) -> str:
    """Two decimals with a real minus sign, and none before zero."""
    return _fixed(value, 2)


def quantity(value: float, units: str) -> str:
    """A number in its unit: `45.2 px`, `38.1 % of uniform`, a share in whole per cent."""
    if units == "share":
        return percent(value)
    if units == "relative to uniform":
        return f"{number(100 * value)}{NBSP}% of uniform"
    return f"{number(value)}{NBSP}{units}"


def percent(value: Any) -> str:
    """A share of 1 in whole per cent."""
    return f"{100 * float(value):.0f}{NBSP}%"


def count(many: int, noun: str) -> str:
    """`1 block`, `3 blocks`."""
    return f"{many} {noun}" + ("" if many == 1 else "s")


def show(value: Any) -> str:
    """Any JSON value on one line."""
    if isinstance(value, list | tuple):
        return " / ".join(show(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def change(first: float, last: float, units: str) -> str:
    """Two quantities with their unit once: `45.2 → 60.1 px`."""
    if units == "share" or units == "relative to uniform":
        start = quantity(first, units).split(NBSP)[0]
    else:
        start = number(first)
    return f"{start}{NBSP}→{NBSP}{quantity(last, units)}"


def estimate(value: float, margin: float, units: str) -> tuple[str, str, str]:
    """A difference, its interval, and their unit, to two digits of the interval's width.

    `0.009`, `−0.001 to 0.019` and `px`; more digits where an end would be rounded to zero.
    """
    scale, sign, unit = 1.0, "", units
    if units == "relative to uniform":
        scale, sign, unit = 100.0, f"{NBSP}%", "of uniform"
    value, ends = scale * value, [scale * (value - margin), scale * (value + margin)]
    width = max(ends[1] - ends[0], abs(value) / 1000)
    digits = min(6, max(0, 1 - int(np.floor(np.log10(width))))) if width else 0
    while digits < 6 and any(end and round(end, digits) == 0 for end in ends):
        digits += 1
    middle, low, high = (_fixed(end, digits) + sign for end in (value, *ends))
    return middle, f"{low} to {high}", unit


def _fixed(value: float, digits: int) -> str:
    """So many decimals with a real minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def layers_in_words(layers: Iterable[int], noun: str = "layer") -> str:
    """`layer 3`, `layers 3 to 5 and 9`: runs written as ranges."""
    runs: list[list[int]] = []
    for layer in map(int, layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"{noun}{'' if len(texts) == len(runs[0]) == 1 else 's'} {join(texts)}"


def join(items: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
