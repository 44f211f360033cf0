"""Where images, masks and boxes end up in a square."""

from __future__ import annotations

import pytest
import torch

from vitprobe.errors import RecipeError
from vitprobe.evaluation.dense.placing import JitterConfig, Placing, around, jittered, whole
from vitprobe.training.randomness import Draws

GREY = torch.full((3,), 128, dtype=torch.uint8)


def draws(i, epoch=0):
    return Draws(0, epoch, torch.tensor([i]))


def test_whole_images_fit_and_come_back():
    placing = whole((30, 60), 64)
    assert placing == (32, 64, 0, 0, False)
    boxes = torch.tensor([[3.0, 4.0, 50.0, 25.0], [0.0, 0.0, 60.0, 30.0]])
    moved = placing.boxes(boxes, (30, 60), 64)
    torch.testing.assert_close(placing.back(moved, (30, 60)), boxes)
    beyond = placing.back(torch.tensor([[-5.0, -5.0, 99.0, 99.0]]), (30, 60))
    assert beyond.tolist() == [[0, 0, 60, 30]]
    image = torch.randint(0, 255, (3, 30, 60), dtype=torch.uint8)
    placed = placing.pixels(image, 64, GREY)
    assert placed.shape == (3, 64, 64)
    assert (placed[:, 32:] == 128).all()
    assert torch.equal(whole((64, 64), 64).pixels(placed, 64, GREY), placed)


@pytest.mark.parametrize(
    "placing",
    [
        Placing(64, 64),
        Placing(64, 64, flip=True),
        Placing(100, 100, 20, 30, True),
        Placing(40, 40),
        Placing(80, 40, 10, 0, True),
    ],
)
def test_boxes_go_where_their_masks_go(placing):
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 20:40, 28:52] = 1
    image = torch.stack([mask[0] * 200] * 3)
    moved = placing.boxes(around(mask), (64, 64), 64)
    seen = around(placing.masks(mask, 64))
    torch.testing.assert_close(moved, seen, atol=1.0, rtol=0)
    bright = placing.pixels(image, 64, torch.zeros(3, dtype=torch.uint8))[0] > 100
    torch.testing.assert_close(around(bright[None]), seen, atol=1.0, rtol=0)


def test_what_is_cut_away_leaves_an_empty_mask():
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 2:6, 2:6] = 1
    cut = Placing(128, 128, 60, 60).masks(mask, 64)
    assert not cut.any()
    assert around(cut).tolist() == [[0, 0, 0, 0]]
    assert Placing(64, 64).masks(mask[:0], 64).shape == (0, 64, 64)
    padded = Placing(32, 32).masks(mask, 64, fill=255)
    assert (padded[0, 32:] == 255).all()


def test_jitter_spans_its_range_and_depends_on_the_draws_alone():
    config = JitterConfig((0.5, 2.0))
    placings = [jittered((64, 64), 64, config, draws(i)) for i in range(200)]
    heights = torch.tensor([float(placing.height) for placing in placings])
    assert 32 <= heights.min() < 36
    assert 124 < heights.max() <= 128
    assert heights.mean() == pytest.approx(80, abs=5)
    assert 0.4 < sum(placing.flip for placing in placings) / 200 < 0.6
    assert all(placing.top <= max(0, placing.height - 64) for placing in placings)
    assert max(placing.top for placing in placings) > 40
    assert jittered((64, 64), 64, config, draws(7)) == placings[7]
    assert jittered((64, 64), 64, config, draws(7, epoch=1)) != placings[7]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"scale": (0.0, 1.0)}, "jitter.scale"), ({"scale": (2.0, 1.0)}, "jitter.scale"),
     ({"flip": 1.5}, "jitter.flip")],
)  # fmt: skip
def test_jitter_that_cannot_be(wrong, words):
    with pytest.raises(RecipeError, match=words):
        JitterConfig(**wrong)
