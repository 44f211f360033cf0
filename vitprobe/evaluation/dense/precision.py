"""Average precision, as COCO's own tools have it, with intervals over images.

Matching, and every value, is pycocotools' COCOeval (Lin et al., "Microsoft COCO", ECCV 2014). The
interval is the percentile bootstrap (Efron 1979) over test images: what COCOeval matched in each is
kept, and precision is summed up again with every image counted as often as it was drawn.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitprobe.errors import VitprobeError
from vitprobe.evaluation.intervals import Interval

METRICS: Final = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""In COCOeval's order."""
_RESAMPLES: Final = 200


class Precision(NamedTuple):
    """metrics: by name, nan where no object of that size is there. by_class: "ap" of each category,
    nan where it has no object."""

    metrics: dict[str, Interval]
    by_class: NDArray[np.float64]


def average_precision(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: str,
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Precision:
    """COCO's average precision over IoU 0.50 … 0.95, and what belongs to it.

    Args:
        truth: the content of an annotation file.
        results: in COCO's format: image_id, category_id, score, and bbox or segmentation.
        kind: "bbox" or "segm".
        resamples: of the bootstrap; 0 for no intervals. Those of sizes have none.
        seed: of the bootstrap.
    """
    done = _evaluated(truth, results, kind)
    # -1 stands for a mean over nothing.
    stats = [float(value) if value >= 0 else float("nan") for value in done.stats[:6]]
    precision = done.eval["precision"][:, :, :, 0, -1]
    by_class = np.array(
        [one[one > -1].mean() if (one > -1).any() else np.nan for one in precision.T], dtype=float
    )
    intervals = [Interval(value) for value in stats]
    if resamples and stats[0] == stats[0]:
        drawn = _bootstrapped(done, resamples, seed)
        for i, values in enumerate(drawn.T):
            low, high = np.nanquantile(values, [0.025, 0.975])
            intervals[i] = Interval(stats[i], float(low), float(high))
    return Precision(dict(zip(METRICS, intervals, strict=True)), by_class)


def need_tools() -> None:
    """Raise VitprobeError where pycocotools is not installed."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError as error:
        raise VitprobeError(
            "detection needs pycocotools; install it with pip install 'vitprobe[dense]'"
        ) from error


def _evaluated(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Its tools speak of their progress on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        # They also write into what they are given.
        known.dataset = copy.deepcopy(dict(truth))
        if kind == "segm":
            # A thing without an outline counts for boxes alone.
            known.dataset["annotations"] = [
                one for one in known.dataset["annotations"] if one.get("segmentation")
            ]
        known.createIndex()
        if results:
            # Of what has a box and an outline, the tools would take the box.
            other = "segmentation" if kind == "bbox" else "bbox"
            found = known.loadRes(
                [{key: one[key] for key in one if key != other} for one in results]
            )
        else:
            found = COCO()
            found.dataset = {**known.dataset, "annotations": []}
            found.createIndex()
        done = COCOeval(known, found, kind)
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done


class _Matched(NamedTuple):
    """What COCOeval matched for one category, over all images, best scores first.

    image: (d,) which image a detection is in. right, counted: (thresholds, d), whether it found an
    object, and whether it counts at all. objects: (images,) how many there were to find.
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: NDArray[np.int64]


def _matched(done: Any) -> list[_Matched]:
    images = len(done.params.imgIds)
    areas, thresholds = len(done.params.areaRng), len(done.params.iouThrs)
    most = done.params.maxDets[-1]
    found = []
    for category in range(len(done.params.catIds)):
        # The first range of areas is all of them.
        start = category * areas * images
        cells = [(i, cell) for i, cell in enumerate(done.evalImgs[start : start + images]) if cell]
        objects = np.zeros(images, dtype=np.int64)
        scores, places = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        right, ignored = ([np.zeros((thresholds, 0), dtype=bool)] for _ in range(2))
        for i, cell in cells:
            objects[i] = np.count_nonzero(np.asarray(cell["gtIgnore"]) == 0)
            scores.append(np.asarray(cell["dtScores"][:most], dtype=float))
            places.append(np.full(len(scores[-1]), i))
            right.append(cell["dtMatches"][:, :most] != 0)
            ignored.append(np.asarray(cell["dtIgnore"][:, :most], dtype=bool))
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        counted = ~np.concatenate(ignored, axis=1)[:, order]
        hits = np.concatenate(right, axis=1)[:, order] & counted
        found.append(_Matched(np.concatenate(places)[order], hits, counted, objects))
    return found


def weighted_precision(
    matched: _Matched, weights: NDArray[Any], recalls: NDArray[Any]
) -> NDArray[np.float64]:
    """(thresholds,) the average precision of one category with images counted `weights` (images,)
    times; nan where there is then nothing to find."""
    objects = float(weights @ matched.objects)
    if objects == 0:
        return np.full(len(matched.right), np.nan)
    counts = weights[matched.image].astype(float)
    hits = np.cumsum(matched.right * counts, axis=1)
    total = np.cumsum(matched.counted * counts, axis=1)
    recall = hits / objects
    precision = hits / (total + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    return np.array(
        [
            row[np.searchsorted(reached, recalls, side="left")].mean()
            for row, reached in zip(padded, recall, strict=True)
        ]
    )


def _bootstrapped(done: Any, resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, 3): "ap", "ap50" and "ap75"."""
    found = _matched(done)
    images, recalls = len(done.params.imgIds), done.params.recThrs
    thresholds = np.asarray(done.params.iouThrs)
    half, three_quarters = (int(np.abs(thresholds - t).argmin()) for t in (0.5, 0.75))
    rng = np.random.default_rng(seed)
    drawn = np.full((resamples, 3), np.nan)
    for i in range(resamples):
        weights = rng.multinomial(images, np.full(images, 1 / images))
        values = np.stack([weighted_precision(one, weights, recalls) for one in found])
        there = values[~np.isnan(values[:, 0])]
        if len(there):
            drawn[i] = there.mean(), there[:, half].mean(), there[:, three_quarters].mean()
    return drawn
