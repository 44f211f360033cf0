"""Names, numbers and settings in words."""

from __future__ import annotations

from vitprobe.wording import dotted


def test_settings_have_dotted_names_and_those_that_are_off_are_left_out():
    settings = {"epochs": 0, "views": [], "data": "", "optimizer": {"lr": 0.1, "clip": None}}
    assert dotted(settings) == [("epochs", 0), ("optimizer.lr", 0.1)]
    assert dotted({"a": {"b": {"c": 1}}}, "of.") == [("of.a.b.c", 1)]
