"""Two processes that share a comparison give the result of one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny
from PIL import Image
from processes_for_tests import together as in_processes

import vitprobe as vp
from vitprobe.distributed import together
from vitprobe.errors import VitprobeError

QUIET = {"progress": False, "device": "cpu", "workers": 1}


def models() -> list[vp.Model]:
    return [tiny("a"), tiny("b", size=48, width=36, depth=2, heads=2, seed=1)]


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(squares(70), batch_size=9)


RUNS: dict[str, dict[str, Any]] = {
    "everything": {
        "images": "photos",
        "measures": ["all"],
        "block": 16,
        "limit": 85,
        "max_images": 40,
        "random_reference": True,
        "groups": {"seeds": ["a", "b"]},
    },
    "class tokens": {
        "images": "photos",
        "measures": ["cka", "cka_rbf", "rankme"],
        "tokens": "cls",
        "block": 20,
        "seed": 3,
    },
    "biased": {"images": loader, "estimator": "biased", "block": 8, "batch_size": 3},
    "probe files": {"images": None, "block": 32},
    "fewer blocks than processes": {"images": squares(20), "measures": ["cka", "cka_rbf"]},
}


def _compared(name: str, folder: Path) -> vp.Comparison:
    options = RUNS[name] | QUIET
    images = options.pop("images")
    images = folder / images if isinstance(images, str) else images
    compared: list[Any] = models()
    if images is None:
        compared = [vp.open_probe(folder / f"{model.name}.probe") for model in compared]
    return vp.compare(compared, images() if callable(images) else images, **options)


def _failed(compared: Sequence[vp.Model | vp.Probe], images: Any, **options: Any) -> str:
    """What a process says of a comparison that cannot be."""
    try:
        with together():
            vp.compare(compared, images, **(QUIET | options))
    except VitprobeError as error:
        return str(error)
    return ""


def _share(folder: str) -> dict[str, str]:
    with together() as team:
        for name in RUNS:
            result = _compared(name, Path(folder))
            result.save(Path(folder) / f"{name} {team.rank}.nc")
        return _refusals(team.rank, Path(folder))


def _refusals(rank: int, folder: Path) -> dict[str, str]:
    blinded = tiny("blinded")
    blinded.module.patch_embed.register_forward_hook(
        lambda module, given, made: made * (torch.nan if given[0].max() > 0.999 else 1)
    )
    images = squares(96) * 0.9
    images[int(np.random.default_rng(0).permutation(96)[40])] = 1
    return {
        "not finite": _failed([blinded], images, block=32, seed=0),
        "models": _failed([tiny("a", seed=rank)], images),
        "settings": _failed([tiny("a")], images, block=32 + rank),
        "images": _failed([tiny("a")], images, limit=50 + rank),
        "too few": _failed([tiny("a")], squares(3)),
        "probe files": _failed([vp.open_probe(folder / f"other {rank}.probe")], None),
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "photos").mkdir()
    for number, square in enumerate(squares(90)):
        pixels = (square.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number:02}.png")
    for number in (5, 40, 41):
        (folder / "photos" / f"{number:02}.png").write_bytes(b"damaged")
    for model in models():
        vp.probe(model, folder / "photos", folder / f"{model.name}.probe", block=32, **QUIET)
    for rank, limit in enumerate((80, 64)):
        vp.probe(tiny("a"), folder / "photos", folder / f"other {rank}.probe", limit=limit, **QUIET)
    return folder, in_processes(_share, folder, str(folder))


@pytest.mark.parametrize("name", RUNS)
def test_the_result_of_one_process(shared, name):
    folder, _ = shared
    alone = _compared(name, folder)
    found = [vp.open_result(folder / f"{name} {rank}.nc") for rank in range(2)]
    assert found[0].tree.identical(found[1].tree)
    for node in alone.tree.subtree:
        other = found[0].tree[node.path]
        assert set(other.data_vars) == set(node.data_vars)
        for variable, values in node.variables.items():
            assert other[variable].dtype == values.dtype
            if values.dtype.kind == "f":
                np.testing.assert_allclose(other[variable], values, rtol=1e-12, atol=1e-12)
            else:
                assert np.array_equal(other[variable], values), variable
    assert found[0].notes == alone.notes
    provenance = alone.provenance | {"created": None, "command": None}
    assert (provenance.pop("processes"), found[0].provenance.pop("processes")) == (1, 2)
    assert found[0].provenance | {"created": None, "command": None} == provenance


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("not finite", "model 'blinded', block 1 of the images: attention is NaN in layer 0"),
        ("models", "process 1 of this run is given other models than process 0"),
        ("settings", "process 1 of this run is given other settings than process 0"),
        ("images", "process 1 of this run is given other images than process 0"),
        ("probe files", "process 1 of this run is given other probe files than process 0"),
        ("too few", "gives too few images that can be decoded, 3: unbiased CKA needs at least 4"),
    ],
)
def test_an_error_of_one_process_is_that_of_all(shared, what, said):
    _, failures = shared
    assert failures[0][what] == failures[1][what]
    assert re.search(said, failures[0][what])


def _torchrun(*command: str | Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", port, "-m", "vitprobe", "compare", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=200)


@pytest.mark.slow
def test_the_command_under_torchrun(shared, tmp_path):
    folder, _ = shared
    torch.save({"model": tiny().module.state_dict()}, tmp_path / "tiny.pth")
    spec, name = f"{tmp_path / 'tiny.pth'},heads=3", "tiny"
    options = ["--images", folder / "photos", "--block", "32", "--device", "cpu"]
    done = _torchrun(f"tiny={spec}", *options, "--out", tmp_path / "report", "--formats", "svg")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'report' / 'report.html'}\n"
    assert done.stderr.count("note: 3 images could not be decoded") == 1
    result = vp.open_result(tmp_path / "report" / "results.nc")
    alone = vp.compare([vp.load(spec, name=name)], folder / "photos", block=32, **QUIET)
    np.testing.assert_allclose(result.cka(name, name), alone.cka(name, name), rtol=1e-12)

    failed = _torchrun(f"tiny={spec}", *options, "--out", tmp_path / "other", "--measures", "svca")
    assert failed.returncode != 0
    said = [line for line in failed.stderr.splitlines() if line.startswith("vitprobe")]
    assert len([line for line in said if "unknown measure 'svca'" in line]) == 1
    assert failed.stderr.count("exitcode  : 2") == 2
    assert "terminated" not in failed.stderr
