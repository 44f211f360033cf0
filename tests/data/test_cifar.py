"""Batches pickled as the published ones are, and pickles that would run something."""

from __future__ import annotations

import os
import pickle
import tarfile

import numpy as np
import pytest

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def save(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol))


def pixels(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


@pytest.fixture
def ten(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        save(folder / f"data_batch_{i}", {b"data": pixels(2, i), b"labels": [i - 1, 9]})
    save(folder / "test_batch", {b"data": pixels(3, 0), b"labels": [0, 1, 2]})
    save(folder / "batches.meta", {b"label_names": [f"class {i}".encode() for i in range(10)]})
    return folder


def test_the_folder_its_parent_and_the_archive_agree(ten):
    archive = ten.parent / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(ten, ten.name)
    for source in (ten, ten.parent, archive):
        data = load_labelled(source)
        assert data.train.images.shape == (10, 3, 32, 32)
        assert data.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
        assert data.classes[3] == "class 3"
        red = pixels(3, 0)[1, :1024].reshape(32, 32)
        np.testing.assert_array_equal(data.test.images[1, 0], red)


def test_cifar_100(tmp_path):
    for name, n in (("train", 4), ("test", 2)):
        batch = {b"data": pixels(n, 0), b"fine_labels": [*range(n)], b"coarse_labels": [0] * n}
        save(tmp_path / name, batch)
    save(tmp_path / "meta", {b"fine_label_names": [b"a", b"b", b"c", b"d"]})
    data = load_labelled(tmp_path)
    assert (len(data.train), data.classes) == (4, ("a", "b", "c", "d"))


class Malicious:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Malicious(), "asks for posix.system, which is no part of CIFAR"),
        ({b"data": Malicious(), b"labels": [0]}, "asks for posix.system"),
        ({b"labels": [0]}, "holds no CIFAR images"),
        ({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 0]}, "holds no CIFAR images"),
        ({b"data": pixels(2, 0), b"labels": [0]}, r"labels of .*data_batch_2.* for 2 images"),
        ({b"data": pixels(2, 0), b"labels": [0, 10]}, "go beyond its 10 classes"),
        ([1, 2], "holds no CIFAR images"),
    ],
)
def test_batches_that_are_refused(ten, batch, message):
    save(ten / "data_batch_2", batch)
    with pytest.raises(DataError, match=message):
        load_labelled(ten)


def test_damaged_and_missing_files(ten):
    whole = (ten / "data_batch_3").read_bytes()
    for damaged in (b"", whole[:50], whole[:-40], b"\x80\x02]K\x01R."):
        (ten / "data_batch_3").write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read data_batch_3 of .*; get it again"):
            load_labelled(ten)
    (ten / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"cannot read '.*data_batch_3'"):
        load_labelled(ten)
    archive = ten.parent / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(ten, ten.name)
    with pytest.raises(DataError, match="holds no data_batch_3; get it again"):
        load_labelled(archive)
    archive.write_bytes(archive.read_bytes()[:8000])
    with pytest.raises(DataError, match=r"cannot read '.*cifar.tar.gz'"):
        load_labelled(archive)
