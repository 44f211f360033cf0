"""Comparisons made from chosen arrays, so that figures and sentences have known answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitprobe.measures.registry import MEASURES
from vitprobe.results import (
    Comparison,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)

ALL = ("cka", "attention_distance", "attention_entropy", "sink_mass")


@dataclass
class Subject:
    """A model that was never run: its shape, and what measuring it would have given."""

    depth: int = 12
    heads: int = 3
    grid: tuple[int, int] = (14, 14)
    patch: float = 16.0
    prefix: int = 1
    assumed: tuple[str, ...] = ()
    distance: np.ndarray | None = None  # relative to uniform: (depth, heads) or (n, depth, heads)
    entropy: np.ndarray | None = None
    sink: np.ndarray | None = None
    share: np.ndarray | None = None  # (depth + 1,)
    extra: dict[str, Any] = field(default_factory=dict)

    def uniform_distance(self) -> float:
        rows, columns = np.indices(self.grid).reshape(2, -1) * self.patch
        return float(np.hypot(rows[:, None] - rows, columns[:, None] - columns).mean())

    def uniform_entropy(self) -> float:
        return float(np.log(np.prod(self.grid)))

    def describe(self, name: str) -> dict[str, Any]:
        facts = {
            "width": (192, "tensor shape"),
            "depth": (self.depth, "tensor shape"),
            "heads": (self.heads, "user"),
            "patch_size": ([self.patch, self.patch], "tensor shape"),
            "grid": (list(self.grid), "tensor shape"),
            "prefix_tokens": (self.prefix, "tensor shape"),
            "mlp_ratio": (4.0, "tensor shape"),
            "norm_eps": (1e-6, "timm"),
            "mean": ([0.485, 0.456, 0.406], "config"),
            "std": ([0.229, 0.224, 0.225], "config"),
            "final_norm": ("norm", "tensor shape"),
        }
        known = {
            key: {"value": value, "evidence": "assumed" if key in self.assumed else evidence}
            for key, (value, evidence) in facts.items()
        }
        return {
            "name": name,
            "spec": f"checkpoints/{name}.pth",
            "dialect": "mae",
            "parameters": 5_543_424,
            "facts": known,
            "report": {
                "dialect": "mae",
                "matched": [f"blocks.{i}.norm1.weight" for i in range(self.depth)],
                "missing": [],
                "unexpected": ["head.bias", "head.weight"],
                "ignored": ["mask_token"],
                "branch": None,
                "loaded_fraction": 1.0,
            },
            "sha256": "a3" * 32,
            "assumed": list(self.assumed),
            "grid": list(self.grid),
            "patch_size": [self.patch, self.patch],
            "input_size": [3, *(int(side * self.patch) for side in self.grid)],
            "nonfinite": [],
            "training": None,
            **self.extra,
        }


def comparison(
    subjects: Mapping[str, Subject],
    *,
    images: int = 64,
    measures: tuple[str, ...] = ALL,
    cka: Mapping[tuple[str, str], np.ndarray] | None = None,
    error: float = 0.02,
    notes: tuple[str, ...] = (),
    estimator: str = "unbiased",
    seed: int = 0,
) -> Comparison:
    """A Comparison of `subjects`; what they leave open is filled in from `seed`.

    `cka` gives blocks (layers of a, layers of b) for some pairs; `error` is the standard error of
    every cell that is not on a diagonal, and there is none with the biased estimator.
    """
    rng = np.random.default_rng(seed)
    groups: dict[str, Any] = {}
    if "cka" in measures:
        groups["similarity"], groups["tokens"] = _similarity(
            subjects, cka or {}, error if estimator == "unbiased" else np.nan, rng
        )
    if wanted := [measure for measure in measures if measure != "cka"]:
        groups["attention"] = _attention(subjects, wanted, images, rng)
    provenance = {
        "models": [subject.describe(name) for name, subject in subjects.items()],
        "measures": list(measures),
        "notes": list(notes),
        "versions": {"vitprobe": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        "commit": "3f2a91c",
        "created": "2026-01-05T10:58:03+00:00",
        "seed": 0,
        "device": "cpu",
        "precision": "fp32",
        "layers": "normed",
        "tokens": "patches",
        "block": 128,
        "blocks": 1,
        "batch_size": None,
        "preprocessing": "centre square; bicubic, antialiased; each model's own mean and std",
        "python": "3.11.2",
        "platform": "Linux x86_64",
        "estimator": estimator,
        "images": {
            "source": "photos.zip",
            "count": images,
            "sha256": "9f" * 32,
            "undecodable": [],
        },
        "command": "vitprobe compare A=a.pth B=b.pth --images photos.zip --out out",
    }
    return Comparison.assemble(groups, provenance)


def _similarity(
    subjects: Mapping[str, Subject],
    given: Mapping[tuple[str, str], np.ndarray],
    error: float,
    rng: np.random.Generator,
) -> tuple[Any, Any]:
    features = [(name, i) for name, subject in subjects.items() for i in range(subject.depth + 1)]
    start = rng.normal(size=24)
    walks = [
        start + np.cumsum(rng.normal(size=(subject.depth + 1, 24)) * 0.4, axis=0)
        for subject in subjects.values()
    ]
    points = np.concatenate(walks)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    value = (points @ points.T) ** 2
    names = np.array([name for name, _ in features])
    for (a, b), block in given.items():
        value[np.ix_(names == a, names == b)] = block
        value[np.ix_(names == b, names == a)] = block.T
    standard_error = np.full_like(value, error)
    np.fill_diagonal(standard_error, np.nan)
    shares = [
        np.linspace(0.2, 0.4, subject.depth + 1) if subject.share is None else subject.share
        for subject in subjects.values()
    ]
    share = np.concatenate(shares)
    return (
        similarity_dataset(features, value=value, standard_error=standard_error, sums={}),
        tokens_dataset(
            features,
            first_direction_share=share,
            first_direction_sums=np.stack([share, np.ones_like(share)], axis=-1),
        ),
    )


def _attention(
    subjects: Mapping[str, Subject], measures: list[str], images: int, rng: np.random.Generator
) -> Any:
    units = [
        (name, block, head)
        for name, subject in subjects.items()
        for block in range(subject.depth)
        for head in range(subject.heads)
    ]
    columns: dict[str, list[np.ndarray]] = {measure: [] for measure in measures}
    uniform: dict[str, list[np.ndarray]] = {}
    for subject in subjects.values():
        shape = (images, subject.depth, subject.heads)
        ramp = np.linspace(0.3, 0.95, subject.depth)[:, None]
        chosen = {
            "attention_distance": subject.distance,
            "attention_entropy": subject.entropy,
            "sink_mass": subject.sink,
        }
        scale = {
            "attention_distance": subject.uniform_distance(),
            "attention_entropy": subject.uniform_entropy(),
            "attention_distance_raw": subject.uniform_distance(),
            "attention_entropy_all": float(np.log(np.prod(subject.grid) + subject.prefix)),
        }
        for measure in measures:
            values = chosen.get(measure)
            if values is None:
                spread = rng.normal(size=shape[1:]) * 0.12 + rng.normal(size=shape) * 0.02
                values = np.clip(ramp + spread, 0.02, 1.1)
                if measure == "sink_mass":
                    values = np.clip(values - 0.4, 0, 1) if subject.prefix else values * 0
            values = np.broadcast_to(values, shape) * scale.get(measure, 1.0)
            columns[measure].append(values.reshape(images, -1).astype(np.float32))
            if measure in scale:
                uniform.setdefault(measure, []).append(
                    np.full(subject.depth * subject.heads, scale[measure])
                )
    values = {measure: np.concatenate(parts, axis=1) for measure, parts in columns.items()}
    return attention_dataset(
        units,
        [f"{i:04d}.jpg" for i in range(images)],
        values=values,
        undefined_rows={m: np.isnan(v).astype(np.int32) for m, v in values.items()},
        uniform={measure: np.concatenate(parts) for measure, parts in uniform.items()},
        info={measure: (MEASURES[measure].title, MEASURES[measure].unit) for measure in measures},
    )
