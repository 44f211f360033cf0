"""Published data sets from tiny imitations of the folders that torchvision keeps them in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from vitprobe.data.labelled import load_labelled
from vitprobe.data.parts import Files
from vitprobe.data.published import PUBLISHED, download
from vitprobe.errors import DataError


def _picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path, quality=95)


def _check(source: str, train: list[int], test: list[int], classes: int) -> None:
    """Labels are these, and every image decodes to the red that was drawn for its place."""
    found = load_labelled(source)
    assert len(found.classes) == classes
    for part, labels in ((found.train, train), (found.test, test)):
        assert isinstance(part, Files)
        assert part.labels is not None
        assert part.labels.tolist() == labels
        for i, label in enumerate(labels):
            image = part.decode(i)
            assert image.shape == (3, 4, 6)
            assert abs(int(image[0, 0, 0]) - 50 * (1 + label)) < 8


def test_flowers_train_on_the_validation_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the published files torchvision checks the hash.
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    root = tmp_path / "flowers-102"
    labels = [1, 2, 3, 1, 2, 3]
    for i, label in enumerate(labels):
        _picture(root / "jpg" / f"image_{i + 1:05d}.jpg", 50 * label)
    savemat(root / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(root / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    _check(f"flowers102:{tmp_path}", [0, 1, 2, 0], [1, 2], 3)


def test_pets(tmp_path: Path) -> None:
    root = tmp_path / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    lines = {"trainval": [("Abyssinian_1", 1), ("beagle_1", 2)], "test": [("beagle_2", 2)]}
    for part, images in lines.items():
        text = "".join(f"{name} {label} 1 1\n" for name, label in images)
        (root / "annotations" / f"{part}.txt").write_text(text)
        for name, label in images:
            _picture(root / "images" / f"{name}.jpg", 50 * label)
    _check(f"pets:{tmp_path}", [0, 1], [1], 2)
    assert load_labelled(f"pets:{tmp_path}").classes == ("Abyssinian", "Beagle")


def test_aircraft_train_on_the_validation_images_too(tmp_path: Path) -> None:
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nDC-3\n")
    parts = {"trainval": [("001", "DC-3"), ("002", "707-320")], "test": [("003", "DC-3")]}
    for part, images in parts.items():
        text = "".join(f"{name} {variant}\n" for name, variant in images)
        (data / f"images_variant_{part}.txt").write_text(text)
        for name, variant in images:
            _picture(data / "images" / f"{name}.jpg", 100 if variant == "DC-3" else 50)
    _check(f"aircraft:{tmp_path}", [1, 0], [1], 2)


def test_cars(tmp_path: Path) -> None:
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "i4")]
    train = np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=kind)
    test = np.array([("3.jpg", 2), ("4.jpg", 2)], dtype=kind)
    savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": test})
    names = np.array(["Acura", "BMW"], dtype=object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for folder, listed in (("cars_train", train), ("cars_test", test)):
        for name, label in listed:
            _picture(root / folder / name, 50 * label)
    _check(f"cars:{tmp_path}", [1, 0], [1, 1], 2)
    assert load_labelled(f"cars:{tmp_path}").classes == ("Acura", "BMW")


def test_inaturalist_is_tested_on_its_validation_images(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "moss"}, {"id": 3, "name": "fern"}]
    for part, images in (("train", [(1, 7), (2, 3)]), ("val", [(9, 7)])):
        listed = [
            {"id": i, "file_name": f"train_val2018/Plantae/{kind}/{i}.jpg"} for i, kind in images
        ]
        annotations = [{"image_id": i, "category_id": kind} for i, kind in reversed(images)]
        content = {"images": listed, "annotations": annotations, "categories": categories}
        (tmp_path / f"{part}2018.json").write_text(json.dumps(content))
        for one, (_, kind) in zip(listed, images, strict=True):
            _picture(tmp_path / one["file_name"], 100 if kind == 7 else 50)
    _check(f"inat18:{tmp_path}", [1, 0], [1], 2)
    assert load_labelled(f"inat18:{tmp_path}").classes == ("fern", "moss")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_what_is_absent_is_told_with_the_layout_that_was_expected(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_labelled(f"{name}:{tmp_path}")
    message = str(caught.value)
    assert PUBLISHED[name].layout in message
    assert str(tmp_path) in message
    assert "\n" not in message
    with pytest.raises(DataError, match=f"write {name}:PATH"):
        load_labelled(f"{name}:")


def test_the_other_cifar_is_not_taken_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match="put cifar-100-python/ with train, test and meta there"):
        load_labelled(f"cifar100:{tmp_path}")


def test_downloads_are_torchvisions_and_fail_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, root: object, *, download: bool, **_: object) -> None:
        assert download
        raise OSError("no network")

    monkeypatch.setattr(datasets.OxfordIIITPet, "__init__", refuse)
    with pytest.raises(DataError, match=r"cannot download Oxford-IIIT Pet into '.*': no network"):
        download(f"pets:{tmp_path / 'new'}")
