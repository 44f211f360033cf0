"""What measures of two layers share that need all of their images together.

Unlike CKA they are no ratio of sums over blocks of images. They are computed on the first
`max_images` of a run, and belong to that number.

A measure prepares a side for each layer and compares two sides. A message of an error that says
what is wrong with a side is the rest of a sentence that begins with the layer's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import Array, to_tensor
from vitprobe.measures.base import Measure
from vitprobe.measures.cka import SimilarityResult
from vitprobe.measures.points import Points

MINIMUM_IMAGES = 4
GROUPS = 10
"""Of the delete-a-group jackknife: image i of the subset is in group i mod 10."""
PERMUTATIONS = 19
"""The largest of 19 permuted values is a 95 % critical value of the permutation test."""
INTERVAL = (
    "delete-a-group jackknife over 10 interleaved groups of images, t with 9 degrees of freedom; "
    "none below 10 images; it covers the value that samples of this many images have on average, "
    "not what more images would give"
)
TOO_WIDE = "; somewhat wider than need be, since the measure changes by jumps when images leave"
NULL = (
    "{}; the floor drawn is the largest value over 19 seeded permutations of the images of one "
    "layer, the 95 % critical value of a permutation test"
)
FEW = (
    " Computed on the first max_images images, and on so few images the value depends on their "
    "number: compare values of equal numbers of images only."
)

S = TypeVar("S")
T = TypeVar("T")


def compared(x: Array, y: Array, side: Callable[[Points], S], between: Callable[[S, S], T]) -> T:
    """`between` of the sides of x and y, each (n, ...).

    Raises:
        MeasureError: fewer than 4 images, different numbers of them, non-finite features, or
            whatever the measure itself refuses.
    """
    tensors = {"x": to_tensor(x), "y": to_tensor(y)}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            raise MeasureError(f"{name} has shape {tuple(tensor.shape)}: give (images, features)")
        if not torch.isfinite(tensor).all():
            raise MeasureError(f"{name} holds NaN or infinite features")
        if len(tensor) < MINIMUM_IMAGES:
            raise MeasureError(f"{name} has {len(tensor)} images: give at least {MINIMUM_IMAGES}")
    if len(tensors["x"]) != len(tensors["y"]):
        raise MeasureError(
            f"x has {len(tensors['x'])} images and y has {len(tensors['y'])}: "
            "similarity compares the same images in the same order"
        )
    sides = []
    for name, tensor in tensors.items():
        try:
            sides.append(side(Points.of(tensor)))
        except MeasureError as error:
            raise MeasureError(f"{name} {error}") from None
    try:
        return between(*sides)
    except MeasureError as error:
        raise MeasureError(f"x {error}") from None


def inner(a: Tensor, b: Tensor) -> float:
    """Inner product of what only rounding takes out of [-1, 1]."""
    return float((a * b).sum().clamp(-1, 1))


class Subset:
    """The first `max_images` images of a run, by layer, kept until they are compared.

    Images are keyed by their index in the run, so that merging is a union and exact: whatever the
    split and the order, the same images give the same numbers to the last bit. A layer is reduced
    to its `Points` as soon as its last image has come; until then it holds a copy of its features.
    """

    def __init__(self, layers: int, max_images: int) -> None:
        if max_images < MINIMUM_IMAGES:
            raise MeasureError(
                f"a subset of {max_images} images is too small: give at least {MINIMUM_IMAGES}"
            )
        self.max_images = max_images
        self._parts: list[dict[int, Tensor]] = [{} for _ in range(layers)]
        self._images: list[set[int]] = [set() for _ in range(layers)]
        self._points: list[Points | None] = [None] * layers

    def update(self, layer: int, first_image: int, features: Tensor) -> None:
        """Add the features (n, ...) of images first_image, first_image + 1, ... of the run.

        Images from `max_images` on are ignored.

        Raises:
            MeasureError: an image that was given before, or NaN or infinite features.
        """
        features = features[: max(0, self.max_images - first_image)]
        if len(features) == 0:
            return
        part = features.detach().flatten(1).to("cpu", copy=True)
        if not torch.isfinite(part).all():
            raise MeasureError(f"features are NaN or infinite in layer {layer}")
        self._add(layer, {first_image: part})

    def _add(self, layer: int, parts: dict[int, Tensor]) -> None:
        images = {i for first, part in parts.items() for i in range(first, first + len(part))}
        twice = images & self._images[layer]
        if twice:
            raise MeasureError(f"image {min(twice)} of layer {layer} was given twice")
        self._images[layer] |= images
        self._parts[layer].update(parts)
        self._points[layer] = None
        if len(self._images[layer]) == self.max_images:
            self._points[layer] = self._assemble(layer)
            self._parts[layer].clear()

    def _assemble(self, layer: int) -> Points:
        return Points.of(torch.cat([part for _, part in sorted(self._parts[layer].items())]))

    def merge(self, other: Self) -> None:
        """Add the images of another subset of the same layers.

        Raises:
            MeasureError: another number of layers or of images to keep, or an image in both.
        """
        if len(other._parts) != len(self._parts) or other.max_images != self.max_images:
            raise MeasureError("only subsets of the same layers and max_images can be merged")
        for layer, (parts, images) in enumerate(zip(other._parts, other._images, strict=True)):
            if not images:
                continue
            twice = images & self._images[layer]
            if twice:
                raise MeasureError(f"image {min(twice)} of layer {layer} is in both parts")
            if parts:
                self._add(layer, parts)
            else:
                self._images[layer] = set(images)
                self._points[layer] = other._points[layer]

    @classmethod
    def beside(cls, subsets: Sequence[Self]) -> Self:
        """The layers of several subsets of the same images, one after the other.

        Raises:
            MeasureError: subsets of other numbers of images to keep.
        """
        if len({subset.max_images for subset in subsets}) > 1:
            raise MeasureError("only subsets of the same max_images can be put together")
        joined = cls(0, subsets[0].max_images)
        for subset in subsets:
            joined._parts += subset._parts
            joined._images += subset._images
            joined._points += subset._points
        return joined

    def points(self) -> list[Points]:
        """The points of every layer, images in order of the run.

        Raises:
            MeasureError: no images yet, or layers that were given different images.
        """
        for layer, images in enumerate(self._images):
            if not images:
                raise MeasureError(f"no images of layer {layer} were given")
            if images != self._images[0]:
                raise MeasureError(f"layers 0 and {layer} were given different images")
        found = []
        for layer, known in enumerate(self._points):
            points = self._assemble(layer) if known is None else known
            self._points[layer] = points
            found.append(points)
        return found


def _groups(images: int) -> list[Tensor]:
    """For each group of the jackknife, the images that are left."""
    index = torch.arange(images)
    return [index[index % GROUPS != group] for group in range(GROUPS)]


def _permutations(images: int) -> list[Tensor]:
    """The same for every measure, layer and run over so many images."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(images, generator=generator) for _ in range(PERMUTATIONS)]


class SubsetMeasure(Measure):
    """Similarity of all pairs of layers over a subset of the images.

    Measures of one run may share one `Subset`; then merge the subsets once, not every measure.

    The standard error is a delete-a-group jackknife over 10 interleaved groups of images
    (Kott 2001), from 10 images on; its t quantile has 9 degrees of freedom. Deleting a tenth at
    once, not single images, keeps it valid for ranks and neighbours, which are not smooth (Shao &
    Wu 1989). The floor is the largest value over 19 permutations of the images of the second layer.
    """

    symmetric: ClassVar[bool] = True

    def __init__(self, subset: Subset) -> None:
        self.subset = subset
        self.reasons: dict[int, str] = {}
        """After `compute`: for each layer with an undefined value, why, as the rest of a sentence
        that begins with the layer's name."""

    @classmethod
    @abstractmethod
    def side(cls, points: Points) -> Any:
        """What the measure needs of a layer. Raises MeasureError where that is not defined."""

    @classmethod
    @abstractmethod
    def between(cls, a: Any, b: Any) -> float:
        """The value of two sides. Raises MeasureError where it is not defined."""

    @classmethod
    @abstractmethod
    def reorder(cls, side: Any, order: Tensor) -> Any:
        """The second side with its images in another order."""

    def merge(self, other: Self) -> None:
        """Add the images of another instance's subset."""
        self.subset.merge(other.subset)

    def compute(self) -> SimilarityResult:
        """Value, standard error and floor of every pair of layers (row: x, column: y)."""
        points = self.subset.points()
        self.reasons = {}
        sides = self._sides(points, self.reasons)
        value = self._matrix(sides, sides, self.reasons)
        permuted = []
        for order in _permutations(len(points[0])):
            others = [None if side is None else self.reorder(side, order) for side in sides]
            permuted.append(self._matrix(sides, others, {}))
        return SimilarityResult(
            value=value,
            standard_error=self._standard_error(points, value),
            floor=torch.stack(permuted).amax(0),
            degrees=GROUPS - 1,
        )

    def _standard_error(self, points: Sequence[Points], value: Tensor) -> Tensor:
        images = len(points[0])
        if images < GROUPS:
            return torch.full_like(value, torch.nan)
        deleted = []
        for kept in _groups(images):
            sides = self._sides([layer.take(kept) for layer in points], {})
            deleted.append(self._matrix(sides, sides, {}))
        error = torch.stack(deleted).std(0, correction=0) * (GROUPS - 1) ** 0.5
        error[value.isnan()] = torch.nan
        # A layer is its own copy in every sample.
        return error.fill_diagonal_(torch.nan)

    def _sides(self, points: Sequence[Points], reasons: dict[int, str]) -> list[Any]:
        sides: list[Any] = []
        for layer, one in enumerate(points):
            try:
                if len(one) < MINIMUM_IMAGES:
                    raise MeasureError(f"has {len(one)} images of the {MINIMUM_IMAGES} it needs")
                sides.append(self.side(one))
            except MeasureError as error:
                reasons[layer] = str(error)
                sides.append(None)
        return sides

    def _matrix(self, rows: list[Any], columns: list[Any], reasons: dict[int, str]) -> Tensor:
        value = torch.full((len(rows), len(columns)), torch.nan, dtype=torch.float64)
        for i, a in enumerate(rows):
            for j, b in enumerate(columns):
                if a is None or b is None or (self.symmetric and j < i):
                    continue
                try:
                    value[i, j] = self.between(a, b)
                except MeasureError as error:
                    reasons.setdefault(i, str(error))
                    reasons.setdefault(j, str(error))
                if self.symmetric:
                    value[j, i] = value[i, j]
        return value


class OfRows(SubsetMeasure):
    """Measures whose side has a row an image."""

    @classmethod
    def reorder(cls, side: Tensor, order: Tensor) -> Tensor:
        return side[order]


class OfPairs(SubsetMeasure):
    """Measures whose side has a number for every pair of images."""

    @classmethod
    def reorder(cls, side: Tensor, order: Tensor) -> Tensor:
        return side[order][:, order]
