"""What can be asked for, the digits' split, channels, arrays, parts apart."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe.data.labelled import Arrays, Labelled, load_labelled
from vitprobe.data.parts import Names
from vitprobe.errors import DataError


def images(n, channels=3, size=5, seed=0):
    shape = (n, channels, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_digits_have_the_documented_shapes_and_range():
    digits = load_labelled("digits")
    assert digits.train.images.shape == (1437, 1, 8, 8)
    assert digits.test.images.shape == (360, 1, 8, 8)
    assert digits.train.images.dtype == np.float32
    assert digits.train.labels.dtype == np.int64
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 1)
    assert digits.classes == tuple("0123456789")
    assert set(digits.train.labels.tolist()) == set(range(10))


def test_the_split_covers_every_digit_once_and_is_the_same_each_time():
    from sklearn.datasets import load_digits

    first, second = load_labelled("digits"), load_labelled("digits")
    ours = np.concatenate([first.train.images, first.test.images])[:, 0] * 16
    theirs = load_digits().images
    for rows in (ours, theirs):
        rows.flags.writeable = True
    assert sorted(map(bytes, ours.astype(np.uint8))) == sorted(map(bytes, theirs.astype(np.uint8)))
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_floats_decode_to_whole_numbers():
    part = Arrays(np.array([0, 0.5, 1], np.float32).reshape(1, 1, 1, 3), None)
    assert part.decode(0).tolist() == [[[0, 128, 255]]]


def test_a_pair_of_arrays():
    data = load_labelled((images(4), np.array([0, 2, 1, 1])))
    assert (len(data.train), data.test, data.classes) == (4, None, ("0", "1", "2"))
    assert torch.equal(data.train.decode(2), torch.from_numpy(images(4)[2]))
    tensors = load_labelled((torch.rand(4, 6, 6), None))
    assert (tensors.train.images.shape, tensors.classes) == ((4, 1, 6, 6), ())
    assert load_labelled(tensors) is tensors


def test_colour_becomes_luminance_and_grey_is_repeated():
    grey = load_labelled((images(3), None), channels=1).train.images
    colours = images(3)
    expected = [
        np.asarray(Image.fromarray(colour.transpose(1, 2, 0)).convert("L")) for colour in colours
    ]
    assert np.abs(grey[:, 0].astype(int) - np.array(expected)).max() <= 1
    white = load_labelled((np.ones((1, 3, 2, 2), np.float32), None), channels=1)
    assert white.train.images.tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]
    digits = load_labelled("digits", channels=3)
    assert digits.test.images.shape == (360, 3, 8, 8)
    assert (digits.test.images == digits.test.images[:, :1]).all()
    with pytest.raises(DataError, match="have 2 channels and cannot be given 3"):
        load_labelled((images(3, 2), None), channels=3)


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=images(4), labels=np.array([0, 1, 1, 3]), test_images=images(2))
    data = load_labelled(path)
    assert (len(data.train), len(data.test), data.test.labels) == (4, 2, None)
    assert data.classes == ("0", "1", "2", "3")
    np.savez(path, pictures=images(4))
    with pytest.raises(DataError, match=r"holds pictures; name an array 'images'"):
        load_labelled(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="cannot read"):
        load_labelled(path)
    np.savez(path, images=np.array([print, len]))
    with pytest.raises(DataError, match="cannot read"):
        load_labelled(path)


def test_training_and_held_out_images_named_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", images=images(3, seed=seed), labels=np.arange(3))
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    data = load_labelled(f"train={a},test={b}")
    np.testing.assert_array_equal(data.test.images, images(3, seed=1))
    np.savez(b, images=images(4), labels=np.arange(4))
    with pytest.raises(DataError, match="class '3' among its held-out images and not among its tr"):
        load_labelled(f"train={a}, test={b}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", r"'digit'.*Did you mean 'digits'\?"),
        ("no/such/folder", "there is no such file or folder"),
        (42, "cannot read labelled images from int"),
        ((np.zeros((4, 9)), None), r"are \(4, 9\); give"),
        ((np.zeros((4, 8, 8, 3), np.uint8), None), "channels last"),
        ((np.full((4, 1, 8, 8), 2.0), None), "not all in"),
        ((np.full((4, 1, 8, 8), np.nan), None), "not all in"),
        ((np.zeros((4, 1, 8, 8), int), None), "give uint8 or floats"),
        ((np.zeros((4, 1, 8, 8)), [0, 1]), r"labels of .* are \(2\) for 4 images"),
        ((np.zeros((2, 1, 8, 8)), [0, -1]), "whole numbers from 0 on"),
        ((np.zeros((2, 1, 8, 8)), [0.0, 1.0]), "whole numbers from 0 on"),
        ((np.zeros((0, 1, 8, 8)), None), "holds no images: its array is"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(DataError, match=message):
        load_labelled(source)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(DataError, match="is no source of labelled images"):
        load_labelled(tmp_path / "notes.txt")


def test_names_are_a_sequence_of_any_names():
    names = ["a", "", "ü/ß.png", "\udcff.jpg"]
    kept = pickle.loads(pickle.dumps(Names(names)))
    assert list(kept) == names
    assert kept[-1] == names[-1]
    assert kept[1:3] == names[1:3]
    with pytest.raises(IndexError):
        kept[4]


def test_labelled_is_a_source_whose_channels_can_change():
    data = Labelled("mine", Arrays(images(2, 1), None), None, ())
    assert load_labelled(data, channels=3).train.images.shape == (2, 3, 5, 5)


def test_classes_of_two_sources_are_matched_by_name(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).repeat(16).reshape(12, 1, 4, 4) * 20
    np.savez(tmp_path / "twelve.npz", images=pixels, labels=np.arange(12))
    for i in range(12):
        folder = tmp_path / "test" / str(i)
        folder.mkdir(parents=True)
        Image.fromarray(pixels[i, 0]).save(folder / "one.png")
    data = load_labelled(f"train={tmp_path}/twelve.npz,test={tmp_path}/test", channels=1)
    shown = [int(data.test.decode(i)[0, 0, 0]) // 20 for i in range(12)]
    assert data.test.labels.tolist() == shown
    assert sorted(shown) == list(range(12))


def test_the_same_images_are_not_both_trained_and_tested_on(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a" / "one.png")
    with pytest.raises(DataError, match="tests on the images that are trained on"):
        load_labelled(f"train={tmp_path},test={tmp_path}")
