"""Which images have labels: the same share of every class, by seed."""

from __future__ import annotations

import numpy as np
import pytest

from vitprobe.errors import DataError
from vitprobe.evaluation.subsets import held_out, labelled_subset

LABELS = np.repeat([2, 0, 1], [100, 50, 3])


@pytest.mark.parametrize(("share", "counts"), [(0.1, [5, 1, 10]), (0.001, [1, 1, 1])])
def test_every_class_gives_its_share_and_at_least_one(share, counts):
    chosen = labelled_subset(LABELS, share, seed=0)
    assert np.bincount(LABELS[chosen]).tolist() == counts
    assert (np.diff(chosen) > 0).all()


def test_the_seed_decides_and_all_is_all():
    assert (labelled_subset(LABELS, 0.1, 0) == labelled_subset(LABELS, 0.1, 0)).all()
    assert (labelled_subset(LABELS, 0.1, 0) != labelled_subset(LABELS, 0.1, 1)).any()
    assert (labelled_subset(LABELS, 1.0, 5) == np.arange(len(LABELS))).all()


def test_a_smaller_share_is_part_of_a_larger_one():
    small, large = (set(labelled_subset(LABELS, share, 3)) for share in (0.05, 0.3))
    assert small < large


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(DataError, match="give one in"):
        labelled_subset(LABELS, share, 0)


def test_what_is_held_out_leaves_an_image_of_every_class():
    fitted, kept = held_out(np.array([0, 1, 1, *[2] * 10]), 0.2, seed=0)
    assert sorted([*fitted, *kept]) == list(range(13))
    labels = np.array([0, 1, 1, *[2] * 10])
    assert np.bincount(labels[fitted]).tolist() == [1, 1, 8]
    assert np.bincount(labels[kept]).tolist() == [0, 1, 2]
