"""Average precision: a case by hand, pycocotools' own numbers, and intervals over images."""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools import mask as tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitprobe.evaluation.dense.precision import (
    METRICS,
    _evaluated,
    _matched,
    average_precision,
    weighted_precision,
)


def truth(annotations, images=2, categories=(1,)):
    return {
        "info": {},
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "annotations": [
            {"id": i + 1, "iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one}
            for i, one in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": str(i)} for i in categories],
    }


def thing(image, box, category=1, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def random_case(seed, images=12, categories=(3, 7, 8)):
    """Objects, and detections that are near some of them, miss others and make some up."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 5)):
            box = np.concatenate([rng.uniform(0, 70, 2), rng.uniform(4, 30, 2)]).round(2)
            category = int(rng.choice(categories[:2]))
            crowd = int(rng.random() < 0.1)
            outline = _outline(box)
            objects.append(
                thing(image, box.tolist(), category, iscrowd=crowd, segmentation=outline)
            )
            for _ in range(rng.integers(0, 3)):
                near = box + rng.normal(0, 2, 4)
                near[2:] = near[2:].clip(1)
                said = category if rng.random() < 0.8 else int(rng.choice(categories))
                found.append(_found(image, near, said, rng))
        stray = np.concatenate([rng.uniform(0, 70, 2), rng.uniform(4, 30, 2)])
        found.append(_found(image, stray, int(rng.choice(categories)), rng))
    return truth(objects, images, categories), found


def _outline(box):
    mask = np.zeros((100, 100), dtype=np.uint8, order="F")
    x, y, w, h = (max(int(value), 0) for value in box)
    mask[y : y + h, x : x + w] = 1
    coded = tools.encode(mask)
    return {"size": [100, 100], "counts": coded["counts"].decode()}


def _found(image, box, category, rng):
    # Scores with few digits, so that some are tied.
    score = round(float(rng.random()), 1)
    return thing(image, box.tolist(), category, score=score, segmentation=_outline(box))


def reference(content, results, kind):
    """pycocotools' twelve numbers, by its own steps."""
    other = "segmentation" if kind == "bbox" else "bbox"
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = content
        known.createIndex()
        found = known.loadRes([{k: v for k, v in one.items() if k != other} for one in results])
        done = COCOeval(known, found, kind)
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done.stats


def test_by_hand():
    # Two objects; the best detection is one of them exactly, the second nothing, the third finds
    # the other at IoU 0.6: precisions 1 up to recall 1/2, and 2/3 up to 1 at thresholds to 0.6.
    objects = [thing(0, (10, 10, 20, 20)), thing(1, (50, 50, 20, 20))]
    found = [
        thing(0, (10, 10, 20, 20), score=0.9),
        thing(0, (60, 60, 20, 20), score=0.8),
        thing(1, (50, 50, 20, 12), score=0.7),
    ]
    made = average_precision(truth(objects), found, "bbox", resamples=0).metrics
    # Of 101 recalls, 51 are at most 1/2.
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert made["ap50"].value == pytest.approx(loose)
    assert made["ap75"].value == pytest.approx(strict)
    assert made["ap"].value == pytest.approx((3 * loose + 7 * strict) / 10)
    assert math.isnan(made["ap_large"].value)
    assert math.isnan(made["ap"].low)


def test_everything_found_and_nothing_found():
    content, _ = random_case(0)
    content["annotations"] = [one for one in content["annotations"] if not one["iscrowd"]]
    perfect = [{**one, "score": 1.0} for one in content["annotations"]]
    made = average_precision(content, perfect, "bbox", resamples=20)
    assert made.metrics["ap"] == (1, 1, 1)
    assert made.by_class.tolist()[:2] == [1, 1]
    assert math.isnan(made.by_class[2])
    assert average_precision(content, [], "bbox", resamples=20).metrics["ap"] == (0, 0, 0)
    empty = {**content, "annotations": []}
    assert math.isnan(average_precision(empty, perfect, "bbox").metrics["ap"].value)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_pycocotools(kind, seed):
    content, found = random_case(seed)
    made = average_precision(content, found, kind, resamples=0).metrics
    expected = reference(*random_case(seed), kind)[:6]
    values = [made[name].value for name in METRICS]
    assert np.nan_to_num(values, nan=-1).tolist() == expected.tolist()


def test_nothing_that_is_given_is_changed():
    content, found = random_case(5)
    again, found_again = random_case(5)
    average_precision(content, found, "segm", resamples=0)
    assert content == again
    assert found == found_again


@pytest.mark.parametrize("seed", [3, 4])
def test_summed_up_again_images_that_count_once_give_the_same(seed):
    content, found = random_case(seed)
    done = _evaluated(content, found, "bbox")
    ones = np.ones(len(content["images"]))
    for k, matched in enumerate(_matched(done)):
        own = weighted_precision(matched, ones, done.params.recThrs)
        theirs = done.eval["precision"][:, :, k, 0, -1]
        if (theirs == -1).all():
            assert np.isnan(own).all()
        else:
            np.testing.assert_allclose(own, theirs.mean(axis=1), atol=1e-12)


def test_images_that_count_twice_are_images_that_are_there_twice():
    content, found = random_case(6, images=5)
    weights = np.array([2, 0, 1, 3, 1])
    names = np.repeat(np.arange(5), weights)
    more, results = [], []
    for new, old in enumerate(names):
        more += [{**o, "image_id": new} for o in content["annotations"] if o["image_id"] == old]
        results += [{**one, "image_id": new} for one in found if one["image_id"] == old]
    for i, one in enumerate(more):
        one["id"] = i + 1
    drawn = truth(more, len(names), (3, 7, 8))
    done = _evaluated(content, found, "bbox")
    whole = _evaluated(drawn, results, "bbox")
    for k, matched in enumerate(_matched(done)):
        own = weighted_precision(matched, weights, done.params.recThrs)
        theirs = whole.eval["precision"][:, :, k, 0, -1]
        if not np.isnan(own).any():
            # Ties between images are broken by their order, which is not the same here.
            np.testing.assert_allclose(own, theirs.mean(axis=1), atol=0.05)


def test_intervals_hold_the_value_and_are_drawn_by_the_seed():
    content, found = random_case(7, images=20)
    one, again, other = (
        average_precision(content, found, "bbox", resamples=50, seed=seed).metrics
        for seed in (0, 0, 1)
    )
    assert one["ap"].low < one["ap"].value < one["ap"].high
    assert one["ap"].value == again["ap"].value == other["ap"].value
    assert one["ap50"] == again["ap50"] != other["ap50"]
    assert math.isnan(one["ap_small"].low)
