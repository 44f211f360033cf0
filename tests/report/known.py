"""Results whose findings are known, and findings without special characters."""

from __future__ import annotations

import numpy as np
from plots.synthetic import Subject, comparison

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def plain(text: str) -> str:
    return text.replace(NBSP, " ").replace(MINUS, "-")


def constant(value: float, depth: int = 4, heads: int = 2, images: int = 64, noise: float = 0.0):
    """(images, depth, heads) around one value; every image has its own offset."""
    offsets = np.random.default_rng(int(value * 1000)).normal(size=(images, 1, 1)) * noise
    return np.broadcast_to(value + offsets, (images, depth, heads))


def trained_and_twin():
    own = constant(0.3, 2, noise=0.02)
    subjects = {
        "A": Subject(2, 2, distance=own, entropy=own, sink=own),
        "A (untrained)": Subject(2, 2, distance=own + 0.2, entropy=own, sink=own - 0.1),
    }
    block = np.full((3, 3), 0.4)
    return comparison(
        subjects, cka={("A", "A (untrained)"): block}, references={"A": "A (untrained)"}
    )


def seeds(shift: float):
    """Two methods of three seeds: a mean difference of `shift`, and a spread of 0.01."""
    offsets = np.array([-0.01, 0.0, 0.01])
    subjects, groups = {}, {}
    for method, start in (("A", 0.3), ("B", 0.3 + shift)):
        groups[method] = [f"{method} {i}" for i in range(3)]
        for name, offset in zip(groups[method], offsets, strict=True):
            subjects[name] = Subject(2, 2, entropy=constant(0.3, 2) * 0 + start + offset)
    return comparison(subjects, measures=("cka", "attention_entropy"), groups=groups)
