"""VOC's and ADE's layouts, and what folders in them get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitprobe.data.semantic import IGNORED, load_semantic
from vitprobe.errors import DataError


def save(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(values, dtype=np.uint8)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def voc(root, values=((0, 1), (20, 255)), mode="P"):
    for part in ("train", "val"):
        listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f"{part}1\n")
        Image.new("RGB", (2, 2)).save(_made(root / "JPEGImages" / f"{part}1.jpg"))
        save(root / "SegmentationClass" / f"{part}1.png", values, mode)
    return root


def ade(root, values=((0, 1), (150, 255))):
    for part in ("training", "validation"):
        Image.new("RGB", (2, 2)).save(_made(root / "images" / part / f"ADE_{part}_1.jpg"))
        save(root / "annotations" / part / f"ADE_{part}_1.png", values)
    return root


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("mode", ["P", "L"])
def test_voc_counts_the_background_as_a_class(tmp_path, mode):
    found = load_semantic(voc(tmp_path, mode=mode))
    assert len(found.classes) == 21
    assert found.classes[15] == "person"
    assert found.train.targets(0).tolist() == [[0, 1], [20, IGNORED]]
    assert found.test.image(0).shape == (3, 2, 2)


def test_ade_leaves_out_zero_and_shifts_the_rest(tmp_path):
    found = load_semantic(ade(tmp_path))
    assert len(found.classes) == 150
    assert found.test.targets(0).tolist() == [[IGNORED, 0], [149, IGNORED]]


def test_classes_can_be_listed(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\n\nground\n")
    found = load_semantic(voc(tmp_path, values=((0, 1), (1, 1)))).with_channels(1)
    assert found.classes == ("sky", "ground")
    assert found.train.image(0).shape == (1, 2, 2)
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(DataError, match="names 1 classes"):
        load_semantic(tmp_path)


def test_classes_that_are_none_are_named_as_the_file_has_them(tmp_path):
    with pytest.raises(DataError, match=r"train1.png' has a pixel of class 21, but there are 21"):
        load_semantic(voc(tmp_path / "voc", values=((0, 21), (0, 0)))).train.targets(0)
    with pytest.raises(DataError, match=r"has a pixel of class 151, but there are 150"):
        load_semantic(ade(tmp_path / "ade", values=((0, 151), (0, 0)))).train.targets(0)


def test_maps_in_colour_and_damaged_ones_are_refused(tmp_path):
    found = load_semantic(voc(tmp_path))
    path = tmp_path / "SegmentationClass" / "train1.png"
    Image.new("RGB", (2, 2)).save(path)
    with pytest.raises(DataError, match="is in colour"):
        found.train.targets(0)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot read the map of classes"):
        found.train.targets(0)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_semantic(tmp_path / "none")
    with pytest.raises(DataError, match="has neither SegmentationClass/"):
        load_semantic(tmp_path)
    root = voc(tmp_path / "voc")
    (root / "SegmentationClass" / "val1.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 1 images .* no map of classes .* 'val1'"):
        load_semantic(root)
    (root / "JPEGImages" / "train1.jpg").unlink()
    with pytest.raises(DataError, match=r"have no image in .* the first being 'train1'"):
        load_semantic(root)
    listing = root / "ImageSets" / "Segmentation" / "train.txt"
    listing.write_text("")
    with pytest.raises(DataError, match="lists no images"):
        load_semantic(root)
    listing.unlink()
    with pytest.raises(DataError, match="which lists the images to train on"):
        load_semantic(root)
    root = ade(tmp_path / "ade")
    for path in (root / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no images"):
        load_semantic(root)


def test_sizes_and_modes_are_checked_from_the_heads_of_files(tmp_path):
    data = load_semantic(voc(tmp_path / "voc"))
    data.test.check_sizes()
    path = data.test.root / data.test.maps[0]
    save(path, np.zeros((3, 9), dtype=np.uint8))
    with pytest.raises(DataError, match="pixels, but its map of classes 9 x 3"):
        data.test.check_sizes()
    path.write_bytes(b"none")
    with pytest.raises(DataError, match="cannot read the map of classes"):
        data.test.check_sizes()


def test_classes_that_are_none_are_found_in_all_maps_at_once(tmp_path):
    data = load_semantic(voc(tmp_path / "voc"))
    data.test.check_classes()
    path = data.test.root / data.test.maps[-1]
    with Image.open(path) as image:
        values = np.array(image)
    values[0, 0] = 77
    save(path, values)
    data.test.check_sizes()
    with pytest.raises(DataError, match="has a pixel of class 77"):
        data.test.check_classes()


def test_lists_that_are_the_same_and_classes_in_another_encoding(tmp_path):
    root = tmp_path / "voc"
    voc(root)
    lists = root / "ImageSets" / "Segmentation"
    kept = (lists / "val.txt").read_text()
    (lists / "val.txt").write_text((lists / "train.txt").read_text())
    with pytest.raises(DataError, match="the same images to train and to test on"):
        load_semantic(root)
    (lists / "val.txt").write_text(kept)
    (root / "classes.txt").write_bytes("sky\nna\xefve\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not in UTF-8"):
        load_semantic(root)
