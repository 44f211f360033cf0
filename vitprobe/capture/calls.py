"""Every layer that was asked for speaks once in a run, or the run fails."""

from __future__ import annotations

from collections.abc import Mapping

from vitprobe.errors import CaptureError
from vitprobe.models import Model


def check_calls(model: Model, what: str, calls: Mapping[int, int], remedy: str) -> None:
    """Raise CaptureError where a layer of `calls` was silent, or spoke more than once."""
    silent = [layer for layer, count in calls.items() if count == 0]
    repeated = [layer for layer, count in calls.items() if count > 1]
    if silent:
        raise CaptureError(
            f"model '{model.name}' gave no {what} in layers {_listed(silent)}; {remedy}"
        )
    if repeated:
        raise CaptureError(
            f"model '{model.name}' gave {what} more than once in layers {_listed(repeated)}, so "
            "which one is meant is not known"
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (" …" if len(numbers) > 6 else "")
