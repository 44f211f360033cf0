"""Blocks shared between processes, here threads: the same as those of one process."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teams_for_tests import in_threads

from vitprobe.data.blocks import View
from vitprobe.data.images import Images, images
from vitprobe.errors import DataError

VIEW = View(1, 2, 2)


def numbered(count, bad=(), limit=None, decoded=None):
    """Images whose pixels say which they are; of some the bytes are damaged."""

    def at(position):
        if position >= count:
            return None

        def read():
            if decoded is not None:
                decoded.append(position)
            if position in bad:
                raise ValueError("damaged")
            return str(position).encode(), torch.full((1, 2, 2), position / 1000)

        return f"{position:03}", read

    return Images("numbers", [f"{i:03}" for i in range(count)], lambda: at, limit, 0)


def seen(block):
    return [round(1000 * float(value)) for value in block.views[VIEW][:, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shared_blocks_are_those_of_one_process(data):
    count = data.draw(st.integers(1, 300))
    size = data.draw(st.sampled_from([4, 16, 32, 50]))
    ranks = data.draw(st.integers(1, 4))
    limit = data.draw(st.none() | st.integers(1, 300))
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=min(12, count - 1)))
    alone = numbered(count, bad, limit)
    whole = list(alone.blocks([VIEW], size))
    decoded = []

    def share(team):
        found = numbered(count, bad, limit, decoded)
        return found, list(found.blocks([VIEW], size, workers=1, team=team))

    shared = in_threads(ranks, share)
    for found, _ in shared:
        assert (found.used, found.undecodable) == (alone.used, alone.undecodable)
        assert (found.sha256, found.digests) == (alone.sha256, alone.digests)
    for number, block in enumerate(whole):
        owned = shared[number % ranks][1][number // ranks]
        assert (owned.first, owned.names) == (block.first, block.names)
        assert owned.digests == block.digests
        assert torch.equal(owned.views[VIEW], block.views[VIEW])
        assert seen(block) == [int(name) for name in block.names]
    assert sum(len(blocks) for _, blocks in shared) == len(whole)
    if limit is None:
        assert set(decoded) == set(range(count))
    if not alone.undecodable:
        assert max(Counter(decoded).values()) == 1


def test_an_undecodable_image_moves_few_others():
    decoded = []

    def share(team):
        return list(numbered(640, [3], None, decoded).blocks([VIEW], 32, workers=1, team=team))

    in_threads(4, share)
    # One moves to each of the first round's blocks but for the last, and to that from the next.
    assert 640 < len(decoded) <= 640 + 4


def test_no_image_is_decoded_far_ahead():
    decoded = []
    blocks = numbered(1000, decoded=decoded).blocks([VIEW], 50, workers=1)
    next(blocks)
    blocks.close()
    assert len(decoded) <= 2 * 50 + 32


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("count", [20, 32, 70, 64, 97])
def test_a_loader_is_shared_by_reading_it_in_every_process(ranks, count):
    tensors = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(tensors, batch_size=7)
    alone = images(loader)
    whole = list(alone.blocks([VIEW], 16))

    def share(team):
        found = images(torch.utils.data.DataLoader(tensors, batch_size=7))
        return found, list(found.blocks([VIEW], 16, team=team))

    shared = in_threads(ranks, share)
    for number, block in enumerate(whole):
        owned = shared[number % ranks][1][number // ranks]
        assert (owned.names, owned.first) == (block.names, block.first)
        assert torch.equal(owned.views[VIEW], block.views[VIEW])
    assert sum(len(blocks) for _, blocks in shared) == len(whole)
    assert {found.sha256 for found, _ in shared} == {alone.sha256}


def test_processes_that_are_given_different_images():
    def other_names(team):
        return list(numbered(40 + team.rank).blocks([VIEW], 16, team=team))

    with pytest.raises(DataError, match=r"process 1 .* other images than process 0, in 'numbers'"):
        in_threads(2, other_names)

    def other_order(team):
        loader = torch.utils.data.DataLoader(torch.full((40, 1, 2, 2), team.rank / 2))
        return list(images(loader).blocks([VIEW], 16, team=team))

    with pytest.raises(DataError, match="let the DataLoader give all of them the same ones"):
        in_threads(2, other_order)

    def other_contents(team):
        """Image 3 is damaged, and 32, which then moves, in the first process alone."""
        return list(numbered(80, [3, 32] if team.rank == 0 else [3]).blocks([VIEW], 32, team=team))

    with pytest.raises(DataError, match="'032' is not the same in all processes"):
        in_threads(2, other_contents)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_pass_goes_on_behind_the_blocks_that_are_done(data):
    count = data.draw(st.integers(1, 200))
    size = data.draw(st.sampled_from([4, 16, 50]))
    ranks = data.draw(st.integers(1, 3))
    limit = data.draw(st.none() | st.integers(1, 200))
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=min(8, count - 1)))
    alone = numbered(count, bad, limit)
    whole = list(alone.blocks([VIEW], size))
    kept = data.draw(st.integers(0, len(whole)))
    done = [pair for block in whole[:kept] for pair in zip(block.names, block.digests, strict=True)]
    decoded = []

    def go_on(team):
        found = numbered(count, bad, limit, decoded)
        return found, list(found.blocks([VIEW], size, workers=1, done=done, team=team))

    shared = in_threads(ranks, go_on)
    blocks = sorted((b for _, found in shared for b in found), key=lambda block: block.first)
    assert [(b.first, b.names) for b in blocks] == [(b.first, b.names) for b in whole[kept:]]
    assert all(seen(block) == [int(name) for name in block.names] for block in blocks)
    for found, _ in shared:
        assert (found.used, found.undecodable) == (alone.used, alone.undecodable)
        assert found.sha256 == alone.sha256
    # The last one alone is looked at again.
    assert {f"{position:03}" for position in decoded} & {name for name, _ in done[:-1]} == set()


def test_what_is_done_of_other_images():
    done = [("other", sha256(b"0").digest())]
    with pytest.raises(DataError, match=r"'other', which an earlier pass has used, is not where"):
        list(numbered(20).blocks([VIEW], 4, done=done))


def test_what_is_done_is_whole_blocks():
    alone = numbered(80)
    list(alone.blocks([VIEW], 32))
    done = list(zip(alone.used, alone.digests, strict=True))
    assert [block.first for block in numbered(80).blocks([VIEW], 32, done=done[:32])] == [32]
    assert not list(numbered(80).blocks([VIEW], 32, done=done))
    for part in (done[:64], done[:40]):
        with pytest.raises(DataError, match="which these 80 are not divided into"):
            list(numbered(80).blocks([VIEW], 32, done=part))


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_that_no_model_runs_on_are_decoded_once(ranks):
    decoded = []

    def share(team):
        return list(numbered(80, decoded=decoded).blocks([], 16, workers=1, team=team))

    (whole, *_) = in_threads(ranks, share)
    assert whole[0].digests
    assert sorted(decoded) == list(range(80))


def test_nothing_can_be_decoded_anywhere():
    def share(team):
        return list(numbered(50, range(50)).blocks([VIEW], 16, team=team))

    with pytest.raises(DataError, match="none of the images in 'numbers' can be decoded"):
        in_threads(2, share)


def test_memory_that_runs_out_is_no_damaged_image():
    found = numbered(3)

    def at(position):
        def read():
            raise MemoryError

        return "x", read

    with pytest.raises(MemoryError):
        list(replace(found, _open=lambda: at).blocks([VIEW], 4))
