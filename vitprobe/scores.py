"""What checkpoints are worth for a task: tidy rows, saved as JSON and joined to comparisons.

Every evaluation of `vitprobe.evaluation` ends in `Scores`. A row is one number of one model under
one protocol, with its interval over test images; several runs that differ in the seed alone are
summarised by `over_seeds`, with seeds as the unit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from vitprobe import notebook
from vitprobe.errors import ResultError
from vitprobe.files import replacing
from vitprobe.statistics import t_interval

FORMAT: Final = 1
FILE: Final = "scores.json"
"""Name of the file in the folder of an evaluation."""


@dataclass(frozen=True)
class Score:
    """One number of one model.

    model: its name. spec: the text it was loaded from. sha256: of the checkpoint file, "" if none.
    protocol: "head", "knn", "linear", "finetune", "transfer", "detection", "segmentation".
    dataset: what it was tested on. images: how many of its test images.
    metric: such as "top1" (a share of 1), "box_ap", "miou". value, low, high: with the ends of the
        95 % interval over test images, nan where there is none.
    labels: share of the training labels that was used.
    seed: of the draws of the evaluation.
    layer: whose features were used, 0 … L as everywhere; None for the model's output.
    kept: pre-trained blocks that were kept, the others being drawn anew; None for all of them.
    settings: what else decides the number, such as {"k": 20}, as JSON values.
    """

    model: str
    spec: str
    protocol: str
    dataset: str
    images: int
    metric: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    sha256: str = ""
    labels: float = 1.0
    seed: int = 0
    layer: int | None = None
    kept: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


_UNIT: Final = ("protocol", "dataset", "metric", "labels", "layer", "kept", "settings")
"""What rows must share to be seeds of one number."""


class Scores:
    """Rows of evaluations, and what made them.

    Attributes:
        rows: the scores in the order they were made.
        provenance: versions, command, device and precision of each evaluation that went in.
    """

    def __init__(self, rows: Iterable[Score], provenance: Sequence[Mapping[str, Any]] = ()) -> None:
        self.rows = tuple(rows)
        self.provenance = tuple(dict(one) for one in provenance)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        models = dict.fromkeys(row.model for row in self.rows)
        protocols = dict.fromkeys(row.protocol for row in self.rows)
        return f"Scores({len(self)} of {', '.join(models)} by {', '.join(protocols)})"

    def _repr_html_(self) -> str:
        return notebook.of_scores(self)

    def __add__(self, other: Scores) -> Scores:
        """Both, those of `self` first; a row that both hold is kept once."""
        rows = {json.dumps(asdict(row)): row for row in (*self.rows, *other.rows)}
        known = {json.dumps(one, sort_keys=True): one for one in self.provenance + other.provenance}
        return Scores(rows.values(), tuple(known.values()))

    def to_dataframe(self) -> pd.DataFrame:
        """A row a score; `settings` as JSON text."""
        names = [one.name for one in fields(Score)]
        table = pd.DataFrame([asdict(row) for row in self.rows], columns=names)
        table["settings"] = [json.dumps(row.settings, sort_keys=True) for row in self.rows]
        return table.astype({"layer": "Int64", "kept": "Int64", "value": float})

    def matched(self, models: Mapping[str, str]) -> Scores:
        """The same rows under the names that these models have in a comparison.

        A row belongs to the model of its name, or else to the one of its checkpoint.

        Args:
            models: the SHA-256 of the checkpoint file, "" where there is none, by model.

        Raises:
            ResultError: a row of no model, of several, or of another checkpoint than the model of
                its name has.
        """
        names = {}
        for row in self.rows:
            own = [name for name, sha256 in models.items() if row.sha256 and sha256 == row.sha256]
            known = models.get(row.model)
            if known and row.sha256 and known != row.sha256:
                raise ResultError(
                    f"the scores of '{row.model}' are of another checkpoint (SHA-256 "
                    f"{row.sha256[:12]}…) than the model of that name ({known[:12]}…); evaluate "
                    "that one, or give one of them another name"
                )
            if known is None and len(own) != 1:
                problem = f"the checkpoint of {' and '.join(own)}" if own else "no model compared"
                raise ResultError(
                    f"the scores of '{row.model}' ({row.spec}) belong to {problem}; evaluate it "
                    f"under the name it has, one of {', '.join(models)}"
                )
            names[row.model] = row.model if known is not None else own[0]
        return Scores([replace(row, model=names[row.model]) for row in self.rows], self.provenance)

    def to_dataset(self) -> xr.Dataset:
        """As xarray: a variable a field of `Score` over the dimension `score`, nan where None."""
        table = self.to_dataframe()
        text = ("model", "spec", "protocol", "dataset", "metric", "sha256", "settings")
        columns = {
            str(name): ("score", table[name].to_numpy(dtype=str if name in text else float))
            for name in table
        }
        return xr.Dataset(columns, attrs={"provenance": json.dumps(self.provenance)})

    @classmethod
    def from_dataset(cls, dataset: xr.Dataset) -> Scores:
        """What `to_dataset` made.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        columns = {one.name: dataset[one.name].values for one in fields(Score)}
        read: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("value", "low", "high", "labels"), float),
            **dict.fromkeys(("images", "seed"), int),
            **dict.fromkeys(("layer", "kept"), lambda x: None if np.isnan(x) else int(x)),
            "settings": lambda text: json.loads(str(text)),
        }
        rows = [
            Score(
                **{
                    name: read.get(name, str)(value)
                    for name, value in zip(columns, row, strict=True)
                }
            )
            for row in zip(*columns.values(), strict=True)
        ]
        return cls(rows, json.loads(dataset.attrs["provenance"]))

    def to_text(self) -> str:
        """A line a score: model, protocol, value with its interval, and what it was measured on."""
        lines = []
        for row in self.rows:
            interval = f" [{row.low:.4f}, {row.high:.4f}]" if row.low == row.low else ""
            about = [f"{row.images:,} images of {row.dataset}"]
            about += [f"layer {row.layer}"] if row.layer is not None else []
            about += [f"{row.kept} blocks kept"] if row.kept is not None else []
            about += [f"{row.labels:.3g} of the labels"] if row.labels < 1 else []
            about += [f"{key} {value}" for key, value in row.settings.items()]
            lines.append(
                f"{row.model}: {row.protocol} {row.metric} {row.value:.4f}{interval} "
                f"({', '.join(about)})"
            )
        return "\n".join(lines)

    def over_seeds(self, groups: Mapping[str, Sequence[str]], level: float = 0.95) -> pd.DataFrame:
        """Means over the models of each group, with Student's t interval (seeds - 1 degrees).

        Args:
            groups: names of the models that are seeds of one method, by the method's name; rows of
                one model under several evaluation seeds are averaged first.
            level: of the interval.

        Returns:
            A row for each group, protocol, dataset, metric, share of labels, layer, kept blocks and
            setting that was asked for in several values: `value`, `low`, `high` (nan for one seed),
            `seeds`, and `settings`, JSON of the settings that tell rows apart.
        """
        table = self.to_dataframe()
        table["settings"] = asked_for(table)
        made = []
        for name, members in groups.items():
            own = table[table["model"].isin(members)]
            for key, rows in own.groupby(list(_UNIT), dropna=False, sort=False):
                found = t_interval(rows.groupby("model", sort=False)["value"].mean(), level)
                made.append(
                    {
                        "model": name,
                        **dict(zip(_UNIT, key, strict=True)),
                        "value": float(found.value),
                        "low": float(found.low),
                        "high": float(found.high),
                        "seeds": int(found.number),
                    }
                )
        return pd.DataFrame(made, columns=["model", *_UNIT, "value", "low", "high", "seeds"])

    def save(self, path: str | Path) -> Path:
        """Write JSON that `open_scores` reads, whole or not at all.

        Raises:
            ResultError: the file cannot be written.
        """
        path = Path(path)
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.rows]
        parts = (
            f'"format": {json.dumps(FORMAT)}',
            f'"rows": {_lines(rows)}',
            f'"provenance": {_lines(self.provenance)}',
        )
        text = ",\n".join(parts)
        with replacing(path) as partial:
            partial.write_text(f"{{{text}}}\n", encoding="utf-8")
        return path


def asked_for(table: pd.DataFrame) -> list[str]:
    """Of each row, JSON of those of its settings in which rows of one model and seed differ.

    What varies within one model was asked for, as several k are; what varies between models alone
    was chosen for each, as the penalty of a linear classifier is.

    table: of `Scores.to_dataframe`.
    """
    settings = [json.loads(text) for text in table["settings"]]
    unit = ["model", *(name for name in _UNIT if name != "settings"), "seed"]
    first: dict[str, dict[str, Any]] = {}
    varying: dict[str, dict[str, None]] = {}
    keys = [json.dumps(row, default=str) for row in table[unit].to_numpy().tolist()]
    for key, protocol, own in zip(keys, table["protocol"], settings, strict=True):
        known = first.setdefault(key, own)
        differing = (name for name in own if own[name] != known.get(name))
        varying.setdefault(protocol, {}).update(dict.fromkeys(differing))
    return [
        json.dumps({name: own[name] for name in varying[protocol] if name in own})
        for protocol, own in zip(table["protocol"], settings, strict=True)
    ]


def _lines(items: Iterable[Any]) -> str:
    """A JSON list with a line an item."""
    inner = ",\n".join(json.dumps(item, allow_nan=False) for item in items)
    return f"[\n{inner}\n]"


def open_scores(path: str | Path) -> Scores:
    """Scores from a file that `Scores.save` wrote, or from the folder of an evaluation.

    Raises:
        ResultError: no such file, or it holds something else.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"no scores '{path}'; make them with vitprobe evaluate") from error
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read the scores '{path}': {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ResultError(f"'{path}' holds no scores of format {FORMAT}")
    try:
        return Scores(map(_score, data["rows"]), data["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultError(f"the scores '{path}' are damaged ({error})") from error


def _score(row: Mapping[str, Any]) -> Score:
    numbers = {k: np.nan if row[k] is None else float(row[k]) for k in ("value", "low", "high")}
    return Score(**{**row, **numbers})
