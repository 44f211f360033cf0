from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vitprobe.errors import CheckpointError, VitprobeError
from vitprobe.models import load
from vitprobe.models.checkpoint import read_checkpoint
from vitprobe.models.inert import Inert, as_mapping

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(content: Any, path: Path, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@BOTH
def test_every_tensor_comes_back(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "view": base[1:3, ::2],
        "shared": base,
        "transposed": base.T,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.float16),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "uint16": torch.tensor([1, 2], dtype=torch.uint16),
    }
    read = read_checkpoint(save(content, tmp_path / "a.pth", zipped))
    assert read.container == ("torch zip" if zipped else "torch legacy")
    assert len(read.sha256) == 64
    for name, tensor in content.items():
        assert read.content[name].dtype == tensor.dtype
        assert torch.equal(read.content[name], tensor)


@BOTH
def test_objects_become_inert_and_keep_their_state(tmp_path: Path, zipped: bool) -> None:
    content = {
        "args": argparse.Namespace(model="deit_tiny_patch16_224", path=Path("x"), heads=3),
        "epoch": 7,
        "size": torch.Size([1, 2]),
    }
    read = read_checkpoint(save(content, tmp_path / "a.pth", zipped)).content
    assert isinstance(read["args"], Inert)
    assert as_mapping(read["args"])["heads"] == 3
    assert as_mapping(read["args"])["model"] == "deit_tiny_patch16_224"
    assert read["epoch"] == 7
    assert read["size"] == (1, 2)


@BOTH
def test_a_payload_does_not_run_while_the_weights_load(
    tmp_path: Path, tiny: Callable[..., torch.nn.Module], zipped: bool
) -> None:
    content = {"model": tiny().state_dict(), "args": Payload(tmp_path / "owned")}
    path = save(content, tmp_path / "evil.pth", zipped)
    model = load(path, heads=4)
    assert model.report is not None
    assert model.report.loaded_fraction == 1
    assert not (tmp_path / "owned").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="bare pickle"):
        load(path)
    assert not (tmp_path / "owned").exists()


def test_pickled_state_cannot_change_vitprobe_or_torch(tmp_path: Path) -> None:
    """BUILD on a resolved global would set attributes on it for the whole process."""
    attack = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00funcK\x01s\x86b"
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb\x86."
    )
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", attack)
    with pytest.raises(CheckpointError):
        load(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "func")
    assert dict.items


def test_a_tensor_cannot_reach_past_its_storage(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(4)}, tmp_path / "a.pth", True)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("/data.pkl"))
    assert b"K\x04\x85" in parts[pickled]
    parts[pickled] = parts[pickled].replace(b"K\x04\x85", b"K\x7f\x85")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="past its storage"):
        read_checkpoint(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"scripted/{name}", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.pth", b"", "is empty"),
        ("notes.txt", b"just some text", "is not a checkpoint"),
        ("notes.safetensors", b"just some text", "no whole safetensors file"),
        ("image.png", b"\x89PNG\r\n\x1a\n" + b"0" * 50, "is not a checkpoint"),
        ("pickle.pth", b"\x80\x02", "damaged or truncated"),
        ("half.zip", b"PK\x03\x04" + b"0" * 50, "truncated"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_zip_archives_missing_files_and_directories(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.jpg", b"0" * 1000)
    with pytest.raises(CheckpointError, match="not a checkpoint of torch"):
        load(path)
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a directory"):
        read_checkpoint(tmp_path)


@BOTH
def test_a_whole_module_is_refused(
    tmp_path: Path, tiny: Callable[..., torch.nn.Module], zipped: bool
) -> None:
    path = save(tiny(), tmp_path / "module.pth", zipped)
    with pytest.raises(CheckpointError, match="whole pickled object"):
        load(path)


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7), "fc.bias": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"no Vision Transformer.*conv1.weight") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_raise_one_sentence(
    tmp_path: Path, tiny: Callable[..., torch.nn.Module], kind: str, data: st.DataObject
) -> None:
    whole = tmp_path / f"whole.{kind}"
    if not whole.exists():
        tensors = tiny(depth=1).state_dict()
        if kind == "safetensors":
            save_file(tensors, whole)
        else:
            save({"model": tensors, "args": argparse.Namespace(heads=4)}, whole, kind == "zip")
    content = bytearray(whole.read_bytes())
    cut = data.draw(st.integers(0, len(content) - 1))
    damaged = tmp_path / f"damaged.{kind}"
    damaged.write_bytes(content[:cut])
    with pytest.raises(VitprobeError) as caught:
        load(damaged, heads=4)
    assert "\n" not in str(caught.value)

    for _ in range(3):
        content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(
            st.integers(0, 255)
        )
    damaged.write_bytes(content)
    with contextlib.suppress(VitprobeError):
        load(damaged, heads=4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_what_has_no_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=f"'{path}' is a device or a pipe"):
            load(path)


@pytest.mark.parametrize("name", ["a" * 5000, "null\0byte", "a/" * 3000])
@pytest.mark.parametrize("kind", ["", "run:", "init:./"])
def test_names_that_no_file_can_have(kind: str, name: str) -> None:
    with pytest.raises(VitprobeError):
        load(kind + name)


def test_dictionaries_without_end_are_refused(tmp_path: Path, tiny: Any) -> None:
    """A small file whose dictionaries, each held by many others, take ages to walk through."""
    content: dict[str, Any] = {"tensor": torch.zeros(1)}
    for _ in range(4):
        content = {f"key{number}": content for number in range(300)}
    path = save(content, tmp_path / "nested.pth", True)
    with pytest.raises(CheckpointError, match=f"'{path}' nests more than 10,000 dictionaries"):
        load(path)
    content = dict(tiny().state_dict())
    content["itself"] = content
    load(save(content, path, True), heads=4)
