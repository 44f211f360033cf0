"""Numbers and lists as words."""

from __future__ import annotations

import numpy as np
import pytest

from vitprobe.report.words import (
    MINUS,
    POINTS,
    amount,
    bracket,
    count,
    digits_of,
    number,
    p_value,
    percent,
    quantity,
    show,
    spread,
    two_digits,
    with_minus,
)
from vitprobe.wording import join, layers_in_words


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
    assert quantity(-0.02, "share") == f"{MINUS}2\N{NO-BREAK SPACE}%"
    assert quantity(0.5, "share") == percent(0.5) == "50\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("value", "low", "high", "units", "least", "expected"),
    [
        (45.213, 44.9, 45.5, "px", 0, "45.2 px [44.9, 45.5]"),
        (12.34, 12.30, 12.38, "px", 0, "12.34 px [12.30, 12.38]"),
        (0.25, 0.25, 0.25, "nats", 0, "0.250 nats"),
        (0.25, np.nan, np.nan, "nats", 0, "0.250 nats"),
        (0.4, 0.39, 0.41, "relative to uniform", 0, "40.0 % of uniform [39.0, 41.0]"),
        (0.4, 0.396, 0.404, "share", 0, "40.0 % [39.6, 40.4]"),
        (0.9, 0.8, 1.0, "", 2, "0.90 [0.80, 1.00]"),
        (0.9, 0.8995, 0.9005, "", 2, "0.9000 [0.8995, 0.9005]"),
        (0.9, np.nan, np.nan, "", 2, "0.90"),
        (-0.1, -0.12, -0.08, "1", 2, "-0.10 [-0.12, -0.08]"),
        (3.4, 2.4, 4.4, "nats", 0, "3.4 nats [2.4, 4.4]"),
        (120.0, 80.0, 160.0, "px", 0, "120 px [80, 160]"),
        (0.0301, np.nan, np.nan, "share", 2, "3.01 %"),
        (-0.0082, -0.0102, -0.0062, POINTS, 0, "-0.8 percentage points [-1.0, -0.6]"),
    ],
)
def test_numbers_with_intervals_have_the_digits_that_these_support(
    value, low, high, units, least, expected
):
    text = bracket(value, low, high, units, least)
    assert text.replace("\N{NO-BREAK SPACE}", " ").replace(MINUS, "-") == expected


def test_an_interval_that_leaves_zero_out_is_not_printed_as_holding_it():
    assert bracket(2.6, 0.4, 4.8, "px").replace("\N{NO-BREAK SPACE}", " ") == "2.6 px [0.4, 4.8]"
    assert bracket(-2.6, -4.8, -0.04).replace(MINUS, "-") == "-2.60 [-4.80,\N{NO-BREAK SPACE}-0.04]"
    # What no two digits tell from 0 is 0.
    assert bracket(2.6, 1e-9, 5.2) == "3 [0,\N{NO-BREAK SPACE}5]"
    assert bracket(2.6, -0.1, 5.2) == "3 [0,\N{NO-BREAK SPACE}5]"


def test_amounts_keep_the_digits_of_small_shares():
    assert amount(0.0031, "share") == "0.310\N{NO-BREAK SPACE}%"
    assert amount(2.5, "px") == "2.50\N{NO-BREAK SPACE}px"
    assert amount(np.nan, "px") == "–"


def test_spreads_and_the_means_beside_them_have_the_same_digits():
    assert spread(0.00627, "share") == "0.63\N{NO-BREAK SPACE}percentage points"
    assert bracket(0.03, np.nan, np.nan, "share", digits_of(0.00627, "share")) == (
        "3.00\N{NO-BREAK SPACE}%"
    )
    assert spread(12.4, "px") == "12\N{NO-BREAK SPACE}px"
    assert spread(np.nan, "px") == "–"
    assert digits_of(np.nan, "px") == 0


def test_negative_numbers_of_a_text_get_a_real_minus():
    assert with_minus("-1 to 1, x-1, cl-vs-mim") == f"{MINUS}1 to 1, x-1, cl-vs-mim"


@pytest.mark.parametrize(
    ("p", "text"), [(0.0312, "0.031"), (0.0004, "< 0.001"), (1.0, "1.000"), (np.nan, "–")]
)
def test_p_values(p, text):
    assert p_value(p).replace("\N{NO-BREAK SPACE}", " ") == text


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
