"""The picture grid: every pixel where it belongs, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe.errors import DataError, ResultError
from vitprobe.training.pictures import save_grid


def grid(path: Path, rows: torch.Tensor, **options: object) -> np.ndarray:
    channels = rows.shape[2]
    save_grid(rows, path, **{"mean": [0.5] * channels, "std": [0.25] * channels, **options})
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_in_its_place_and_its_own_colours(tmp_path: Path, channels: int) -> None:
    levels = torch.randint(256, (2, 3, channels, 8, 12)).float()
    pixels = grid(tmp_path / "grid.png", (levels / 255 - 0.5) / 0.25)
    # 96 / 8 = 12 times as large, with 2 pixels of paper between.
    assert pixels.shape == (2 * 96 + 2, 3 * 144 + 2 * 2, 3)
    for i in range(2):
        for j in range(3):
            tile = pixels[i * 98 : i * 98 + 96, j * 146 : j * 146 + 144]
            expected = levels[i, j].permute(1, 2, 0).expand(-1, -1, 3).numpy()
            np.testing.assert_array_equal(tile, expected.repeat(12, axis=0).repeat(12, axis=1))
    assert (pixels[96:98] == 255).all()


@pytest.mark.parametrize(("side", "shown"), [(28, 112), (95, 190), (96, 96), (224, 224)])
def test_small_images_are_enlarged_by_a_whole_factor(tmp_path: Path, side: int, shown: int) -> None:
    assert grid(tmp_path / "grid.png", torch.zeros(1, 1, 1, side, side)).shape == (shown, shown, 3)


def test_what_lies_beyond_black_and_white_is_clamped(tmp_path: Path) -> None:
    pixels = grid(tmp_path / "grid.png", torch.tensor([-50.0, 50.0]).view(1, 2, 1, 1, 1))
    assert (pixels[:, :96] == 0).all()
    assert (pixels[:, -96:] == 255).all()


def test_titles_stand_left_of_their_rows(tmp_path: Path) -> None:
    rows = torch.zeros(2, 2, 1, 96, 96)
    bare = grid(tmp_path / "bare.png", rows)
    titled = grid(tmp_path / "titled.png", rows, titles=["original", "reconstruction"])
    margin = titled.shape[1] - bare.shape[1]
    assert margin > 0
    np.testing.assert_array_equal(titled[:, margin:], bare)
    assert all((titled[i * 98 : i * 98 + 96, :margin] < 128).any() for i in (0, 1))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 2, 8, 8), (0, 1, 1, 8, 8)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"1 or 3 channels, not \("):
        save_grid(torch.zeros(shape), tmp_path / "grid.png", mean=[0.5], std=[0.5])


def test_a_title_is_needed_for_every_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 rows has 1 titles"):
        grid(tmp_path / "grid.png", torch.zeros(2, 1, 1, 8, 8), titles=["original"])


def test_an_earlier_picture_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    grid(path, torch.zeros(1, 1, 1, 8, 8))
    assert grid(path, torch.zeros(1, 2, 1, 8, 8)).shape == (96, 194, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]
    with pytest.raises(ResultError, match="there is no folder"):
        grid(tmp_path / "nowhere" / "grid.png", torch.zeros(1, 1, 1, 8, 8))
