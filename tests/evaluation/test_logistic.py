"""Logistic regression against scikit-learn's, and against what its optimum has to satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitprobe.evaluation import logistic
from vitprobe.evaluation.logistic import Classifier, Regression


def features_like(n: int, p: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes in features whose variances span four orders of magnitude, off centre."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, p, generator=generator)
    mixed = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
    noise = torch.randn(n, p, generator=generator) * torch.logspace(1, -3, p)
    return (centres[labels] + 4 * noise @ mixed) * torch.logspace(-1, 1, p) + 5, labels


def solved(features: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> Classifier:
    return next(Regression(features, labels, classes).path([l2]))[1]


@pytest.mark.parametrize(("n", "l2"), [(600, 1e-3), (600, 1e-1), (40, 1e-2)])
def test_is_scikit_learns(n: int, l2: float) -> None:
    features, labels = features_like(n, 60, 5)
    test, _ = features_like(3000, 60, 5, seed=1)
    ours = solved(features, labels, 5, l2).logits(test).softmax(dim=1).double().numpy()
    scaler = StandardScaler().fit(features.double().numpy())
    theirs = LogisticRegression(C=1 / (n * l2), tol=1e-8, max_iter=5000)
    theirs.fit(scaler.transform(features.double().numpy()), labels.numpy())
    expected = theirs.predict_proba(scaler.transform(test.double().numpy()))
    assert np.abs(ours - expected).max() < 0.01
    assert (ours.argmax(1) == expected.argmax(1)).mean() >= 0.998


def test_every_point_of_a_path_is_its_own_optimum() -> None:
    features, labels = features_like(200, 20, 3)
    path = dict(Regression(features, labels, 3).path([1e-3, 1.0, 1e-2]))
    assert list(path) == [1.0, 1e-2, 1e-3]
    norms = [float(classifier.weight.norm()) for classifier in path.values()]
    assert norms == sorted(norms)
    for l2, classifier in path.items():
        alone = solved(features, labels, 3, l2).weight
        assert torch.allclose(classifier.weight, alone, atol=0.02 * float(alone.norm()))


def test_scale_and_place_of_features_do_not_matter() -> None:
    features, labels = features_like(200, 20, 3)
    expected = solved(features, labels, 3, 1e-2).logits(features)
    moved = solved(features * 100 - 30, labels, 3, 1e-2).logits(features * 100 - 30)
    assert torch.allclose(moved, expected, atol=0.02)


def test_a_constant_feature_changes_nothing() -> None:
    features, labels = features_like(200, 20, 3)
    more = torch.cat([features, torch.full((200, 1), 0.1)], dim=1)
    expected = solved(features, labels, 3, 1e-2).logits(features)
    assert torch.allclose(solved(more, labels, 3, 1e-2).logits(more), expected, atol=1e-2)


def test_without_any_information_the_classifier_says_how_common_classes_are() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    said = solved(torch.ones(40, 3), labels, 2, 1e-3).logits(torch.ones(1, 3)).softmax(dim=1)
    assert torch.allclose(said, torch.tensor([[0.75, 0.25]]), atol=1e-3)


def test_is_the_same_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = features_like(101, 10, 3)
    expected = solved(features, labels, 3, 1e-2).logits(features)
    monkeypatch.setattr(logistic, "_MOST_LOGITS", 30)
    assert torch.allclose(solved(features, labels, 3, 1e-2).logits(features), expected, atol=1e-2)


def test_one_that_stops_short_of_its_optimum_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = features_like(100, 10, 3)
    monkeypatch.setattr(logistic, "_STEPS", 2)
    with pytest.warns(UserWarning, match=r"l2 1e-06\) is not at its optimum after 2 steps"):
        solved(features, labels, 3, 1e-6)
