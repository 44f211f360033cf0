"""Runs of dense prediction, on the loop of pre-training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from vitprobe import distributed
from vitprobe.data.coco import Detection
from vitprobe.data.semantic import Segmentation
from vitprobe.errors import DataError
from vitprobe.evaluation.dense.detector import Detector
from vitprobe.evaluation.dense.feed import DenseFeed
from vitprobe.evaluation.dense.overlap import overlap, pixel_counts
from vitprobe.evaluation.dense.placing import whole
from vitprobe.evaluation.dense.precision import average_precision
from vitprobe.evaluation.dense.recipe import DenseRecipe
from vitprobe.evaluation.dense.segmenter import Segmenter, predicted
from vitprobe.evaluation.intervals import Interval
from vitprobe.models import Model
from vitprobe.training.feed import Feed
from vitprobe.training.methods import Method
from vitprobe.training.run import Run, check_batch

WEIGHTS: Final = "weights.safetensors"
CLASSES: Final = "classes.csv"
DETECTIONS: Final = "detections.json"


class Outcome:
    """What a test found.

    values: by metric. by_class: columns of numbers, one for each class. predictions: in COCO's
    format, of detection.
    """

    def __init__(
        self,
        values: Mapping[str, Interval],
        by_class: Mapping[str, NDArray[np.float64]],
        predictions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.values = dict(values)
        self.by_class = dict(by_class)
        self.predictions = predictions


class DenseRun(Run):
    """A dense predictor, its data and its optimiser, standing at an update.

    recipe: with the model's encoder in it. model: whose weights it starts from.
    batch_size: images in one forward pass of a test. half: whether tests run in bf16.
    """

    recipe: Any
    leaves = (WEIGHTS, CLASSES, DETECTIONS)

    def __init__(
        self,
        recipe: DenseRecipe,
        data: Detection | Segmentation,
        model: Model,
        device: torch.device,
        *,
        workers: int = 0,
        batch_size: int = 16,
        half: bool = False,
    ) -> None:
        self._model, self._batch_size, self._half = model, batch_size, half
        self._outcome: tuple[int, Outcome] | None = None
        self.data: Any = data
        super().__init__(recipe, data, device, workers=workers)  # type: ignore[arg-type]

    @property
    def lr(self) -> float:
        """Learning rate of the next update: as of pre-training, or by the recipe's milestones."""
        recipe = self.recipe
        warmup = round(recipe.optimizer.warmup_epochs * self.steps_per_epoch)
        if not recipe.milestones or self.step < warmup:
            return super().lr
        passed = sum(self.step >= round(share * self.steps) for share in recipe.milestones)
        return recipe.optimizer.lr * recipe.batch_size / 256 * 0.1**passed

    def outcome(self) -> Outcome:
        """Of a test of the method as it stands; kept until the next update."""
        if self._outcome is None or self._outcome[0] != self.step:
            with self.engine.evaluating() as method, self._precision():
                self._outcome = self.step, self._tested(method)
        return self._outcome[1]

    def evaluate(self) -> dict[str, float]:
        """The scores of a test, by metric; those that are not defined are left out."""
        values = {name: found.value for name, found in self.outcome().values.items()}
        return {name: value for name, value in values.items() if value == value}

    def pictures(self, count: int = 8) -> dict[str, Tensor]:
        """None."""
        return {}

    def _check(self, data: Any) -> None:
        check_batch(self.recipe, len(data.train))

    def _fingerprint(self, data: Any) -> str:
        return f"{data.train.fingerprint} {data.test.fingerprint}"

    def _feeds(self, data: Any, workers: int) -> tuple[Feed, Feed]:
        detector = self.recipe.detector

        def feed(part: Any) -> Feed:
            return DenseFeed(
                part,
                self.recipe.encoder,
                self.recipe.jitter,
                seed=self.recipe.seed,
                device=self.device,
                workers=workers,
                masks=detector is not None and detector.masks,
            )

        return feed(data.train), feed(data.test)

    def _own_share(self) -> Tensor:
        """Numbers of the test images that this process looks at."""
        return torch.arange(len(self.data.test))[distributed.rank() :: distributed.world_size()]

    def _precision(self) -> AbstractContextManager[Any]:
        if self._half:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @abstractmethod
    def _tested(self, method: Any) -> Outcome: ...


class DetectionRun(DenseRun):
    """Of a detector."""

    def _check(self, data: Any) -> None:
        super()._check(data)
        if self.recipe.detector.masks:
            data.test.check_masks()

    def _method(self, data: Detection) -> Method:  # type: ignore[override]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return Detector(self.recipe, self._model, len(data.classes))

    def _tested(self, method: Detector) -> Outcome:
        test, masks = self.data.test, self.recipe.detector.masks
        own: list[dict[str, Any]] = []
        feed: Any = self._test
        for images, index in feed.plain(self._own_share(), self._batch_size):
            for i, found in zip(index.tolist(), method.detect(images), strict=True):
                own += _described(found, test, i, method.size)
        results = [one for share in distributed.gather_objects(own) for one in share]
        truth = test.ground_truth()
        values: dict[str, Any] = {}
        columns: dict[str, Any] = {}
        for name, kind in (("box", "bbox"), ("mask", "segm")) if masks else (("box", "bbox"),):
            precision = average_precision(truth, results, kind, seed=self.recipe.seed)
            values |= {f"{name}_{metric}": value for metric, value in precision.metrics.items()}
            columns[f"{name}_ap"] = precision.by_class
        return Outcome(values, columns, results)


def _described(found: dict[str, Tensor], test: Any, i: int, size: int) -> list[dict[str, Any]]:
    """Detections in image i in COCO's format."""
    original = int(test.sizes[i][0]), int(test.sizes[i][1])
    boxes = whole(original, size).back(found["boxes"].float(), original).cpu()
    scores, labels = found["scores"].tolist(), found["labels"].tolist()
    described: list[dict[str, Any]] = [
        {
            "image_id": int(test.ids[i]),
            "category_id": test.categories[label - 1].id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), label, score in zip(boxes.tolist(), labels, scores, strict=True)
    ]
    if "masks" in found and described:
        from pycocotools import mask as tools

        drawn = paste_masks_in_image(found["masks"].float().cpu(), boxes, original)[:, 0] >= 0.5
        coded = tools.encode(np.asfortranarray(drawn.permute(1, 2, 0).numpy().astype(np.uint8)))
        for one, mask in zip(described, coded, strict=True):
            one["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
    return described


class SegmentationRun(DenseRun):
    """Of a segmenter."""

    def _check(self, data: Any) -> None:
        super()._check(data)
        data.test.check_sizes()
        data.test.check_classes()

    def _method(self, data: Segmentation) -> Method:  # type: ignore[override]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return Segmenter(self.recipe, self._model, len(data.classes))

    def _tested(self, method: Segmenter) -> Outcome:
        test, size, classes = self.data.test, self.recipe.image_size, len(self.data.classes)
        own: dict[int, NDArray[np.int64]] = {}
        feed: Any = self._test
        for images, index in feed.plain(self._own_share(), self._batch_size):
            for i, logits in zip(index.tolist(), method.logits(images), strict=True):
                truth = test.targets(i).numpy()
                placing = whole(truth.shape, size)
                said = predicted(logits, (placing.height, placing.width), truth.shape)
                own[i] = pixel_counts(truth, said.cpu().numpy(), classes)
        shares = distributed.gather_objects(own)
        everything = {i: counts for share in shares for i, counts in share.items()}
        found = overlap(np.stack([everything[i] for i in range(len(test))]), seed=self.recipe.seed)
        if found.miou.value != found.miou.value:
            raise DataError(f"no pixel of the maps of classes of '{self.data.source}' has a class")
        return Outcome(
            {"miou": found.miou, "pixel_accuracy": found.accuracy}, {"iou": found.by_class}
        )
