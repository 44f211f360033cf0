"""The training runs below a folder, side by side: their logs as one tidy table."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vitprobe.errors import ResultError, suggest

COLUMNS = ("run", "method", "epoch", "step", "metric", "value")
_RECIPE, _LOG, _STATE = "recipe.toml", "log.jsonl", "state.pt"
# What is worth a look in every run; terms of a loss and the learning rate are there for the asking.
_USUAL = ("loss", "test_accuracy", "knn_accuracy", "images_per_s")


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Every number that the runs of `vitprobe pretrain` below `folder` logged, a row each.

    Columns: run (its folder, relative to `folder`), method ("mae", or "mae, distilled" where it
    learned from a teacher), epoch, step, metric (as the log has it) and value. Lines of a log that
    cannot be read, as the last may be while it is written, are left out with a warning, and so are
    runs that have logged no epoch.

    Raises ResultError where there is no such folder, no run in it, none that has logged anything,
    or a recipe that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultError(f"there is no folder '{folder}'")
    found = sorted(path.parent for path in folder.rglob(_RECIPE))
    homes = [home for home in found if (home / _LOG).is_file()]
    if not homes:
        raise ResultError(
            f"'{folder}' holds no run of vitprobe pretrain: no folder in it has {_RECIPE} and "
            f"{_LOG}"
        )
    silent = [f"'{home}'" for home in found if home not in homes and (home / _STATE).is_file()]
    if silent:
        names = ", ".join(silent)
        warnings.warn(f"left out, as no epoch of theirs has been logged: {names}", stacklevel=2)
    rows = []
    for home in homes:
        name = home.relative_to(folder).as_posix() if home != folder else home.resolve().name
        method = _method(home / _RECIPE)
        for line in _lines(home / _LOG):
            epoch, step = line.pop("epoch"), line.pop("step")
            rows += [
                (name, method, float(epoch), int(step), metric, float(value))
                for metric, value in line.items()
                if _is_number(value)
            ]
    if not rows:
        raise ResultError(f"the runs in '{folder}' have logged nothing yet; look again later")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def select(runs: pd.DataFrame, metrics: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of `read_runs` with these metrics, in this order; by default those of most interest:
    loss, test and k-NN accuracy and images per second.

    Raises ResultError for a metric that no run has logged.
    """
    logged = list(runs["metric"].unique())
    for metric in metrics:
        if metric not in logged:
            raise ResultError(
                f"no run has logged '{metric}'; there are {', '.join(logged)}."
                f"{suggest(metric, logged)}"
            )
    wanted = list(metrics) or [metric for metric in _USUAL if metric in logged]
    return pd.concat([runs[runs["metric"] == metric] for metric in dict.fromkeys(wanted)])


def final_values(runs: pd.DataFrame) -> str:
    """The last value of every metric of every run as a table of plain text, a line a run.

    Columns: run, method, the last epoch logged, and the metrics in the order of `runs`.
    """
    metrics = list(runs["metric"].unique())
    table = [["run", "method", "epoch", *metrics]]
    for name, run in runs.groupby("run", sort=True):
        last = run.sort_values("step").groupby("metric")["value"].last()
        values = [_text(last[metric]) if metric in last else "–" for metric in metrics]
        table.append([str(name), run["method"].iloc[0], f"{run['epoch'].max():g}", *values])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _method(recipe: Path) -> str:
    try:
        tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
        name = str(tables["method"]["name"])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ResultError(
            f"'{recipe}' is no recipe of a run ({type(error).__name__}); remove that folder or put "
            "the recipe back"
        ) from error
    return f"{name}, distilled" if "distill" in tables else name


def _lines(log: Path) -> list[dict[str, Any]]:
    texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line for text in texts if (line := _line(text)) is not None]
    if damaged := len(texts) - len(lines):
        which = "a line" if damaged == 1 else f"{damaged} lines"
        warnings.warn(f"{which} of '{log}' cannot be read, left out", stacklevel=3)
    return lines


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and all(_is_number(line.get(key)) for key in ("epoch", "step"))
    return line if whole else None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Python reads numbers from JSON that no float can hold.
    return abs(value) < 1e300
