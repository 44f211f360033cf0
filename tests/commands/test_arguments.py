"""What is told of arguments before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitprobe.commands.arguments import check_images, spec_of
from vitprobe.errors import CheckpointError, DataError


def test_files_that_are_not_there(tmp_path):
    there = tmp_path / "mae.pth"
    there.touch()
    assert spec_of(f"{there},heads=3").target == str(there)
    assert spec_of("timm:vit_tiny_patch16_224").kind == "timm"
    for text in (f"{tmp_path}/other.pth", "a\0b.pth"):
        with pytest.raises(CheckpointError, match="There is no checkpoint file"):
            spec_of(text)


def test_images_that_are_not_there(tmp_path):
    check_images(tmp_path)
    check_images(tmp_path / "val-{000..003}.tar")  # which shards there are is seen later
    with pytest.raises(DataError, match=r"no images at .*: there is no such file or folder"):
        check_images(tmp_path / "none")


def test_nothing_heavy_is_imported_for_it():
    program = (
        "import sys; import vitprobe.cli; from vitprobe.commands.arguments import spec_of; "
        "spec_of('timm:x'); print(sorted({'torch', 'numpy', 'xarray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
