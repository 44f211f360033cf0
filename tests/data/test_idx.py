"""Idx files written by hand, and what is wrong with damaged ones."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from vitprobe.data import idx
from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def content(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    images = np.arange(5 * 3 * 4).reshape(5, 3, 4)
    for part, n in (("train", 5), ("t10k", 2)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(content(images[:n]))
        labels = gzip.compress(content(np.arange(n) % 3))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_images_and_labels(folder):
    data = load_labelled(folder)
    assert data.train.images.shape == (5, 1, 3, 4)
    assert data.train.images.ravel().tolist() == list(range(60))
    assert (data.test.labels.tolist(), data.classes) == ([0, 1], ("0", "1", "2"))


def test_another_spelling_and_no_held_out_part(folder):
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images.idx3-ubyte")
    (folder / "t10k-images-idx3-ubyte").unlink()
    assert load_labelled(folder).test is None


@pytest.mark.parametrize(
    ("bytes_of", "message"),
    [
        (lambda right: right + bytes(24), "has 100 bytes where its header announces 76"),
        (lambda right: right[:50], "has 50 bytes where its header announces 76"),
        (lambda right: right[:9], "ends within its header"),
        (lambda right: b"", "begins with nothing where"),
        (lambda right: b"\0\0\x0d" + right[3:], "begins with 00 00 0d 03 where .* 00 00 08 03"),
        (lambda right: right[:4] + b"\xff" * 12 + right[16:], "has 76 bytes where its header an"),
        (lambda right: content(np.zeros((4, 3, 4))), "holds 4 images and .* 5 labels"),
    ],
)
def test_damaged_files(folder, bytes_of, message):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(bytes_of(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_labelled(folder)


def test_a_damaged_gz_and_missing_labels(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    for damaged in (path.read_bytes()[:-9], b"nothing"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read '.*train-labels-idx1-ubyte.gz'"):
            load_labelled(folder)
    path.unlink()
    with pytest.raises(DataError, match="holds train-images-idx3-ubyte without its labels"):
        load_labelled(folder)


def test_fashion_mnist_where_it_is_and_where_it_is_not(folder, monkeypatch):
    monkeypatch.setattr(idx, "_FASHION_FOLDERS", ("/no/such/place", str(folder)))
    assert load_labelled("fashion-mnist").classes[:2] == ("T-shirt/top", "Trouser")
    monkeypatch.setattr(idx, "_FASHION_FOLDERS", ("/no/such/place",))
    with pytest.raises(DataError, match="dataset-fashion-mnist, or name a folder"):
        load_labelled("fashion-mnist")


def test_the_installed_fashion_mnist():
    try:
        data = load_labelled("fashion-mnist")
    except DataError:
        pytest.skip("Fashion-MNIST is not installed")
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    # The published mean and deviation of the training pixels.
    scaled = data.train.images / np.float32(255)
    assert (scaled.mean(), scaled.std()) == (
        pytest.approx(0.2860, abs=1e-4),
        pytest.approx(0.3530, abs=1e-4),
    )
