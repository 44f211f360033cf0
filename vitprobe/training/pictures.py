"""Pictures of what a method does, for a glance while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitprobe.errors import DataError
from vitprobe.files import replacing

# Pixels: least side of a tile, space between tiles, height of letters.
_TILE, _GAP, _LETTERS = 96, 2, 14
_PAPER, _INK = "white", "#24292f"


def save_grid(
    rows: Tensor,
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    titles: Sequence[str] = (),
) -> None:
    """Write images (rows, n, c, h, w) as one PNG: n tiles a row, the same image in every row.

    rows: normalised; c is 1 or 3. Values outside black to white are clamped.
    mean, std: per channel, of images in [0, 1]; undone here.
    titles: of the rows, written to their left; none by default.

    Small images are enlarged by a whole factor, pixel by pixel, to at least 96 pixels a side.

    Raises DataError for another shape or number of titles, and ResultError where the picture cannot
    be written; the one before is then intact.
    """
    if rows.ndim != 5 or 0 in rows.shape or rows.shape[2] not in (1, 3):
        raise DataError(
            "A picture needs (rows, images, channels, height, width) with 1 or 3 channels, not "
            f"{tuple(rows.shape)}."
        )
    if titles and len(titles) != len(rows):
        raise DataError(f"A picture of {len(rows)} rows has {len(titles)} titles; give one a row.")
    tiles = _to_bytes(rows.detach().cpu().float(), mean, std)
    height, width = tiles.shape[2:4]
    factor = math.ceil(_TILE / min(height, width))
    font = ImageFont.load_default(_LETTERS)
    margin = max((math.ceil(font.getlength(title)) + 4 * _GAP for title in titles), default=0)
    down, right = factor * height + _GAP, factor * width + _GAP
    picture = Image.new(
        "RGB", (margin + tiles.shape[1] * right - _GAP, len(tiles) * down - _GAP), _PAPER
    )
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            image = Image.fromarray(tile.numpy()).resize(
                (factor * width, factor * height), Image.Resampling.NEAREST
            )
            picture.paste(image, (margin + j * right, i * down))
    pen = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        place = (_GAP, i * down + factor * height / 2)
        pen.text(place, title, fill=_INK, font=font, anchor="lm")
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def _to_bytes(rows: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(rows, n, c, h, w) normalised → (rows, n, h, w, 3) uint8."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    levels = (rows * scale + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.movedim(2, -1).expand(-1, -1, -1, -1, 3).contiguous()
