"""Numbers and lists as words."""

from __future__ import annotations

import pytest

from vitprobe.report.words import (
    MINUS,
    change,
    count,
    estimate,
    join,
    layers_in_words,
    number,
    percent,
    quantity,
    show,
    two_digits,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (116.49, "116"),
        (45.25, "45.2"),
        (99.96, "100"),
        (0.9996, "1.00"),
        (4.125, "4.12"),
        (0.01234, "0.0123"),
        (12345.6, "12346"),
        (-3.5, f"{MINUS}3.50"),
        (-1e-9, "0.000000"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


def test_quantities_carry_their_unit():
    assert quantity(45.25, "px") == "45.2\N{NO-BREAK SPACE}px"
    assert quantity(0.381, "relative to uniform") == "38.1\N{NO-BREAK SPACE}% of uniform"
    assert quantity(0.5, "share") == percent(0.5) == "50\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("value", "margin", "units", "expected"),
    [
        (0.0091, 0.0098, "px", ("0.009", "-0.001 to 0.019", "px")),
        (12.34, 0.04, "px", ("12.340", "12.300 to 12.380", "px")),
        (0.25, 0.0, "nats", ("0.25000", "0.25000 to 0.25000", "nats")),
        (0.4, 0.01, "relative to uniform", ("40.0 %", "39.0 % to 41.0 %", "of uniform")),
        (0.0102, 0.0100, "px", ("0.0102", "0.0002 to 0.0202", "px")),
    ],
)
def test_differences_have_the_precision_of_their_interval(value, margin, units, expected):
    texts = estimate(value, margin, units)
    assert (
        tuple(t.replace("\N{NO-BREAK SPACE}", " ").replace(MINUS, "-") for t in texts) == expected
    )


def test_a_change_has_its_unit_once():
    assert change(1.5, 2, "px").replace("\N{NO-BREAK SPACE}", " ") == "1.50 → 2.00 px"
    relative = change(0.3, 0.5, "relative to uniform").replace("\N{NO-BREAK SPACE}", " ")
    assert relative == "30.0 → 50.0 % of uniform"


def test_cka_has_two_decimals_and_no_negative_zero():
    assert two_digits(0.456) == "0.46"
    assert two_digits(-0.001) == "0.00"
    assert two_digits(-0.05) == f"{MINUS}0.05"


def test_lists_and_ranges():
    assert join([]) == ""
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert layers_in_words([3]) == "layer 3"
    assert layers_in_words([3, 4]) == "layers 3 to 4"
    assert layers_in_words([0, 3, 4, 5, 9]) == "layers 0, 3 to 5 and 9"
    assert count(1, "block") == "1 block"
    assert count(3, "block") == "3 blocks"


def test_any_value_fits_on_a_line():
    assert show([0.485, 0.456]) == "0.485 / 0.456"
    assert show(1e-6) == "1e-06"
    assert show({"torch": "2.6", "timm": "1.0"}) == "torch 2.6, timm 1.0"
    assert show(None) == "None"
