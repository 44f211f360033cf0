"""Shards written in webdataset's layout, read at random."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitprobe.data.archives import expand
from vitprobe.data.labelled import load_labelled
from vitprobe.errors import DataError


def shard(path, *samples):
    """Each sample: a key, and the number of its class or None."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, label in samples:
            file = io.BytesIO()
            Image.fromarray(np.full((3, 5, 3), len(key), np.uint8)).save(file, "PNG")
            entries = {"png": file.getvalue(), "json": b"{}"}
            if label is not None:
                entries["cls"] = str(label).encode() + b"\n"
            for ending, content in entries.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


LONG = "folder/" + "k" * 150


def test_a_pattern_a_folder_and_a_single_shard(tmp_path):
    shard(tmp_path / "set-08.tar", ("a", 1), ("bb", 0))
    shard(tmp_path / "set-09.tar", (LONG, 2))
    shard(tmp_path / "set-10.tar", ("a", 1), ("sub/ccc", 2))
    for source in (tmp_path / "set-{08..10}.tar", tmp_path):
        data = load_labelled(source)
        assert data.train.labels.tolist() == [1, 0, 2, 1, 2]
        assert (data.classes, data.test) == (("0", "1", "2"), None)
        part = pickle.loads(pickle.dumps(data.train))
        assert part.names[4] == "set-10.tar/sub/ccc.png"
        values = [int(part.decode(i)[0, 0, 0]) for i in (4, 2, 0, 1)]
        assert values == [7, len(LONG), 1, 2]
    assert load_labelled(tmp_path / "set-08.tar").train.labels.tolist() == [1, 0]


def test_held_out_shards_are_known_by_name(tmp_path):
    shard(tmp_path / "set-train-0.tar", ("a", 0), ("b", 1))
    shard(tmp_path / "set-val-0.tar", ("c", 1))
    data = load_labelled(tmp_path)
    assert (len(data.train), len(data.test)) == (2, 1)
    only = load_labelled(tmp_path / "set-val-{0..0}.tar")
    assert (len(only.train), only.test) == (1, None)


def test_unlabelled_shards(tmp_path):
    shard(tmp_path / "0.tar", ("a", None), ("b", None))
    data = load_labelled(tmp_path)
    assert (data.train.labels, data.classes) == (None, ())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a", 0), ("b", None)], "'0.tar/b.png' of .* has no class beside it"),
        ([("a", "cat")], "the class of '0.tar/a.png' .* is b'cat', not a number"),
        ([("a", 0), ("a", 0)], "several images called 'a'"),
        ([], "holds no images in its shards"),
    ],
)
def test_samples_that_are_refused(tmp_path, samples, message):
    shard(tmp_path / "0.tar", *samples)
    with pytest.raises(DataError, match=message):
        load_labelled(tmp_path / "{0..0}.tar")


def test_missing_and_damaged_shards(tmp_path):
    shard(tmp_path / "0.tar", ("a", 0))
    with pytest.raises(DataError, match=r"no shard '.*1\.tar'"):
        load_labelled(tmp_path / "{0..1}.tar")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"1\.tar"):
        load_labelled(tmp_path / "{0..1}.tar")


def test_patterns():
    names = [path.name for path in expand("a-{098..101}.tar")]
    assert names == ["a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar"]
    assert [str(path) for path in expand("{0..1}/{2..3}")] == ["0/2", "0/3", "1/2", "1/3"]
    assert expand("{3..2}.tar") == []
    with pytest.raises(DataError, match=r"no shard '\{3\.\.2\}\.tar'"):
        load_labelled("{3..2}.tar")
