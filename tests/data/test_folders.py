"""Folders, zips and tars of the same images, in every layout."""

from __future__ import annotations

import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from vitprobe.data.archives import list_zip
from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        value = sum(name.encode()) % 256
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "set"


def zipped(folder, top="", compression=zipfile.ZIP_DEFLATED):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def tarred(folder, top="."):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, top)
    return path


PARTS = (
    "train/cat/1.png",
    "train/cat/2.png",
    "train/dog/a/3.png",
    "val/cat/4.png",
    "val/dog/5.png",
)


@pytest.mark.parametrize(
    "form",
    [
        lambda root: root,
        zipped,
        lambda root: zipped(root, "top/sub/", zipfile.ZIP_STORED),
        tarred,
        lambda root: tarred(root, "top"),
    ],
)
def test_parts_and_classes(root, form):
    fill(root, *PARTS)
    data = load_labelled(form(root))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.labels.tolist() == [0, 1]
    for part, names in ((data.train, PARTS[:3]), (data.test, PARTS[3:])):
        assert [name[-len(end) :] for name, end in zip(part.names, names, strict=True)] == [*names]
        part = pickle.loads(pickle.dumps(part))
        for i, name in enumerate(names):
            assert part.decode(i).shape == (3, 4, 6)
            assert (part.decode(i) == sum(name.encode()) % 256).all()


def test_classes_alone_have_no_held_out_part(root):
    fill(root, "b/1.png", "a/2.png", "B/3.jpeg")
    data = load_labelled(root)
    assert (data.classes, data.test) == (("B", "a", "b"), None)
    assert list(data.train.names) == ["B/3.jpeg", "a/2.png", "b/1.png"]


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("x/y/1.png", "x/y/2.png"), ("1.png",)])
def test_images_in_no_folder_have_no_labels(root, names):
    fill(root, *names)
    data = load_labelled(root)
    assert (len(data.train), data.train.labels, data.classes) == (len(names), None, ())


def test_one_part_alone(root):
    fill(root, "train/cat/1.png", "train/dog/2.png")
    assert load_labelled(root).train.labels.tolist() == [0, 1]
    assert load_labelled(root).test is None
    (root / "train").rename(root / "test")
    with pytest.raises(DataError, match="holds held-out images only; give 'train="):
        load_labelled(root)
    with pytest.raises(DataError, match="holds held-out images only, nothing to train on"):
        load_labelled(f"train={root},test={root}")


def test_parts_in_two_archives(tmp_path):
    fill(tmp_path / "a", "train/cat/1.png", "train/dog/2.png")
    fill(tmp_path / "b", "test/cat/3.png", "test/dog/4.png")
    fill(tmp_path / "c", "cat/3.png", "cow/4.png", "dog/5.png")
    a, b, c = (zipped(tmp_path / name) for name in "abc")
    data = load_labelled(f"train={a},test={b}")
    assert list(data.test.names) == ["test/cat/3.png", "test/dog/4.png"]
    with pytest.raises(DataError, match="class 'cow' among its held-out images"):
        load_labelled(f"train={a},test={c}")


def test_the_first_held_out_part_counts_and_a_class_may_be_called_train(root):
    fill(root, *PARTS, "test/cat/9.png")
    assert list(load_labelled(root).test.names) == [*PARTS[3:]]
    other = root / "val"
    fill(other, "train/1.png", "plane/2.png")
    assert load_labelled(other).classes == ("cat", "dog", "plane", "train")


def test_hidden_and_other_files_count_for_nothing(root):
    fill(root, "cat/1.png", "dog/2.png", ".thumbs/3.png", "__MACOSX/cat/4.png", "cat/._1.png")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    (root / ".cache").mkdir()
    data = load_labelled(root)
    assert (data.classes, list(data.train.names)) == (("cat", "dog"), ["cat/1.png", "dog/2.png"])


def test_links_are_followed_once(root, tmp_path):
    fill(tmp_path / "elsewhere", "1.png")
    fill(root, "dog/2.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "up").symlink_to(root)
    assert load_labelled(root).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("form", [lambda root: root, zipped, tarred])
def test_empty_classes_are_named(root, form):
    fill(root, *PARTS)
    (root / "train" / "emu").mkdir()
    (root / "train" / "emu" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"class 'emu' of .* has no images"):
        load_labelled(form(root))


def test_layouts_that_are_refused(root):
    fill(root, *PARTS)
    fill(root, "extra/1.png")
    with pytest.raises(DataError, match="images in 'extra' beside 'train' and 'val'"):
        load_labelled(root)
    (root / "extra" / "1.png").rename(root / "train" / "7.png")
    with pytest.raises(DataError, match=r"'train/7.png' of .* lies in the folder of no class"):
        load_labelled(root)
    (root / "train" / "7.png").unlink()
    (root / "val" / "cat").rename(root / "val" / "cow")
    with pytest.raises(DataError, match="class 'cat' among its training images and not among its"):
        load_labelled(root)


def test_no_images(tmp_path):
    with pytest.raises(DataError, match=r"holds no images \(\.bmp"):
        load_labelled(tmp_path)


def test_a_missing_and_a_damaged_member(root):
    fill(root, "cat/1.png", "dog/2.png")
    loose = load_labelled(root).train
    path = zipped(root, compression=zipfile.ZIP_STORED)
    stored = load_labelled(path).train
    (root / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cannot decode 'cat/1.png' of .*No such file"):
        loose.decode(0)
    member = list_zip(path)[0][0]
    content = bytearray(path.read_bytes())
    content[member.offset + member.size - 20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        stored.decode(0)
    path.write_bytes(content[: member.offset + 3])
    with pytest.raises(DataError, match="the archive ends within it"):
        stored.decode(0)
    with pytest.raises(DataError, match=r"set\.zip"):
        load_labelled(path)


def test_archives_that_cannot_be_read_at_random(root):
    fill(root, "cat/1.png", "dog/2.png")
    with pytest.raises(DataError, match="encrypted or compressed in a way"):
        load_labelled(zipped(root, compression=zipfile.ZIP_LZMA))
    packed = root.with_suffix(".tar.gz")
    subprocess.run(["tar", "czf", packed, "-C", root, "."], check=True)
    with pytest.raises(DataError, match="uncompress it"):
        load_labelled(packed)
    (root / "cat" / "3.png").symlink_to("1.png")
    with pytest.raises(DataError, match=r"'./cat/3.png' of .* is a link"):
        load_labelled(tarred(root))
    path = tarred(root / "dog")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"dog.tar"):
        load_labelled(path)


def test_the_shared_cifar_images(shared):
    paths = [shared / "data" / f"cifar10_{name}.zip" for name in ("train_10x1000", "test_10000")]
    if not all(path.is_file() for path in paths):
        pytest.skip("no CIFAR images beside the checkout")
    data = load_labelled(f"train={paths[0]},test={paths[1]}")
    assert (len(data.train), len(data.test), len(data.classes)) == (10_000, 10_000, 10)
    assert np.bincount(data.train.labels).tolist() == [1000] * 10
    assert data.test.decode(9_999).shape == (3, 32, 32)
