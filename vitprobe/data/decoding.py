"""Encoded images to pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode_image(content: bytes, channels: int) -> Tensor:
    """The image in `content`: (channels, height, width) uint8.

    JPEG to RGB, most of what there is, goes to torchvision's decoder, one and a half times as fast
    as Pillow's with the same pixels; the rest, and what that one refuses, to Pillow. torchvision's
    PNG decoder is left alone, as damaged data can end the process in it.

    Raises whatever Pillow makes of bytes that are no image.
    """
    decode_jpeg = _jpeg_decoder() if channels == 3 and content[:2] == b"\xff\xd8" else None
    if decode_jpeg is not None:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        except RuntimeError:
            pass
    with Image.open(io.BytesIO(content)) as image:
        pixels = _pixels(image, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder of JPEG to RGB; None where there is none: it is to be removed."""
    import torchvision.io

    # The operation itself, as the function around it warns of its removal at every call.
    decode = getattr(torch.ops.image, "decode_jpeg", None)
    rgb = getattr(torchvision.io, "ImageReadMode", None)
    if decode is None or rgb is None:
        return None
    return lambda content: decode(content, rgb.RGB.value, False)


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """(height, width, channels) uint8."""
    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion cuts 16 bits off at 255.
        values = np.asarray(image, dtype=np.float32) / (65535 if image.mode[0] == "I" else 1)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("grey values beyond what 16 bits or floats in [0, 1] can hold")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    pixels = np.array(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels
