"""COCO's format, and what files in it get wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe.data.coco import load_coco, read_instances
from vitprobe.errors import DataError

SQUARE = [[2, 2, 8, 2, 8, 8, 2, 8]]


def content(**changes):
    """Two images of 12 x 10 and one instance; category ids have gaps and no order."""
    found = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 12, "height": 10},
            {"id": 3, "file_name": "b.png", "width": 12, "height": 10},
        ],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 90, "bbox": [2, 2, 6, 6],
             "segmentation": SQUARE, "area": 36, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 13, "name": "dog"}],
    }  # fmt: skip
    return found | changes


def folder(path, train=None, val=None):
    """A set in COCO's layout with grey images."""
    (path / "annotations").mkdir(parents=True)
    for part, given in (("train", train or content()), ("val", val or content())):
        (path / part).mkdir()
        for image in given["images"] if isinstance(given, dict) else []:
            if isinstance(image, dict) and image.get("width") and image["height"]:
                pixels = np.full((image["height"], image["width"], 3), 99, dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / image["file_name"])
        text = given if isinstance(given, str) else json.dumps(given)
        (path / "annotations" / f"instances_{part}.json").write_text(text)
    return path


def annotation(**changes):
    return content()["annotations"][0] | changes


def test_a_set_is_read_with_labels_in_the_order_of_category_ids(tmp_path):
    found = load_coco(folder(tmp_path / "set"))
    assert found.classes == ("dog", "cat")
    assert len(found.train) == 1
    assert found.left_out == 1
    assert len(found.test) == 2
    target = found.train.targets(0)
    assert target["boxes"].tolist() == [[2, 2, 8, 8]]
    assert target["labels"].tolist() == [2]
    assert target["masks"].shape == (1, 10, 12)
    assert int(target["masks"].sum()) == 36
    assert found.train.image(0).shape == (3, 10, 12)
    assert found.with_channels(1).train.image(0).shape == (1, 10, 12)


def test_instances_are_numbered_from_one(tmp_path):
    # COCOeval takes a match with instance 0 for none.
    found = load_coco(folder(tmp_path / "set")).test.ground_truth()
    assert [one["id"] for one in found["annotations"]] == [1]
    assert [one["id"] for one in found["images"]] == [7, 3]


def test_crowds_are_tested_on_and_not_trained_on(tmp_path):
    coded = {"size": [10, 12], "counts": [0, 60, 60]}
    crowd = annotation(id=5, iscrowd=1, segmentation=coded)
    given = content(annotations=[annotation(), crowd])
    found = load_coco(folder(tmp_path / "set", given, given))
    assert len(found.train.targets(0)["boxes"]) == 1
    assert [one["iscrowd"] for one in found.test.annotations(0)] == [0, 1]
    only = content(annotations=[crowd])
    with pytest.raises(DataError, match="no image with an instance to learn from"):
        load_coco(folder(tmp_path / "crowd", only))


def test_boxes_beyond_the_image_are_cut_off_and_those_outside_not_trained_on(tmp_path):
    given = content(
        annotations=[
            annotation(bbox=[-3, 5, 8, 50]),
            annotation(id=1, bbox=[40, 40, 5, 5]),
            annotation(id=2, bbox=[1, 1, 0, 4]),
        ]
    )
    found = load_coco(folder(tmp_path / "set", given, given))
    assert found.train.targets(0)["boxes"].tolist() == [[0, 5, 5, 10]]
    # COCO's tools see them as they are.
    assert [one["bbox"][0] for one in found.test.annotations(0)] == [-3, 40, 1]


def test_area_and_iscrowd_may_be_left_out(tmp_path):
    bare = {"id": 1, "image_id": 7, "category_id": 13, "bbox": [2, 2, 6, 5]}
    given = content(annotations=[bare])
    found = load_coco(folder(tmp_path / "set", given, given))
    assert found.test.annotations(0)[0]["area"] == 30
    assert len(found.train.targets(0, masks=False)["boxes"]) == 1
    with pytest.raises(DataError, match=r"annotation 1 of .* has no segmentation"):
        found.train.targets(0)


def test_images_are_found_where_they_may_lie(tmp_path):
    source = folder(tmp_path / "set")
    apart = f"train={source}/annotations/instances_train.json,test="
    found = load_coco(apart + f"{source}/annotations/instances_val.json")
    assert len(found.test) == 2
    (source / "images").mkdir()
    (source / "val").rename(source / "images" / "val")
    assert torch.equal(load_coco(source).test.image(1), found.train.image(0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "has no list of images"),
        (content(annotations=None), "has no list of annotations"),
        (content(categories=[]), "lists no categories"),
        (content(categories=[{"id": 1, "name": "a"}] * 2), "lists a category id twice"),
        (content(categories=[{"name": "a"}]), "lacks a whole id or a name"),
        (content(images=[{"id": 7}]), "lacks a whole id, height or width"),
        (content(images=content()["images"][:1] * 2), "lists image 7 twice"),
        (content(annotations=[annotation(image_id=8)]), "is of image 8, which"),
        (content(annotations=[annotation(category_id=2)]), "is of category 2, which"),
        (content(annotations=[annotation(bbox=[1, 2])]), "a bbox of four numbers"),
        (content(annotations=[annotation(bbox=[0, 0, float("nan"), 1])]), "is not finite"),
        (content(annotations=[annotation(area=float("nan"))]), "is not finite"),
        (content(annotations=[annotation(bbox=None)]), "a bbox of four numbers"),
        (content(images=[content()["images"][0] | {"id": 10**20}]), "lacks a whole id"),
        (content(images=[content()["images"][0] | {"height": 0}]), "of at least 1"),
        (content(annotations=[7]), "annotation 1 of"),
    ],
)
def test_files_that_are_not_in_the_format(tmp_path, given, words):
    with pytest.raises(DataError, match=words):
        load_coco(folder(tmp_path / "set", given))


@pytest.mark.parametrize(
    "drawn", [[[1, 2]], {"counts": [0, 9], "size": [3, 3]}, {"size": [10, 12]}, "abc", 7]
)
def test_segmentations_that_are_none(tmp_path, drawn):
    given = content(annotations=[annotation(segmentation=drawn)])
    found = load_coco(folder(tmp_path / "set", given))
    with pytest.raises(DataError, match=r"is neither polygons nor run lengths|is for an image"):
        found.train.targets(0)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_coco(tmp_path / "none")
    source = folder(tmp_path / "set")
    (source / "val" / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 2 images .* the first being 'b.png'"):
        load_coco(source)
    (source / "annotations" / "instances_train2.json").write_text("{}")
    with pytest.raises(DataError, match=r"has both 'instances_train.json' and 'instances_train2"):
        load_coco(source)
    for path in (source / "annotations").glob("instances_train*"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no instances_train….json"):
        load_coco(source)
    with pytest.raises(DataError, match="no annotation file"):
        read_instances(tmp_path / "x.json")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="has no annotations/"):
        load_coco(tmp_path / "bare")


def test_both_parts_have_the_same_categories(tmp_path):
    other = content(categories=[{"id": 90, "name": "cat"}, {"id": 13, "name": "cow"}])
    with pytest.raises(DataError, match=r"category 13 .* is in only one"):
        load_coco(folder(tmp_path / "set", None, other))


def test_images_of_another_size_and_damaged_ones_are_named(tmp_path):
    source = folder(tmp_path / "set")
    Image.new("RGB", (5, 5)).save(source / "train" / "a.png")
    with pytest.raises(DataError, match=r"'a.png' is 5 x 5 pixels, but .* one of 12 x 10"):
        load_coco(source).train.image(0)
    (source / "train" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot decode 'a.png'"):
        load_coco(source).train.image(0)


def test_null_is_as_good_as_absent(tmp_path):
    given = content(annotations=[annotation(area=None, iscrowd=None)])
    (one,) = load_coco(folder(tmp_path / "set", given)).train.annotations(0)
    assert (one["area"], one["iscrowd"]) == (36, 0)


@pytest.mark.parametrize(
    ("drawn", "words"),
    [
        ({"counts": [20], "size": [4, 5]}, r"is for an image of size \[4, 5\]"),
        ([[1, 2, 3]], "neither polygons nor run lengths"),
        (None, "has no segmentation to learn masks from"),
    ],
)
def test_masks_to_test_on_are_checked_before_training(tmp_path, drawn, words):
    data = load_coco(folder(tmp_path / "set", val=content()))
    data.test.check_masks()
    one = annotation() | {"segmentation": drawn}
    if drawn is None:
        del one["segmentation"]
    data = load_coco(folder(tmp_path / "other", val=content(annotations=[one])))
    with pytest.raises(DataError, match=words):
        data.test.check_masks()


def test_one_file_is_not_both_trained_and_tested_on(tmp_path):
    path = folder(tmp_path / "set") / "annotations" / "instances_train.json"
    with pytest.raises(DataError, match="tests on the images that are trained on"):
        load_coco(f"train={path},test={path}")
