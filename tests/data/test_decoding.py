"""Every kind of pixel against what was drawn, and damaged files."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vitprobe.data import decoding
from vitprobe.data.decoding import decode_image
from vitprobe.data.parts import Files
from vitprobe.errors import DataError


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed=0, height=20, width=30):
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def pixels(image):
    values = torch.from_numpy(np.array(image))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_files_give_the_pixels_that_were_drawn(mode, channels):
    image = picture().convert(mode)
    decoded = decode_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), channels)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, pixels(image.convert("RGB" if channels == 3 else "L")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_gives_what_pillow_decodes(mode, channels):
    content = encoded(picture().convert(mode), "JPEG")
    expected = pixels(Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L"))
    assert torch.equal(decode_image(content, channels), expected)


def test_jpeg_without_torchvisions_decoder(monkeypatch):
    content = encoded(picture(), "JPEG")
    ours = decode_image(content, 3)
    monkeypatch.setattr(decoding, "_jpeg_decoder", lambda: None)
    assert torch.equal(decode_image(content, 3), ours)


def test_sixteen_bits_and_floats_keep_their_range():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for content in (
        encoded(Image.fromarray(values), "PNG"),
        encoded(Image.fromarray((values / 65535).astype(np.float32)), "TIFF"),
    ):
        assert decode_image(content, 1).tolist() == [[[0, 1, 128, 255]]]
        assert decode_image(content, 3).shape == (3, 1, 4)
    with pytest.raises(ValueError, match="grey values beyond"):
        decode_image(encoded(Image.fromarray(np.full((1, 1), 2.0, np.float32)), "TIFF"), 1)


def test_an_orientation_is_not_applied():
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        assert decode_image(encoded(image, kind, exif=exif), 3).shape == (3, 20, 30)


def damaged():
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    flipped = bytearray(png)
    flipped[300] ^= 255
    return {
        "empty": b"",
        "text": b"not a picture",
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "start of a jpeg": jpeg[:10],
        "half a png": png[: len(png) // 2],
        "a flipped png": bytes(flipped),
    }


@pytest.mark.parametrize("kind", damaged())
@pytest.mark.parametrize("channels", [1, 3])
def test_damaged_files_are_named(kind, channels):
    files = Files("set.zip", ["cat/1.png"], None, lambda _: damaged()[kind], channels)
    with pytest.raises(DataError, match=r"cannot decode 'cat/1.png' of 'set.zip': .*; replace or"):
        files.decode(0)


def test_a_name_that_is_no_text_can_be_printed():
    files = Files("set", ["\udcff.png"], None, lambda _: b"")
    with pytest.raises(DataError, match=r"'\\xff.png'") as caught:
        files.decode(0)
    str(caught.value).encode()
