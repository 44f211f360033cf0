"""Classification by the nearest training images: what features are worth without any training.

Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance discrimination",
CVPR 2018, section 3.4: every one of the k most similar training images votes for its class with the
weight exp(s / temperature), s being the cosine similarity. DINO (Caron et al. 2021) evaluates so
with k = 20 and temperature 0.07, the defaults here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.devices import exact_products
from vitprobe.errors import DataError, MeasureError

# Similarities held at once: 256 MiB of float32.
_MOST_SIMILARITIES = 2**26


@torch.no_grad()
def knn_predictions(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    classes: int | None = None,
) -> dict[int, Tensor]:
    """The class that weighted k-nearest-neighbour classification gives each test image.

    Computed in float32, without TF32 or autocast, on the device of `train`; some test images at a
    time, so that memory does not grow with their number. Among classes with equal votes the lowest
    is chosen.

    Args:
        train, test: features (n, p) and (m, p).
        train_labels: classes (n,), integers from 0.
        ks: numbers of neighbours that vote.
        temperature: of their weights; the larger, the more a vote counts as any other.
        classes: how many there are; by default as many as the labels name.

    Returns:
        For each k, classes (m,) int64 on the device of `train`.

    Raises:
        MeasureError: features of another shape, not finite or all zero (they have no direction), a
            k that is not within 1 to n, or a temperature that is not above 0.
        DataError: labels that are not one class for each image.
    """
    _check_features("train", train)
    _check_features("test", test)
    if train.shape[1] != test.shape[1]:
        raise MeasureError(
            f"train features have {train.shape[1]} dimensions and test features {test.shape[1]}; "
            "take both from the same model"
        )
    for k in ks:
        if not 1 <= k <= len(train):
            raise MeasureError(
                f"k must lie within 1 and the {len(train)} training images, not be {k}"
            )
    if not temperature > 0:
        raise MeasureError(f"temperature must be above 0, not {temperature}")
    _check_labels("train", train_labels, len(train), classes)
    if classes is None:
        classes = 1 + int(train_labels.max())

    device = train.device
    known = train_labels.to(device, torch.int64)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    with exact_products(), torch.autocast(device.type, enabled=False):
        gallery = F.normalize(train.float(), dim=1)
        size = max(1, _MOST_SIMILARITIES // len(gallery))
        for queries in test.split(size):
            similarity = F.normalize(queries.to(device, torch.float32), dim=1) @ gallery.T
            nearest, index = similarity.topk(max(ks), dim=1)
            # The common factor exp(-s_max / temperature) keeps the weights finite and changes no
            # comparison of votes.
            weights = ((nearest - nearest[:, :1]) / temperature).exp()
            for k, chosen in found.items():
                votes = weights.new_zeros(len(queries), classes)
                votes.scatter_add_(1, known[index[:, :k]], weights[:, :k])
                chosen.append(votes.argmax(dim=1))
    return {k: torch.cat(chosen) for k, chosen in found.items()}


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> float:
    """Top-1 accuracy, a share of 1, of weighted k-nearest-neighbour classification.

    As `knn_predictions`, for one k, with the classes (m,) that the test images have.

    Raises:
        MeasureError, DataError: as `knn_predictions`.
    """
    if test.ndim == 2 and len(test):
        _check_labels("test", test_labels, len(test), classes)
    found = knn_predictions(
        train, train_labels, test, ks=[k], temperature=temperature, classes=classes
    )[k]
    return float((found == test_labels.to(found.device)).double().mean())


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise MeasureError(
            f"{name} features must have the shape (images, dimensions), not {tuple(features.shape)}"
        )
    largest = features.abs().amax(dim=1)
    if (bad := _first(~torch.isfinite(largest))) is not None:
        raise MeasureError(
            f"the features of {name} image {bad} are not finite; does the model's training diverge?"
        )
    if (bad := _first(largest == 0)) is not None:
        raise MeasureError(
            f"the features of {name} image {bad} are all zero, so its similarity is undefined"
        )


def _check_labels(name: str, labels: Tensor, count: int, classes: int | None) -> None:
    if labels.shape != (count,):
        raise DataError(
            f"{name} labels must have the shape ({count},), one for each image, not "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{name} labels must be integers, not {labels.dtype}")
    wrong = labels < 0
    if classes is not None:
        wrong |= labels >= classes
    if (bad := _first(wrong)) is not None:
        allowed = "at least 0" if classes is None else f"within 0 and {classes - 1}"
        raise DataError(
            f"the label of {name} image {bad} must be {allowed}, not {int(labels[bad])}"
        )


def _first(flags: Tensor) -> int | None:
    """Number of the first flag that is set."""
    return int(flags.int().argmax()) if flags.any() else None
