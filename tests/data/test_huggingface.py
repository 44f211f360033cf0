"""Small data sets built in memory and saved to disk; nothing is downloaded."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def colours(n):
    return [np.full((4, 5, 3), i, np.uint8) for i in range(n)]


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture
def build(datasets):
    def build(n, labels=None, **columns):
        kinds = {"image": datasets.Image()}
        values = {"image": colours(n)}
        if labels is not None:
            kinds["label"] = datasets.ClassLabel(names=["cat", "dog", "emu"])
            values["label"] = labels
        for name, (kind, column) in columns.items():
            kinds[name], values[name] = kind, column
        return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))

    return build


def test_splits_labels_and_pixels(datasets, build, tmp_path):
    splits = {"train": build(4, [0, 2, 1, 1]), "test": build(2, [0, 2]), "extra": build(1, [0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = load_labelled(f"hf:{tmp_path / 'set'}")
    assert data.classes == ("cat", "dog", "emu")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 2, 1, 1], [0, 2])
    part = pickle.loads(pickle.dumps(data.train))
    assert [int(part.decode(i).float().mean()) for i in (3, 0)] == [3, 0]
    assert load_labelled(f"hf:{tmp_path / 'set'}", channels=1).test.decode(1).shape == (1, 4, 5)


def test_a_single_split_without_labels(build, tmp_path):
    build(3).save_to_disk(tmp_path / "set")
    data = load_labelled(f"hf:{tmp_path / 'set'}")
    assert (len(data.train), data.test, data.train.labels, data.classes) == (3, None, None, ())


def test_numbers_without_names(datasets, build, tmp_path):
    build(2, fine_label=(datasets.Value("int64"), [0, 3])).save_to_disk(tmp_path / "set")
    data = load_labelled(f"hf:{tmp_path / 'set'}")
    assert (data.train.labels.tolist(), len(data.classes)) == ([0, 3], 4)


def test_columns_that_do_not_fit(datasets, build, tmp_path):
    path = tmp_path / "set"
    classes = datasets.ClassLabel(names=["a", "b"])
    build(2, a=(classes, [0, 1]), b=(classes, [0, 1])).save_to_disk(path)
    with pytest.raises(DataError, match=r"several columns of classes.*a \(ClassLabel\)"):
        load_labelled(f"hf:{path}")
    build(2, other=(datasets.Image(), colours(2))).save_to_disk(path)
    with pytest.raises(DataError, match=r"one column of images.*image \(Image\), other"):
        load_labelled(f"hf:{path}")
    build(2, fine_label=(datasets.Value("string"), ["x", "y"])).save_to_disk(path)
    with pytest.raises(DataError, match=r"column 'fine_label' .* must hold numbers"):
        load_labelled(f"hf:{path}")


def test_no_training_split(datasets, build, tmp_path):
    splits = {"a": build(1), "test": build(1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="no split 'train' among a, test"):
        load_labelled(f"hf:{tmp_path / 'set'}")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"install vitprobe\[hf\]"):
        load_labelled("hf:anything")
