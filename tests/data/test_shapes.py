"""The made shapes, and both formats they are written in."""

from __future__ import annotations

import colorsys
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as tools

from vitprobe.data.coco import decode_mask
from vitprobe.data.shapes import (
    CLASSES,
    Shapes,
    class_map,
    draw,
    shapes_of,
    write_coco,
    write_shapes,
    write_voc,
)
from vitprobe.errors import DataError, ResultError

FEW = Shapes(seed=3, train=4, val=2)


def test_a_picture_is_a_function_of_seed_part_and_number():
    one, again = draw(FEW, "train", 1), draw(FEW, "train", 1)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    others = [draw(FEW, "train", 2), draw(FEW, "val", 1), draw(Shapes(seed=4), "train", 1)]
    assert not any(np.array_equal(one.image, other.image) for other in others)
    assert np.array_equal(draw(Shapes(seed=3, train=9, most=4), "train", 1).image, one.image)


def test_masks_are_apart_and_none_is_a_sliver():
    for i in range(20):
        picture = draw(FEW, "train", i)
        assert picture.image.shape == (64, 64, 3)
        assert picture.masks.sum(axis=0).max() <= 1
        assert len(picture.masks) == len(picture.labels)
        assert picture.masks.reshape(len(picture.masks), -1).sum(axis=1).min() >= 9


def test_shapes_have_the_area_that_geometry_gives():
    seen = {name: [] for name in CLASSES}
    for i in range(60):
        picture = draw(Shapes(most=1), "train", i)
        for mask, label in zip(picture.masks, picture.labels, strict=True):
            rows, columns = np.nonzero(mask)
            sides = np.ptp(rows) + 1, np.ptp(columns) + 1
            if rows.min() and columns.min() and max(rows.max(), columns.max()) < 63:
                seen[CLASSES[label]].append(mask.sum() / (sides[0] * sides[1]))
    # A disc fills pi / 4 of its box, whatever its direction; a turned square at least half.
    assert np.mean(seen["circle"]) == pytest.approx(np.pi / 4, abs=0.04)
    assert min(seen["square"]) > 0.45
    assert max(seen["triangle"]) < 0.62


@pytest.mark.parametrize("cue", ["hue", "texture", "none"])
def test_hues_tell_classes_apart_where_they_are_the_cue(cue):
    """Each class in its quarter of the circle of hues, or every class all around it."""
    seen = {name: [] for name in CLASSES}
    for i in range(120):
        picture = draw(Shapes(most=1, cue=cue), "train", i)
        for mask, label in zip(picture.masks, picture.labels, strict=True):
            hue = colorsys.rgb_to_hsv(*(picture.image[mask].mean(axis=0) / 255))[0]
            seen[CLASSES[label]].append((hue * len(CLASSES) - label + 2) % 4 - 2)
    for name, away in seen.items():
        assert len(away) > 15, name
        assert (np.abs(away).max() < 0.5) == (cue == "hue")
        assert (np.abs(away).max() > 1.5) != (cue == "hue")


def strongest(image, mask):
    """Frequency (cycles a pixel) of a shape's strongest wave, the power a quarter turn from it
    relative to its own, and its own relative to all."""
    grey = image.mean(axis=2)
    inside = np.where(mask, grey - grey[mask].mean(), 0)
    power = np.abs(np.fft.fft2(inside, (256, 256))) ** 2
    frequencies = np.fft.fftfreq(256)
    radius = np.hypot(frequencies[:, None], frequencies)
    power[radius < 0.1] = 0  # of the outline
    row, column = np.unravel_index(power.argmax(), power.shape)
    near = np.arange(-9, 10)
    turned = power[np.ix_((near - column) % 256, (near + row) % 256)]
    return radius[row, column], turned.max() / power.max(), power.max() / power.mean()


def test_textures_are_of_their_class_in_any_direction():
    """Fine stripes and coarse ones have one wave, checks two at right angles, grain none."""
    seen = {name: [] for name in CLASSES}
    for i in range(120):
        picture = draw(Shapes(most=1, cue="texture"), "train", i)
        for mask, label in zip(picture.masks, picture.labels, strict=True):
            seen[CLASSES[label]].append(strongest(picture.image, mask))
    frequency, across, sharp = (
        {name: np.array(found)[:, i] for name, found in seen.items()} for i in range(3)
    )
    # Cycles a pixel: one in 3 to 3.6 pixels, and one in 5.5 to 7.
    assert frequency["circle"] == pytest.approx(0.305, abs=0.05)
    assert frequency["square"] == pytest.approx(0.16, abs=0.05)
    assert max(across["circle"].max(), across["square"].max()) < 0.3 < across["triangle"].min()
    waves = min(sharp[name].min() for name in ("circle", "square", "triangle"))
    assert 2 * sharp["cross"].max() < waves


def test_a_cue_there_is_not_is_refused():
    with pytest.raises(DataError, match="no cue 'outline'; choose one of hue, texture, none"):
        Shapes(cue="outline")


def test_coco_says_of_each_instance_what_its_mask_is(tmp_path):
    folder = write_coco(tmp_path / "coco", FEW)
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert [one["name"] for one in content["categories"]] == list(CLASSES)
    assert [one["id"] for one in content["annotations"]] == [
        i + 1 for i in range(len(content["annotations"]))
    ]
    first = draw(FEW, "train", 0)
    own = [one for one in content["annotations"] if one["image_id"] == 1]
    assert np.array_equal(np.asarray(Image.open(folder / "train" / "000001.png")), first.image)
    for one, mask, label in zip(own, first.masks, first.labels, strict=True):
        coded = tools.frPyObjects(one["segmentation"], 64, 64)
        assert np.array_equal(decode_mask(coded), mask)
        assert one["area"] == tools.area(coded)
        assert one["bbox"] == tools.toBbox(coded).tolist()
        assert one["category_id"] == label + 1


def test_voc_keeps_every_value_of_a_map(tmp_path):
    folder = write_voc(tmp_path / "voc", FEW)
    stems = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    assert stems == ["val_000001", "val_000002"]
    for i, stem in enumerate(stems):
        stored = np.asarray(Image.open(folder / "SegmentationClass" / f"{stem}.png"))
        expected = class_map(draw(FEW, "val", i))
        assert np.array_equal(stored, expected)
        assert set(np.unique(expected)) <= {0, 1, 2, 3, 4, 255}
        assert 255 in expected


def test_names_of_sets():
    assert shapes_of("shapes") == Shapes()
    assert shapes_of("shapes:12") == Shapes(seed=12)
    assert shapes_of("coco/") is None
    with pytest.raises(DataError, match="'shapes:x' names no seed"):
        shapes_of("shapes:x")


def test_a_set_is_written_whole_and_never_over_another(tmp_path):
    out = write_shapes(tmp_path / "made", Shapes(train=1, val=1))
    assert (out / "coco" / "annotations").is_dir()
    assert (out / "voc" / "classes.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    with pytest.raises(ResultError, match="exists"):
        write_shapes(out, Shapes(train=1, val=1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train": 0}, "at least 1 each"),
        ({"seed": -1}, "seed of the shapes"),
        ({"size": 8}, "at least 32 pixels"),
        ({"fewest": 3, "most": 2}, "is no range"),
    ],
)
def test_sets_that_cannot_be(wrong, words):
    with pytest.raises(DataError, match=words):
        Shapes(**wrong)
