from __future__ import annotations

import os
import random
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitprobe.data.blocks import View, resize
from vitprobe.data.images import images
from vitprobe.errors import DataError

VIEW = View(3, 8, 8)


@pytest.fixture
def folder(tmp_path):
    """Twelve distinct images in two classes, and a file that is none."""
    root = tmp_path / "set"
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / ("cat" if i < 6 else "dog") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 14, 3), dtype=np.uint8)).save(path)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def read(source, size=128, views=(VIEW,), **options):
    found = images(source, **options)
    return found, list(found.blocks(views, size))


def pixels(source, **options):
    return torch.cat([block.views[VIEW] for block in read(source, **options)[1]])


def test_folder_zip_tar_and_list_agree(folder, tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in random.Random(1).sample(sorted(folder.rglob("*.png")), 13):
            zipped.write(path, path.relative_to(tmp_path))
    subprocess.run(["tar", "cf", tmp_path / "set.tar", "-C", tmp_path, "set"], check=True)
    files = sorted(path for path in folder.rglob("*.png") if not path.name.startswith("."))
    listing = tmp_path / "files.txt"
    listing.write_text("\n".join(os.path.relpath(path, tmp_path) for path in files[::-1]))
    expected, _ = read(folder, limit=7)
    wanted = pixels(folder, limit=7)
    for source in (archive, tmp_path / "set.tar", files, [str(f) for f in files], listing):
        found, _ = read(source, limit=7)
        assert found.used == expected.used
        assert found.sha256 == expected.sha256
        assert torch.equal(pixels(source, limit=7), wanted)


def tar(path, files, below):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.relative_to(below).as_posix())
    return path


def test_shards_of_the_same_files_agree_with_their_folder(folder, tmp_path):
    files = list(sorted(folder.glob("*/*.png"))[::-1])
    shards = [tar(tmp_path / "shards" / f"val-{i:03}.tar", files[i::3], tmp_path) for i in range(3)]
    (tmp_path / "shards" / "README.md").write_text("no image")
    listing = tmp_path / "shards.txt"
    listing.write_text("shards/val-002.tar\nshards/val-000.tar\nshards/val-001.tar\n")
    expected, _ = read(folder, limit=7)
    wanted = pixels(folder, limit=7)
    pattern = tmp_path / "shards" / "val-{000..002}.tar"
    for source in (pattern, str(pattern), tmp_path / "shards", shards, shards[::-1], listing):
        found, _ = read(source, limit=7)
        assert (found.used, found.sha256) == (expected.used, expected.sha256)
        assert torch.equal(pixels(source, limit=7), wanted)


def test_shards_that_number_their_own_files_are_part_of_the_names(folder, tmp_path):
    for number, kind in enumerate(("cat", "dog")):
        files = sorted((folder / kind).glob("*.png"))
        for i, file in enumerate(files):
            file.rename(file.with_name(f"{i}.png"))
        files = sorted((folder / kind).glob("*.png"))
        tar(tmp_path / "shards" / f"{number}.tar", files, folder / kind)
    found, _ = read(tmp_path / "shards")
    assert sorted(found.used) == [f"{shard}.tar/{i}.png" for shard in range(2) for i in range(6)]


def test_shards_that_cannot_be_read(folder, tmp_path):
    files = sorted(folder.glob("*/*.png"))
    good = tar(tmp_path / "shards" / "0.tar", files[:3], folder)
    with pytest.raises(DataError, match=r"no tar shard '.*/1.tar', which '.*\{0..1\}.tar' names"):
        images(tmp_path / "shards" / "{0..1}.tar")
    with pytest.raises(DataError, match="names no tar shards"):
        images(tmp_path / "shards" / "{1..0}.tar")
    with pytest.raises(DataError, match=r"lists tars, such as .*, and other files, such as"):
        images([good, files[0]])
    with pytest.raises(DataError, match="is listed twice"):
        images([good, good])
    damaged = tmp_path / "shards" / "1.tar"
    damaged.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot read '.*1.tar' as an uncompressed tar"):
        images([good, damaged])
    damaged.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"'.*1.tar' is no source of images"):
        images([good, damaged])


def test_order_is_a_seeded_permutation_and_a_limit_its_beginning(folder):
    everything, _ = read(folder)
    assert sorted(everything.used) == sorted(
        f"{'cat' if i < 6 else 'dog'}/{i:02}.png" for i in range(12)
    )
    assert everything.used != sorted(everything.used)
    assert read(folder, limit=5)[0].used == everything.used[:5]
    other, _ = read(folder, seed=1)
    assert other.used != everything.used
    assert other.sha256 != everything.sha256


def test_an_undecodable_image_is_named_and_replaced(folder):
    everything, _ = read(folder)
    bad = everything.used[2]
    path = folder / bad
    path.write_bytes(path.read_bytes()[:60])
    found, _ = read(folder, limit=5)
    assert found.undecodable == [bad]
    assert found.used == [name for name in everything.used if name != bad][:5]


def test_damaged_and_encrypted_members_are_undecodable(folder, tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in sorted(folder.glob("*/*.png")):
            zipped.write(path, path.relative_to(folder))
    with zipfile.ZipFile(archive) as zipped:
        damaged, encrypted = zipped.infolist()[:2]
    content = bytearray(archive.read_bytes())
    start = damaged.header_offset + 30 + len(damaged.filename)
    content[start : start + 40] = b"\xff" * 40
    # The flag that says a member is encrypted, in the central directory.
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[entry + 8] |= 1
    archive.write_bytes(content)
    found, _ = read(archive)
    assert sorted(found.undecodable) == [damaged.filename, encrypted.filename]
    assert len(found.used) == 10


def test_a_tar_cut_short(folder, tmp_path):
    subprocess.run(["tar", "cf", tmp_path / "set.tar", "-C", folder, "cat"], check=True)
    content = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=r"set.tar"):
        read(tmp_path / "set.tar")


def test_files_that_are_listed_are_read_whatever_their_ending(folder):
    odd = folder / "cat" / "00.picture"
    (folder / "cat" / "00.png").rename(odd)
    found, _ = read([odd, folder / "cat" / "01.png"])
    assert sorted(found.used) == ["00.picture", "01.png"]


def test_absolute_and_relative_members(folder, tmp_path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.write(folder / "cat" / "00.png", "/a/00.png")
        zipped.write(folder / "cat" / "01.png", "b/01.png")
    assert len(read(archive)[0].used) == 2


def test_grey_floats_beyond_one_are_undecodable(tmp_path):
    for name, top in (("fine", 1), ("wrong", 255)):
        values = np.linspace(0, top, 81, dtype=np.float32).reshape(9, 9)
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
    found, _ = read(tmp_path)
    assert (found.used, found.undecodable) == (["fine.tif"], ["wrong.tif"])


def test_no_decodable_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"not a picture")
    with pytest.raises(
        DataError, match=r"none of the images in .* can be decoded, such as '\d.jpg"
    ):
        read(tmp_path)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 200), size=st.sampled_from([4, 16, 32, 50]))
def test_blocks(count, size):
    values = (np.arange(count) / 1000).astype(np.float32)
    array = np.broadcast_to(values[:, None, None, None], (count, 1, 2, 2)).copy()
    found, blocks = read(array, size, views=[View(1, 2, 2)])
    sizes = [len(block.names) for block in blocks]
    assert [block.first for block in blocks] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert sum(sizes) == count
    assert all(n == size for n in sizes[:-1])
    tail = min(32, size)
    assert tail <= sizes[-1] < size + tail or count < tail
    seen = torch.cat([block.views[View(1, 2, 2)][:, 0, 0, 0] for block in blocks])
    assert [int(name) for name in found.used] == (seen * 1000).round().int().tolist()


def test_a_file_and_its_array_give_the_same_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    square = torch.from_numpy(array[:, 5:25].copy()).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(pixels(tmp_path / "x.png"), pixels(square))


def test_resizing_keeps_constants_and_ranges():
    grey = torch.full((1, 50, 50), 0.25)
    assert torch.allclose(resize(grey, View(3, 8, 6)), torch.full((3, 8, 6), 0.25))
    red = torch.zeros(3, 4, 4)
    red[0] = 1
    assert torch.allclose(resize(red, View(1, 4, 4)), torch.full((1, 4, 4), 0.299))
    edges = (torch.rand(3, 40, 40) > 0.5).float()
    assert resize(edges, VIEW).min() >= 0
    assert resize(edges, VIEW).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_colour_modes(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 32768, np.uint16))
    else:
        image = Image.new("RGB", (9, 9), (128, 128, 128)).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    values = pixels(path)
    assert values.shape == (1, 3, 8, 8)
    if mode not in ("1", "P", "CMYK"):
        assert torch.allclose(values, torch.tensor(128 / 255), atol=3e-3)


def test_data_loader(folder):
    data = torch.rand(10, 3, 8, 8)
    plain = torch.utils.data.DataLoader(data, batch_size=4)
    labelled = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data, torch.arange(10)), batch_size=3
    )
    assert torch.equal(pixels(plain), data)
    assert torch.equal(pixels(labelled, limit=5), data[:5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "there is no such file or folder"),
        (torch.rand(4, 2, 8, 8), r"images are \(n, 1 or 3 channels, height, width\)"),
        (torch.rand(4, 3, 8, 9), "crop them to the square"),
        (torch.rand(4, 3, 8, 8) * 255, "give floats in \\[0, 1\\], not normalised"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "give floats in"),
        (torch.full((4, 3, 8, 8), torch.nan), "give floats in"),
        (42, "cannot read images from int"),
        (torch.zeros(0, 3, 8, 8), "gives no images"),
        (["missing.png"], "no image file"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(DataError, match=message):
        read(source)


def test_more_refusals(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no image files"):
        images(empty)
    (tmp_path / "x.bin").write_bytes(b"\0\1")
    with pytest.raises(DataError, match="is no source of images"):
        images(tmp_path / "x.bin")
    with pytest.raises(DataError, match="a limit of 0 images leaves none"):
        images(folder, limit=0)
    with pytest.raises(DataError, match="a seed of -1"):
        images(folder, seed=-1)
    with pytest.raises(DataError, match="have their limit and seed already"):
        images(images(folder), limit=3)
    with pytest.raises(DataError, match="a seed has no meaning for it"):
        images(torch.utils.data.DataLoader(torch.rand(4, 3, 8, 8)), seed=1)
    with pytest.raises(DataError, match="is listed twice"):
        images([folder / "cat" / "00.png"] * 2)
