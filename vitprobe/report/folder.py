"""The report's folder: written whole beside its place, then moved there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitprobe.errors import ResultError
from vitprobe.loggers import check_loggers
from vitprobe.plots.style import FORMATS, check_formats
from vitprobe.report.drawing import draw
from vitprobe.report.lists import lists_of
from vitprobe.report.logged import send
from vitprobe.report.page import GENERATOR, render

if TYPE_CHECKING:
    from vitprobe.results import Comparison

# The page goes last: while it is the old one, the folder is still known as a report.
_OWN = ("figures", "tables", "results.nc", "report.html")


def report(
    result: Comparison,
    out: str | Path,
    *,
    force: bool = False,
    loggers: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
) -> Path:
    """Write a report of `result` into the new folder `out`, all of it or nothing.

    Args:
        result: a Comparison.
        out: folder to make. It will hold report.html (opens offline, loads nothing from a network),
            figures (figures/*.pdf|svg|png, see `formats`), tables/*.csv and results.nc.
        force: replace an earlier report in `out`. Other files there are left alone; a folder with
            files but no report is refused all the same.
        loggers: also send figures and numbers by layer to these: "tensorboard" (event files in
            out/tensorboard), "wandb".
        formats: of the files of figures: fewer take less time. SVG is written in any case, since
            the page holds it, and PNG for loggers.

    Returns:
        The path of report.html.

    Raises:
        ResultError: `out` exists (without `force`), is something else, or cannot be written; a
            format other than "pdf", "svg" and "png".
        LoggerError: an unknown logger, one that is not installed, or cannot be opened.
    """
    out = Path(out)
    check_loggers(loggers)
    check_formats(formats)
    check_folder(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
        try:
            # mkdtemp makes a folder for its owner alone; a report is an ordinary one.
            part.chmod(0o755)
            _write(result, part, {"svg", *formats, *(["png"] if loggers else [])})
            _move(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error
    send(result, out, loggers)
    return out / "report.html"


def check_folder(out: Path, *, force: bool = False) -> None:
    """Raise ResultError if a report cannot go to `out`: before hours of work, and not after."""
    try:
        _check(out, force)
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}.", suffix=".part"):
            pass
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error


def _check(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise ResultError(f"'{out}' exists; choose another folder, or force replacing its report")
    if not out.is_dir():
        raise ResultError(f"'{out}' is no folder; choose another")
    page = out / "report.html"
    earlier = page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    if any(out.iterdir()) and not earlier:
        raise ResultError(f"'{out}' holds files but no vitprobe report; choose another folder")


def _write(result: Comparison, folder: Path, formats: Collection[str]) -> None:
    lists = lists_of(result)
    pictures = draw(result, folder / "figures", lists, formats=formats)
    tables = folder / "tables"
    tables.mkdir()
    for name in [*result.measures, *(["first_direction_share"] if pictures.shares else [])]:
        result.to_dataframe(name).to_csv(tables / f"{name}.csv", index=False)
    for name, table in lists.tables().items():
        table.to_csv(tables / f"{name}.csv", index=False)
    result.save(folder / "results.nc")
    page = render(result, pictures, lists, [kind for kind in FORMATS if kind in formats])
    (folder / "report.html").write_text(page, encoding="utf-8")


def _move(part: Path, out: Path) -> None:
    if not out.exists():
        os.replace(part, out)
        return
    for name in _OWN:
        old = out / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        os.replace(part / name, old)
    # Event files of the report before would be drawn into the curves of this one.
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
