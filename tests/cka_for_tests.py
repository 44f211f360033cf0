"""Layers with something in common, and their CKA by the streaming classes."""

from __future__ import annotations

import numpy as np
import torch

from vitprobe.measures.cka import CKA, CKARBF
from vitprobe.measures.exact_cka import ExactCKA


def features(n=40, p=17, q=23, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x[:, :5] @ rng.normal(size=(5, q)) + rng.normal(size=(n, q))


def layers(n=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 9, generator=generator, dtype=torch.float64)
    widths = (6, 11, 4)
    return [
        base @ torch.randn(9, w, generator=generator, dtype=torch.float64)
        + torch.randn(n, w, generator=generator, dtype=torch.float64)
        for w in widths
    ]


def streamed(parts, estimator="unbiased", first=0):
    measure = CKA(len(parts[0]), estimator)
    for part in parts:
        measure.update(part, first + measure.images)
    return measure


def blocks(xs, sizes):
    return [list(part) for part in zip(*(x.split(sizes) for x in xs), strict=True)]


def in_one_block(kind, xs, **options):
    """CKA of features by each of the streaming classes: (layers, layers)."""
    if kind == "exact":
        whole = ExactCKA([x.flatten(1).shape[1] for x in xs], **options)
        whole.update([x.flatten(1) for x in xs])
        return whole.compute()
    measure = (CKARBF if kind == "rbf" else CKA)(len(xs), **options)
    measure.update(xs)
    return measure.compute().value
