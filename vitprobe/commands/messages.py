"""What the command line says on stderr: one line at a time."""

from __future__ import annotations

import os
import sys

LEADS = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun starts, one speaks for all."""


def complain(text: str) -> None:
    who = "vitprobe" if LEADS else f"vitprobe, process {os.environ['RANK']}"
    print(f"{who}: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    return " ".join(text.split())
