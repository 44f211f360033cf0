from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitprobe.errors import CheckpointError
from vitprobe.models import load
from vitprobe.models.folders import folder_sha256, read_folder, read_saved

Tiny = Callable[..., nn.Module]


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Two shards and their index, as transformers writes them; which tensor is where."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if places[key] == name}, folder / name)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_whole_weights_and_shards_hold_the_same(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    save_shards(tmp_path, tensors)
    shards = read_folder(tmp_path)
    assert shards.container == "folder"
    torch.testing.assert_close(shards.content["model"], dict(tensors), rtol=0, atol=0)
    assert shards.sha256 == folder_sha256(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    whole = read_folder(tmp_path)
    torch.testing.assert_close(whole.content["model"], dict(tensors), rtol=0, atol=0)
    expected = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert whole.sha256 == expected == folder_sha256(tmp_path)


def test_shards_load_as_a_model(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    save_shards(tmp_path, tensors)
    model = load(tmp_path, heads=4)
    torch.testing.assert_close(model.module.state_dict(), tensors, rtol=0, atol=0)
    assert model.name == tmp_path.name


def test_configs_come_along(tmp_path: Path, tiny: Tiny) -> None:
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_heads": 8}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    content = read_folder(tmp_path).content
    assert content["config"] == {"num_heads": 8}
    assert content["preprocessor_config"] == {"image_mean": [0, 0, 0]}
    model = load(tmp_path)
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (8, "config")


def test_only_the_weights_of_a_folder_belong_to_its_config(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "config.json").write_text('{"num_heads": 8}')
    for name in ("pytorch_model.bin", "other.pth"):
        torch.save(tiny().state_dict(), tmp_path / name)
    assert read_saved(tmp_path / "pytorch_model.bin").container == "folder"
    assert read_saved(tmp_path / "other.pth").container == "torch zip"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory without weights") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "places",
    [
        None,
        {},
        [],
        {"a": 3},
        {"a": ""},
        {"a": ".."},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, places: Any) -> None:
    write_index(tmp_path, places)
    with pytest.raises(CheckpointError, match="does not name the shard of each tensor"):
        read_folder(tmp_path)


def test_missing_and_wrong_shards(tmp_path: Path, tiny: Tiny) -> None:
    places = save_shards(tmp_path, tiny().state_dict())
    swapped = dict(zip(places, reversed(places.values()), strict=True))
    if swapped == places:
        swapped["cls_token"] = next(name for name in places.values() if name != places["cls_token"])
    write_index(tmp_path, swapped)
    with pytest.raises(CheckpointError, match=r"lacks \w+.*, which '.*index.json' places there"):
        read_folder(tmp_path)
    write_index(tmp_path, places)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint file '.*model-00002"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": ' + "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object(tmp_path: Path, tiny: Tiny, text: str) -> None:
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json' is no JSON object"):
        load(tmp_path, heads=4)


def test_arrays_of_numpy(tmp_path: Path) -> None:
    arrays = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float16(1.5),
        "empty": np.zeros((0, 3), np.float32),
        "count": np.int64(7),
    }
    path = tmp_path / "vit.npz"
    np.savez(path, **arrays)
    read = read_saved(path)
    assert read.container == "npz"
    for key, array in arrays.items():
        tensor = read.content[key.replace("/", ".")]
        assert tensor.shape == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_bfloat16_of_jax(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16)
    path = tmp_path / "vit.npz"
    np.savez(path, x=values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_saved(path).content["x"], values)


def test_npz_archives_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.npz"
    np.savez_compressed(path, x=np.zeros(1000))
    with pytest.raises(CheckpointError, match="compressed npz archive"):
        load(path)
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match=r"holds Python objects as 'x\.npy'"):
        load(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(CheckpointError, match="no Vision Transformer"):
        load(path)
    np.savez(path, x=np.array(["text"]))
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)
