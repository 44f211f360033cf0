"""A report sent to where runs are watched: figures as pictures, numbers by layer as curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprobe.loggers import open_loggers

if TYPE_CHECKING:
    from vitprobe.results import Comparison


def send(result: Comparison, folder: Path, loggers: Sequence[str]) -> None:
    """Send a report that is written in `folder` to the loggers of these names.

    Steps are layers: the curve `attention_distance/MAE` is that of the report, and
    `cka/MAE and DeiT` is of layers at the same depth. Means are `means/…`; pictures carry the names
    of the figures' files. What a service refuses is warned of and leaves the report as it is.

    Raises:
        LoggerError: a logger that is unknown, not installed or cannot be opened.
    """
    if not loggers:
        return
    told = result.summary()
    config = {key: told[key] for key in ("vitprobe", "images", "models", "measures", "notes")}
    by_layer: dict[int, dict[str, float]] = defaultdict(dict)
    for name, layer, value in _numbers(told):
        if value is not None:
            by_layer[layer][name] = value
    opened = open_loggers(loggers, folder, run_name=folder.name, config=config, step_name="layer")
    for logger in opened:
        for layer, numbers in sorted(by_layer.items()):
            logger.write(numbers, layer)
        for picture in sorted((folder / "figures").glob("*.png")):
            logger.picture(picture, 0, f"figures/{picture.stem}")
        logger.close()


def _numbers(told: dict[str, Any]) -> list[tuple[str, int, float | None]]:
    """(name, layer, value) of everything that has a value by layer, and of means."""
    found: list[tuple[str, int, float | None]] = []
    for pair in told["similarity"]:
        name = f"{pair['measure']}/{pair['model_a']} and {pair['model_b']}"
        found += [(name, layer["layer_a"], layer["value"]) for layer in pair["layers"]]
        found.append((f"means/{name}", 0, pair["mean"]))
    for row in told["by_layer"]:
        name = f"{row['measure']}/{row['model']}"
        found += [(name, *at) for at in zip(row["layers"], row["value"], strict=True)]
    return found
