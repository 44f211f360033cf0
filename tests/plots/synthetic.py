"""Comparisons made from chosen arrays, so that figures and sentences have known answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from vitprobe.datasets import (
    FourierArrays,
    LayerArrays,
    SimilarityArrays,
    attention_dataset,
    similarity_dataset,
    tokens_dataset,
)
from vitprobe.measures.registry import MEASURES, PER_BLOCK, SYMMETRIC
from vitprobe.results import Comparison

ALL = ("cka", "attention_distance", "attention_entropy", "sink_mass")
TOKENS = ("token_cosine", "effective_rank", "fourier_amplitude", "norm_outliers", "rankme")
EVERY = tuple(name for name in MEASURES if name != "first_direction_share")


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
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)  # (n, depth + 1) by measure
    kinds: tuple[str, ...] = ()  # of its attention layers; global where none are given
    no_attention: str = ""  # why it has none
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
            **self._attention(),
            **self.extra,
        }

    def _attention(self) -> dict[str, Any]:
        """What a result records of attention layers, where they are not one global one a block."""
        if self.no_attention:
            measures = [name for name, info in MEASURES.items() if info.group == "attention"]
            refused = [{"measures": measures, "layers": [], "reason": self.no_attention}]
            return {"attention": [], "no_attention": self.no_attention, "refused": refused}
        if not self.kinds:
            return {}
        reasons = {
            "channels": "it attends over channels",
            "class token": "its only query is the class token",
        }
        refused = [
            {
                "measures": ["attention_distance", "sink_mass"],
                "layers": [i for i, other in enumerate(self.kinds) if other == kind],
                "reason": reasons[kind],
            }
            for kind in dict.fromkeys(self.kinds)
            if kind in reasons
        ]
        layers = [
            {"path": f"a.{i}", "block": None, "kind": kind, "heads": self.heads, "key_prefix": 0}
            for i, kind in enumerate(self.kinds)
        ]
        return {"attention": layers, "no_attention": "", "refused": refused}


def comparison(
    subjects: Mapping[str, Subject],
    *,
    images: int = 64,
    measures: tuple[str, ...] = ALL,
    cka: Mapping[tuple[str, str], np.ndarray] | None = None,
    error: float = 0.02,
    floor: float | np.ndarray = 0.05,
    notes: tuple[str, ...] = (),
    estimator: str = "unbiased",
    groups: Mapping[str, Sequence[str]] | None = None,
    references: Mapping[str, str] | None = None,
    samples: int = 0,
    seed: int = 0,
) -> Comparison:
    """A Comparison of `subjects`; what they leave open is filled in from `seed`.

    `cka` gives blocks (layers of a, layers of b) for some pairs; `error` is the standard error of
    every cell that is not on a diagonal, and there is none with the biased estimator. `floor` is
    that of every cell, one number or (features, features). `samples` is how many images are kept
    with the attention maps of all models.
    """
    rng = np.random.default_rng(seed)
    by_group = {
        group: [m for m in measures if MEASURES[m].group == group]
        for group in ("similarity", "attention", "tokens")
    }
    datasets: dict[str, Any] = {}
    if by_group["similarity"]:
        errors = error if estimator == "unbiased" else np.nan
        datasets["similarity"] = _similarity(
            subjects, by_group["similarity"], cka or {}, errors, floor, images, rng
        )
    if by_group["tokens"] or "cka" in measures:
        datasets["tokens"] = _tokens(
            subjects, by_group["tokens"], images, rng, shares="cka" in measures
        )
    if by_group["attention"]:
        datasets["attention"] = _attention(subjects, by_group["attention"], images, rng)
    if samples:
        datasets |= _samples(subjects, samples, rng)
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
        "cka_value": "blocked",
        "max_images": 256,
        "images": {
            "source": "photos.zip",
            "count": images,
            "sha256": "9f" * 32,
            "undecodable": [],
        },
        "command": "vitprobe compare A=a.pth B=b.pth --images photos.zip --out out",
        **({"groups": {name: list(names) for name, names in groups.items()}} if groups else {}),
        **({"references": dict(references)} if references else {}),
    }
    return Comparison.assemble(datasets, provenance)


def _samples(
    subjects: Mapping[str, Subject], samples: int, rng: np.random.Generator
) -> dict[str, xr.Dataset]:
    """Photographs of smooth colours, and maps in which head h looks h + 1 patches ahead."""
    waves = np.sin(np.linspace(0, 5, 96)[:, None, None] + rng.normal(size=(samples, 1, 1, 3)) * 2)
    shades = (waves + np.cos(np.linspace(0, 4, 96))[:, None] + 2) / 4
    photos = np.rint(255 * shades).astype(np.uint8)
    names = [f"{i:04d}.jpg" for i in range(samples)]
    dims = ("sample", "row", "column", "channel")
    found = {
        "samples": xr.Dataset({"thumbnail": (dims, photos)}, coords={"name": ("sample", names)})
    }
    for index, subject in enumerate(subjects.values()):
        if subject.no_attention:
            continue
        patches = subject.grid[0] * subject.grid[1]
        tokens = subject.prefix + patches
        rows = np.full((subject.heads, tokens, tokens), 0.2 / tokens)
        for head in range(subject.heads):
            queries = subject.prefix + np.arange(patches)
            keys = subject.prefix + (np.arange(patches) + head + 1) % patches
            rows[head, queries, keys] += 0.8
            rows[head, : subject.prefix, subject.prefix] += 0.8
        units = [(layer, head) for layer in range(subject.depth) for head in range(subject.heads)]
        maps = np.broadcast_to(
            np.concatenate([rows] * subject.depth), (samples, len(units), tokens, tokens)
        )
        found[f"samples/{index}"] = xr.Dataset(
            {"attention": (("sample", "unit", "query", "key"), maps.astype(np.float16))},
            coords={
                "layer": ("unit", [layer for layer, _ in units]),
                "head": ("unit", [head for _, head in units]),
                "query": ("query", np.arange(tokens)),
            },
            attrs={"prefix_tokens": subject.prefix},
        )
    return found


def _features(subjects: Mapping[str, Subject]) -> list[tuple[str, int]]:
    return [(name, i) for name, subject in subjects.items() for i in range(subject.depth + 1)]


def _similarity(
    subjects: Mapping[str, Subject],
    measures: list[str],
    given: Mapping[tuple[str, str], np.ndarray],
    error: float,
    floor: float | np.ndarray,
    images: int,
    rng: np.random.Generator,
) -> Any:
    features = _features(subjects)
    start = rng.normal(size=24)
    walks = [
        start + np.cumsum(rng.normal(size=(subject.depth + 1, 24)) * 0.4, axis=0)
        for subject in subjects.values()
    ]
    points = np.concatenate(walks)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    alike = (points @ points.T) ** 2
    names = np.array([name for name, _ in features])
    arrays = {}
    for index, measure in enumerate(measures):
        value = alike ** (1 + index / 4)
        if not SYMMETRIC[measure]:
            value = value * np.linspace(0.7, 1, len(value))
        np.fill_diagonal(value, 1)
        if measure == "cka":
            for (a, b), block in given.items():
                value[np.ix_(names == a, names == b)] = block
                value[np.ix_(names == b, names == a)] = block.T
        errors = np.full_like(value, error)
        np.fill_diagonal(errors, np.nan)
        arrays[measure] = SimilarityArrays(
            value=value,
            standard_error=errors,
            floor=np.broadcast_to(floor, value.shape).astype(float),
            degrees=math.inf if measure.startswith("cka") else 9,
            images=images if measure.startswith("cka") else min(images, 256),
        )
    return similarity_dataset(features, measures=arrays)


def _tokens(
    subjects: Mapping[str, Subject],
    measures: list[str],
    images: int,
    rng: np.random.Generator,
    *,
    shares: bool,
) -> Any:
    features = _features(subjects)
    per_image: dict[str, np.ndarray] = {}
    for measure in (name for name in measures if name != "rankme"):
        columns = []
        for subject in subjects.values():
            values = subject.tokens.get(measure)
            if values is None:
                low, high = {
                    "effective_rank": (12, 90),
                    "norm_outliers": (0.0, 0.08),
                    "fourier_amplitude": (-0.8, -4.0),
                }.get(measure, (0.1, 0.9))
                slope = np.linspace(low, high, subject.depth + 1)
                own = rng.normal() * 0.06 + rng.normal(size=(images, subject.depth + 1)) * 0.12
                values = slope + own * (high - low)
                if measure == "norm_outliers":
                    values = np.clip(values, 0, 1)
            columns.append(np.broadcast_to(values, (images, subject.depth + 1)))
        per_image[measure] = np.concatenate(columns, axis=1).astype(np.float32)
    per_layer = {}
    sums = None
    if shares:
        share = np.concatenate(
            [
                np.linspace(0.2, 0.4, subject.depth + 1) if subject.share is None else subject.share
                for subject in subjects.values()
            ]
        )
        per_layer["first_direction_share"] = LayerArrays(share)
        sums = np.stack([share, np.ones_like(share)], axis=-1)
    if "rankme" in measures:
        rank = 40 + 8 * rng.normal(size=len(features)).cumsum() / np.sqrt(len(features))
        per_layer["rankme"] = LayerArrays(rank, np.full(len(features), 1.5), 9)
    fourier = None
    if "fourier_amplitude" in measures:
        fourier = _fourier(subjects, per_image["fourier_amplitude"].mean(0))
    return tokens_dataset(
        features,
        [f"{i:04d}.jpg" for i in range(images)],
        per_image=per_image,
        per_layer=per_layer,
        first_direction_sums=sums,
        fourier=fourier,
    )


def _fourier(subjects: Mapping[str, Subject], ends: np.ndarray) -> FourierArrays:
    """Straight lines from 0 at frequency 0 to `ends` at the highest frequency of each grid."""
    steps = [min(s.grid) // 2 + 1 for s in subjects.values() for _ in range(s.depth + 1)]
    shape = (len(steps), max(steps))
    frequency, curve, error = (np.full(shape, np.nan) for _ in range(3))
    for row, (count, end) in enumerate(zip(steps, ends, strict=True)):
        frequency[row, :count] = np.linspace(0, 1, count)
        curve[row, :count] = frequency[row, :count] * end
        error[row, 1:count] = 0.03
    return FourierArrays(frequency, curve, error)


def _attention(
    subjects: Mapping[str, Subject], measures: list[str], images: int, rng: np.random.Generator
) -> Any:
    subjects = {name: subject for name, subject in subjects.items() if not subject.no_attention}
    blocks = [(name, block) for name, subject in subjects.items() for block in range(subject.depth)]
    units = [(name, block, h) for name, block in blocks for h in range(subjects[name].heads)]
    columns: dict[str, list[np.ndarray]] = {measure: [] for measure in measures}
    uniform: dict[str, list[np.ndarray]] = {}
    for subject in subjects.values():
        ramp = np.linspace(0.3, 0.95, subject.depth)[:, None]
        chosen = {
            "attention_distance": subject.distance,
            "attention_entropy": subject.entropy,
            "sink_mass": subject.sink,
        }
        distance, entropy = subject.uniform_distance(), subject.uniform_entropy()
        scale = {
            "attention_distance": distance,
            "attention_distance_raw": distance,
            "attention_distance_q10": distance,
            "attention_distance_q50": distance,
            "attention_distance_q90": distance,
            "attention_entropy": entropy,
            "attention_entropy_raw": entropy,
            "attention_entropy_all": float(np.log(np.prod(subject.grid) + subject.prefix)),
            "class_attention_entropy": entropy,
            "rollout_distance": distance,
            "rollout_distance_max": distance,
        }
        own = rng.normal() * 0.05
        for measure in measures:
            shape = (images, subject.depth, 1 if measure in PER_BLOCK else subject.heads)
            values = chosen.get(measure)
            if values is None:
                spread = rng.normal(size=shape[1:]) * 0.12 + rng.normal(size=shape) * 0.02
                values = np.clip(ramp + own + spread, 0.02, 1.1)
                if measure == "sink_mass":
                    values = np.clip(values - 0.4, 0, 1) if subject.prefix else values * 0
            if subject.kinds and measure in ("attention_distance", "sink_mass"):
                nowhere = np.isin(subject.kinds, ("channels", "class token"))
                values = np.where(nowhere[:, None], np.nan, values)
            values = np.broadcast_to(values, shape) * scale.get(measure, 1.0)
            columns[measure].append(values.reshape(images, -1).astype(np.float32))
            if measure in scale:
                uniform.setdefault(measure, []).append(np.full(shape[1] * shape[2], scale[measure]))
    values = {measure: np.concatenate(parts, axis=1) for measure, parts in columns.items()}
    return attention_dataset(
        units,
        [f"{i:04d}.jpg" for i in range(images)],
        values=values,
        undefined_rows={m: np.isnan(v).astype(np.int32) for m, v in values.items()},
        uniform={measure: np.concatenate(parts) for measure, parts in uniform.items()},
        blocks=blocks,
    )
