"""Parts of Markdown files that are written by code, between comments that name them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from vitprobe.errors import ResultError
from vitprobe.files import replacing


def fill(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises ResultError where the file has no such part.
    """
    whole = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = whole.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ResultError(f"'{path}' has no part between {begin} and {end}")
    with replacing(path) as partial:
        partial.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wrapped(text: str) -> str:
    """Broken into lines as the other Markdown of the project."""
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)
