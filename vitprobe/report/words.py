"""Numbers and lists as words."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
LEVEL = f"95{NBSP}%"
POINTS = "percentage points"
"""The unit of differences of shares, which in per cent would read as relative to the shares."""


def number(value: float) -> str:
    """Three significant digits, at most six decimals, with a real minus sign."""
    return _fixed(value, decimals(value, 3))


def decimals(value: float, digits: int) -> int:
    """The decimals, at most six, with which a number has so many significant digits."""
    rounded = abs(float(f"{value:.{digits - 1}e}"))  # 99.96 has three digits as 100, not as 100.0
    return min(6, max(0, digits - 1 - int(np.floor(np.log10(rounded))))) if rounded else 0


def two_digits(value: float) -> str:
    """Two decimals with a real minus sign, and none before zero."""
    return _fixed(value, 2)


def quantity(value: float, units: str) -> str:
    """A number in its unit: `45.2 px`, `38.1 % of uniform`, a share in whole per cent."""
    if units == "share":
        return percent(value)
    return amount(value, units)


def amount(value: float, units: str) -> str:
    """As `quantity`, but a share too has three significant digits; a dash for nan."""
    scale, unit = _scaled(units)
    return f"{number(scale * value)}{unit}" if np.isfinite(value) else "–"


def of_difference(units: str) -> str:
    """The unit of a difference, or of a spread, of numbers in these units."""
    return POINTS if units == "share" else units


def spread(value: float, units: str) -> str:
    """A standard deviation with two significant digits; a dash for nan."""
    scale, unit = _scaled(of_difference(units))
    return f"{_fixed(scale * value, digits_of(value, units))}{unit}" if np.isfinite(value) else "–"


def digits_of(value: float, units: str) -> int:
    """The decimals that a spread, or a range, of that size asks of the numbers beside it."""
    return decimals(_scaled(units)[0] * value, 2) if np.isfinite(value) else 0


def bracket(value: float, low: float, high: float, units: str = "", least: int = 0) -> str:
    """A number, its unit and its interval: `45.2 px [44.9, 45.5]`.

    To the digits that its interval supports, and at least to `least` decimals; to one or two more
    where an end that is not 0 would else be printed as 0. Where there is no interval, as
    `quantity`, or with `least` decimals.
    """
    scale, unit = _scaled(units)
    width = scale * (high - low)
    if not (np.isfinite(width) and width > 0):
        return f"{_fixed(scale * value, least)}{unit}" if least else quantity(value, units)
    digits = min(6, max(least, int(np.ceil(np.round(-np.log10(width / 3), 6)))))
    # An interval that leaves 0 out says that two are told apart, and shall not look as if not.
    near = scale * min(low, -high, key=abs)
    if low * high > 0 and round(near, digits) == 0:
        digits = next((d for d in (digits + 1, digits + 2) if round(near, d)), digits)
    middle, below, above = (_fixed(scale * end, digits) for end in (value, low, high))
    return f"{middle}{unit} [{below},{NBSP}{above}]"


def _scaled(units: str) -> tuple[float, str]:
    """What a number is multiplied with to be printed, and what follows it."""
    if units == "share":
        return 100.0, f"{NBSP}%"
    if units == POINTS:
        return 100.0, f"{NBSP}{POINTS}"
    if units == "relative to uniform":
        return 100.0, f"{NBSP}% of uniform"
    return 1.0, "" if units in ("", "1") else f"{NBSP}{units}"


def percent(value: Any) -> str:
    """A share of 1 in whole per cent."""
    return f"{_fixed(100 * float(value), 0)}{NBSP}%"


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


def p_value(p: float) -> str:
    """`0.031`, `< 0.001`, and a dash where there is none."""
    if not np.isfinite(p):
        return "–"
    return f"<{NBSP}0.001" if p < 0.001 else _fixed(p, 3)


def _fixed(value: float, digits: int) -> str:
    """So many decimals with a real minus sign, and none before zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", MINUS)


def with_minus(text: str) -> str:
    """A text with a real minus sign before its negative numbers: `−1 to 1`."""
    return re.sub(r"(?<![\w)])-(?=\d)", MINUS, text)
