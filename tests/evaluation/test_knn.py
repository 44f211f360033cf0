"""Weighted k-NN against a plain reading of its definition, scikit-learn's, and known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from vitprobe.errors import DataError, MeasureError
from vitprobe.evaluation import knn, knn_accuracy


def clusters(n: int, m: int, classes: int = 3, p: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Overlapping classes: train features and labels, test features and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, p, generator=generator)
    parts = []
    for count in (n, m):
        labels = torch.randint(classes, (count,), generator=generator)
        parts += [centres[labels] + torch.randn(count, p, generator=generator), labels]
    return parts


def plain(
    train: np.ndarray, known: np.ndarray, test: np.ndarray, truth: np.ndarray,
    k: int, temperature: float,
) -> float:  # fmt: skip
    """The definition, one test image at a time in float64."""
    hits = 0
    for x, y in zip(test, truth, strict=True):
        similarity = [x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train]
        votes = np.zeros(known.max() + 1)
        for i in np.argsort(similarity)[::-1][:k]:
            votes[known[i]] += np.exp(similarity[i] / temperature)
        hits += votes.argmax() == y
    return hits / len(test)


@given(
    k=st.integers(1, 30),
    temperature=st.sampled_from([0.02, 0.07, 0.5]),
    seed=st.integers(0, 20),
)
def test_is_the_definition(k: int, temperature: float, seed: int) -> None:
    parts = clusters(30, 12, seed=seed)
    arrays = [part.double().numpy() if part.is_floating_point() else part.numpy() for part in parts]
    expected = plain(*arrays, k=k, temperature=temperature)
    assert knn_accuracy(*parts, k=k, temperature=temperature) == pytest.approx(expected)


def test_a_high_temperature_is_a_majority_vote() -> None:
    train, known, test, truth = clusters(200, 100, classes=2)
    # An odd number of votes for two classes: no ties.
    majority = KNeighborsClassifier(n_neighbors=15, metric="cosine").fit(train, known)
    expected = majority.score(test, truth)
    assert 0.5 < expected < 1
    assert knn_accuracy(train, known, test, truth, k=15, temperature=1e4) == expected


def test_a_low_temperature_listens_to_the_nearest_alone() -> None:
    parts = clusters(200, 100)
    assert knn_accuracy(*parts, k=50, temperature=1e-4) == knn_accuracy(*parts, k=1)


def test_training_images_find_themselves() -> None:
    train, known, _, _ = clusters(50, 1)
    assert knn_accuracy(train, known, train, known, k=1) == 1


def test_length_of_features_and_order_of_images_do_not_matter() -> None:
    train, known, test, truth = clusters(80, 60)
    expected = knn_accuracy(train, known, test, truth)
    lengths = torch.rand(80, 1) * 10 + 0.1
    order = torch.randperm(80)
    assert knn_accuracy((train * lengths)[order], known[order], test * 3, truth) == expected


def test_is_the_same_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = clusters(80, 61)
    expected = knn_accuracy(*parts)
    for most in (1, 80 * 7, 80 * 61):
        monkeypatch.setattr(knn, "_MOST_SIMILARITIES", most)
        assert knn_accuracy(*parts) == expected


def test_half_precision_and_autocast_change_nothing_but_the_input() -> None:
    train, known, test, truth = clusters(80, 60)
    train, test = train.bfloat16(), test.bfloat16()
    expected = knn_accuracy(train.float(), known, test.float(), truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert knn_accuracy(train, known, test, truth) == expected


def test_classes_unseen_in_training_are_only_ever_missed() -> None:
    train, known, test, truth = clusters(80, 60)
    assert knn_accuracy(train, known, test, torch.full_like(truth, 7)) == 0


def case(**changes: Any) -> dict[str, Any]:
    names = ("train", "train_labels", "test", "test_labels")
    return {**dict(zip(names, clusters(8, 5), strict=True)), "k": 3, **changes}


def spoilt(value: float) -> torch.Tensor:
    features = torch.ones(5, 6)
    features[3] = value
    return features


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"k": 9}, MeasureError, "within 1 and the 8 training images, not be 9"),
        ({"k": 0}, MeasureError, "not be 0"),
        ({"temperature": 0}, MeasureError, "temperature must be above 0, not 0"),
        ({"temperature": float("nan")}, MeasureError, "above 0, not nan"),
        ({"test": spoilt(float("nan"))}, MeasureError, "test image 3 are not finite"),
        ({"test": spoilt(float("inf"))}, MeasureError, "test image 3 are not finite"),
        ({"test": spoilt(0)}, MeasureError, "test image 3 are all zero"),
        ({"test": torch.ones(5, 4)}, MeasureError, "6 dimensions and test features 4"),
        ({"train": torch.ones(8, 2, 3)}, MeasureError, r"not \(8, 2, 3\)"),
        ({"test": torch.ones(0, 6)}, MeasureError, r"not \(0, 6\)"),
        ({"train_labels": torch.zeros(7, dtype=torch.int64)}, DataError, r"shape \(8,\)"),
        ({"test_labels": torch.zeros(5)}, DataError, "integers, not torch.float32"),
        ({"test_labels": torch.tensor([0, 1, -1, 0, 0])}, DataError, "image 2 must be at least 0"),
        ({"classes": 2}, DataError, "within 0 and 1, not 2"),
    ],
)
def test_what_cannot_be_classified_is_refused(
    change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        knn_accuracy(**case(**change))
