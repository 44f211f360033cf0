"""Both paths give what they should, however the work is shared out and wherever it starts."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe.data.labelled import Arrays, Files, load_labelled
from vitprobe.errors import DataError
from vitprobe.training import feed as module
from vitprobe.training.augment import Augment, AugmentConfig
from vitprobe.training.feed import Resident, Workers, make_feed
from vitprobe.training.randomness import Draws

CPU = torch.device("cpu")


class Shift:
    """An augmentation that is easily computed by hand: each sample plus a number of its own."""

    in_workers = ""
    sizes = (4, 4)

    def __call__(self, images, draws):
        shift = self.shift(draws)[:, None, None, None]
        return images.float() + shift, images.float() - shift

    def shift(self, draws):
        return draws.bits("shift", 1)[:, 0] % 50

    def cut(self, image, draws):
        return image, image

    def finish(self, crops, draws):
        shift = self.shift(draws)[:, None, None, None]
        return crops[0].float() + shift, crops[1].float() - shift

    def plain(self, images):
        return images.float() / 255


def real():
    views = [AugmentConfig(count=2, jitter=1.0, brightness=0.4, hue=0.1), AugmentConfig(size=6)]
    return Augment(views, size=8, mean=(0.5,) * 3, std=(0.25,) * 3)


def arrays(n=100, channels=3, side=4):
    shape = (n, channels, side, side)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Arrays(images, np.arange(n) % 7)


@pytest.fixture
def files(tmp_path):
    """Images of different sizes in two classes."""
    for i in range(80):
        path = tmp_path / "files" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (9 + i % 5, 12, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
    return load_labelled(tmp_path / "files").train


def workers(part, augment, count=0, seed=3):
    return Workers(part, augment, seed=seed, device=CPU, workers=count, path="")


def shares(n, size=40, seed=0):
    return list(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).split(size))


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert len(a.views) == len(b.views)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.draws.index, b.draws.index)
        assert (a.draws.seed, a.draws.epoch) == (b.draws.seed, b.draws.epoch)


def no_children(before, seconds=20):
    until = time.monotonic() + seconds
    while set(multiprocessing.active_children()) - set(before):
        assert time.monotonic() < until, "a worker process is still there"
        time.sleep(0.05)


def test_resident_batches_are_the_images_asked_for():
    part, augment = arrays(), Shift()
    feed = Resident(part, augment, seed=3, device=CPU, path="")
    for share, batch in zip(shares(100), feed.epoch(2, shares(100)), strict=True):
        draws = Draws(3, 2, share)
        expected = (
            torch.from_numpy(part.images)[share].float() + augment.shift(draws)[:, None, None, None]
        )
        assert torch.equal(batch.views[0], expected)
        assert torch.equal(batch.labels, share % 7)
        assert torch.equal(batch.draws.uniform("x", 2), draws.uniform("x", 2))
    assert list(feed.epoch(0, [])) == []
    assert len(feed) == 100


def test_both_paths_agree():
    resident = Resident(arrays(), Shift(), seed=3, device=CPU, path="")
    other = workers(arrays(), Shift())
    same(resident.epoch(1, shares(100)), other.epoch(1, shares(100)))
    for left, right in zip(resident.plain(batch=30), other.plain(batch=30), strict=True):
        assert all(map(torch.equal, left, right))


def test_arrays_of_floats_and_without_labels():
    part = Arrays(np.full((5, 1, 4, 4), 0.5, np.float32), None)
    part.images.flags.writeable = False
    feed = Resident(part, Shift(), seed=0, device=CPU, path="")
    (batch,) = feed.epoch(0, [torch.arange(5)])
    assert (feed.labels, batch.labels.tolist()) == (None, [0] * 5)
    (batch,) = workers(part, Shift()).epoch(0, [torch.arange(5)])
    assert batch.labels.dtype == torch.int64


def test_batches_do_not_depend_on_the_number_of_workers(files):
    before = multiprocessing.active_children()
    expected = [list(workers(files, real()).epoch(epoch, shares(80))) for epoch in (0, 5)]
    assert [tuple(view.shape) for view in expected[0][0].views] == [
        (40, 3, s, s) for s in (8, 8, 6)
    ]
    assert not torch.equal(expected[0][0].views[0], expected[1][0].views[0])
    for count in (1, 2):
        feed = workers(files, real(), count)
        for epoch, batches in zip((0, 5), expected, strict=True):
            same(feed.epoch(epoch, shares(80)), batches)
        # The pool outlives an epoch, and the feed takes it along.
        assert len(set(multiprocessing.active_children()) - set(before)) == count
        del feed
        gc.collect()
        no_children(before)


def test_an_epoch_can_be_entered_anywhere(files):
    whole = list(workers(files, real()).epoch(4, shares(80, 10)))
    same(workers(files, real(), 1).epoch(4, shares(80, 10)[5:]), whole[5:])


def test_torchs_generator_is_left_alone(files):
    before = torch.random.get_rng_state()
    list(workers(files, real(), 1).epoch(0, shares(80)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_leaving_early_ends_the_workers_and_the_next_epoch_starts_new_ones(files):
    before = multiprocessing.active_children()
    feed = workers(files, real(), 2)
    running = feed.epoch(0, shares(80, 10))
    first = next(running)
    running.close()
    no_children(before)
    same([first], [next(feed.epoch(0, shares(80, 10)))])


def test_workers_outlive_the_signal_that_ends_a_group(files):
    before = multiprocessing.active_children()
    feed = workers(files, real(), 2)
    running = feed.epoch(0, shares(80, 10))
    batches = [next(running)]
    for worker in set(multiprocessing.active_children()) - set(before):
        os.kill(worker.pid, signal.SIGTERM)
    same([*batches, *running], workers(files, real()).epoch(0, shares(80, 10)))
    del feed, running
    gc.collect()
    no_children(before, seconds=10)


@pytest.mark.parametrize("count", [0, 1])
def test_a_damaged_image_is_named(files, tmp_path, count):
    before = multiprocessing.active_children()
    (tmp_path / "files" / "b" / "41.png").write_bytes(b"nothing")
    feed = workers(files, real(), count)
    with pytest.raises(DataError, match=r"^cannot decode 'b/41\.png' of .*; replace or remove it$"):
        list(feed.epoch(0, shares(80)))
    no_children(before)
    with pytest.raises(DataError, match=r"cannot decode 'b/41\.png'"):
        list(feed.plain())


def die(_i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_dies_is_told_of():
    before = multiprocessing.active_children()
    feed = workers(Files("set", ["a"], None, die), Shift(), 1)
    with pytest.raises(DataError, match="a worker process died while decoding images"):
        list(feed.epoch(0, [torch.tensor([0])]))
    no_children(before)


def test_a_defect_is_not_taken_for_bad_data(files):
    class Broken(Shift):
        def cut(self, image, draws):
            raise RuntimeError("a defect")

    for count in (0, 1):
        with pytest.raises(RuntimeError, match="a defect"):
            list(workers(files, Broken(), count).epoch(0, shares(80)))


def test_plain_gives_whole_images_in_order(files):
    feed, augment = workers(files, real(), 2), real()
    found = list(feed.plain(batch=30))
    assert [len(labels) for _, labels in found] == [30, 30, 20]
    images = torch.cat([images for images, _ in found])
    labels = torch.cat([labels for _, labels in found])
    assert labels.tolist() == files.labels.tolist()
    torch.testing.assert_close(images[7], augment.plain(files.decode(7)[None])[0])
    some = torch.tensor([70, 3, 3])
    ((chosen, their_labels),) = feed.plain(some)
    assert torch.equal(chosen, images[some])
    assert torch.equal(their_labels, labels[some])


# The choice of a path


def test_arrays_live_on_the_device():
    feed = make_feed(arrays(), Shift(), seed=0, device=CPU, workers=2)
    assert isinstance(feed, Resident)
    assert feed.path == "100 images of 4 x 4 (0 MB) live on cpu: augmented there"


def test_small_files_of_one_size_are_decoded_once(tmp_path):
    part = arrays(40)
    for i in range(40):
        path = tmp_path / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(part.images[i].transpose(1, 2, 0)).save(path)
    files = load_labelled(tmp_path).train
    feed = make_feed(files, real(), seed=3, device=CPU, workers=2)
    assert isinstance(feed, Resident)
    assert np.array_equal(feed.labels, files.labels)
    expected = Arrays(part.images[[*range(0, 40, 2), *range(1, 40, 2)]], files.labels)
    expected_feed = Resident(expected, real(), seed=3, device=CPU, path="")
    same(feed.epoch(0, shares(40)), expected_feed.epoch(0, shares(40)))

    # One that is neither the first nor the last, nor among those looked at beforehand.
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(tmp_path / "a" / "04.png")
    feed = make_feed(files, real(), seed=0, device=CPU, workers=0)
    assert isinstance(feed, Workers)
    assert feed.path.endswith("by this process and augmented on cpu: they are of several sizes")
    (tmp_path / "a" / "04.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot decode 'a/04\.png'"):
        make_feed(files, real(), seed=0, device=CPU, workers=2)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("_SMALL", 3, "larger than 3 pixels"), ("_CPU_BYTES", 10, "decoded, 0 MB is more than")],
)
def test_other_files_go_through_workers(tmp_path, monkeypatch, setting, value, reason):
    for i in range(3):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(module, setting, value)
    files = load_labelled(tmp_path).train
    feed = make_feed(files, Shift(), seed=0, device=CPU, workers=2)
    assert isinstance(feed, Workers)
    assert feed.path.startswith("3 images decoded and cropped by 2 worker processes and augmented")
    assert reason in feed.path


def test_an_augmentation_can_ask_for_workers():
    augment = Augment([AugmentConfig(rand_augment=9)], size=4, mean=(0.5,) * 3, std=(1.0,) * 3)
    feed = make_feed(arrays(), augment, seed=0, device=CPU, workers=0)
    assert isinstance(feed, Workers)
    assert augment.in_workers in feed.path
    (batch,) = feed.epoch(0, [torch.arange(5)])
    assert batch.views[0].shape == (5, 3, 4, 4)


def test_arrays_too_large_for_a_device_stay_on_the_host(monkeypatch):
    monkeypatch.setattr(module, "_room", lambda device: 100)
    feed = make_feed(arrays(), Shift(), seed=0, device=torch.device("meta"), workers=0)
    assert isinstance(feed, Workers)
    assert "0 MB is more than the 0 MB to be had on meta" in feed.path


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [0, 2])
def test_on_a_gpu(files, count):
    cuda = torch.device("cuda")
    feed = Workers(files, real(), seed=3, device=cuda, workers=count, path="")
    expected = list(workers(files, real()).epoch(0, shares(80)))
    for ours, theirs in zip(feed.epoch(0, shares(80)), expected, strict=True):
        assert ours.labels.device.type == "cuda"
        for a, b in zip(ours.views, theirs.views, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)
    small = make_feed(arrays(), real(), seed=3, device=cuda, workers=count)
    assert isinstance(small, Resident)
    reference = Resident(arrays(), real(), seed=3, device=CPU, path="")
    for ours, theirs in zip(
        small.epoch(0, shares(100)), reference.epoch(0, shares(100)), strict=True
    ):
        for a, b in zip(ours.views, theirs.views, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)
