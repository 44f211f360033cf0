"""Multinomial logistic regression on features in memory, to its optimum.

The loss is mean cross-entropy + l2 / 2 ||W||^2 on standardised features, the intercept free; it is
convex, so that its minimum is what any optimiser with any good learning rate ends in, and the
strength of the penalty is all that is left to choose. scikit-learn's LogisticRegression minimises
the same with C = 1 / (n l2).

L-BFGS (Liu and Nocedal, Mathematical Programming 1989) runs in the basis of the features' principal
directions, each scaled by the curvature to be expected there: features of a network differ by
orders of magnitude in variance, for which it would otherwise take hundreds of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from vitprobe.devices import exact_products

# Logits held at once: 256 MiB of float32.
_MOST_LOGITS: Final = 2**26
# Relative decrease of the loss at which to stop: float32 sums leave no room for less.
_TOLERANCE: Final = 1e-7
_STEPS: Final = 500


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of raw features.

    mean, scale: (p,) by which features are standardised.
    weight, bias: (p, classes) and (classes,), of standardised features.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(n, p) → (n, classes)."""
        with exact_products(), torch.autocast(features.device.type, enabled=False):
            return ((features - self.mean) / self.scale) @ self.weight + self.bias


class Regression:
    """The problem for some features and labels, to be solved for one strength after the other.

    Args:
        features: (n, p) float32.
        labels: (n,) int64 on the same device.
        classes: how many there are; one that no label has is given what the penalty leaves it.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        self._labels = labels
        self._classes = classes
        self._mean = features.mean(dim=0)
        spread = features.std(dim=0, correction=0)
        # What is constant up to rounding tells nothing; dividing by its spread would be noise.
        constant = spread <= 1e-6 * features.abs().amax(dim=0).clamp(min=1e-30)
        self._scale = torch.where(constant, torch.ones_like(spread), spread)
        self._features = (features - self._mean) / self._scale
        self._features[:, constant] = 0
        with exact_products():
            gram = self._features.T @ self._features
        # Not every device has float64.
        gram = gram.cpu().double() if gram.device.type == "mps" else gram.double()
        values, vectors = torch.linalg.eigh(gram / len(features))
        self._variances = values.clamp(min=0)
        self._directions = vectors

    def path(self, strengths: Sequence[float]) -> Iterator[tuple[float, Classifier]]:
        """The classifier for each strength, from the largest down, each begun at the last one's."""
        weight = torch.zeros(self._features.shape[1], self._classes, device=self._features.device)
        bias = torch.zeros(self._classes, device=self._features.device)
        for l2 in sorted(strengths, reverse=True):
            weight, bias = self._solve(l2, weight, bias)
            yield l2, Classifier(self._mean, self._scale, weight, bias)

    def _solve(self, l2: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        p, classes = weight.shape
        device = weight.device
        # Curvature of the cross-entropy where all classes are equally probable.
        curvature = (1 - 1 / classes) / classes if classes > 1 else 1.0
        scales = (curvature * self._variances + l2).sqrt()
        basis = (self._directions / scales).float().to(device)

        def unpacked(x: np.ndarray) -> tuple[Tensor, Tensor]:
            flat = torch.from_numpy(x.astype(np.float32)).to(device)
            return basis @ flat[: p * classes].view(p, classes), flat[p * classes :]

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            weight, bias = unpacked(x)
            loss, slope, slope_bias = self._loss(weight, bias)
            penalty = l2 / 2 * float(weight.double().square().sum())
            slopes = torch.cat([(basis.T @ (slope + l2 * weight)).flatten(), slope_bias])
            return loss + penalty, slopes.cpu().double().numpy()

        inverse = (self._directions * scales).float().to(device).T
        with exact_products(), torch.autocast(device.type, enabled=False):
            start = torch.cat([(inverse @ weight).flatten(), bias]).cpu().double().numpy()
            options: Any = {"maxiter": _STEPS, "ftol": _TOLERANCE, "gtol": 1e-6}
            found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
            if found.nit >= _STEPS:
                warnings.warn(
                    f"a linear classifier (l2 {l2:g}) is not at its optimum after {_STEPS} steps; "
                    "leave out such weak penalties",
                    stacklevel=2,
                )
            return unpacked(found.x)

    def _loss(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Mean cross-entropy, and its gradient by weight and bias."""
        n, classes = len(self._features), len(bias)
        loss = torch.zeros((), dtype=torch.float64 if _has_double(weight) else torch.float32)
        loss = loss.to(weight.device)
        slope, slope_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        size = max(1, _MOST_LOGITS // classes)
        for rows, labels in zip(self._features.split(size), self._labels.split(size), strict=True):
            log_p = (rows @ weight + bias).log_softmax(dim=1)
            loss -= log_p.gather(1, labels[:, None]).sum(dtype=loss.dtype)
            error = log_p.exp()
            error[torch.arange(len(rows), device=rows.device), labels] -= 1
            slope += rows.T @ error
            slope_bias += error.sum(dim=0)
        return float(loss) / n, slope / n, slope_bias / n


def _has_double(tensor: Tensor) -> bool:
    return tensor.device.type != "mps"
