from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.capture import Recorder
from vitprobe.errors import VitprobeError
from vitprobe.measures.chunks import RowMeasure

QUIET = {"progress": False, "device": "cpu", "block": 32}
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1073741824 bytes."
)


def cramped(name, most, error=NO_MEMORY, seed=0):
    """A model whose last block has no room for more than so many images, and what it was given."""
    model = tiny(name, depth=2, seed=seed)
    given = []

    def check(module, args):
        given.append(len(args[0]))
        if len(args[0]) > most:
            raise error

    model.module.blocks[-1].register_forward_pre_hook(check)
    return model, given


def close(found, expected):
    """Whether every number of two results is the same up to 1e-6 of the largest of its kind."""
    for path, node in expected.tree.to_dict().items():
        for name, array in node.data_vars.items():
            other = found.tree[path][name]
            if array.dtype.kind == "f":
                # Sums cancel, so that the small ones are as inexact as the large ones.
                scale = max(1.0, float(np.nanmax(np.abs(array.values), initial=0)))
                assert torch.allclose(
                    torch.tensor(other.values).double(),
                    torch.tensor(array.values).double(),
                    rtol=1e-5,
                    atol=scale * (1e-6 if array.dtype != "float16" else 1e-3),
                    equal_nan=True,
                ), name


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        MemoryError(),
        RuntimeError(CPU_WORDS),
        RuntimeError("could not create a primitive"),
    ],
)
def test_out_of_memory_halves_the_passes_and_changes_no_number(error):
    measures = ["cka", "attention_distance", "token_cosine", "rankme"]
    whole = vp.compare([tiny("a", depth=2), tiny("b", depth=2)], squares(96), measures, **QUIET)
    small, given = cramped("a", 9, error)
    with pytest.warns(UserWarning, match="'a' ran out of memory with .* goes on with") as told:
        found = vp.compare([small, tiny("b", depth=2)], squares(96), measures, **QUIET)
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert "with 32 images in a forward pass and goes on with 16" in texts[0]
    assert "with 16 images in a forward pass and goes on with 8" in texts[1]
    # The first block is run anew in smaller passes, and later blocks begin with these.
    assert given == [32, 16] + [8] * 12
    assert found.provenance["block"] == whole.provenance["block"]
    assert found.provenance["blocks"] == whole.provenance["blocks"] == 3
    close(found, whole)
    (note,) = set(found.notes) - set(whole.notes)
    assert note == (
        "a: the device ran out of memory with 32 images in a forward pass, so it was given 8 at a "
        "time; blocks are unchanged."
    )


def test_no_room_for_a_single_image_is_told():
    model, given = cramped("a", 0)
    with (
        pytest.warns(UserWarning, match="goes on with"),
        pytest.raises(VitprobeError, match="'a' has no room on cpu for a single image") as error,
    ):
        vp.compare([model], squares(8), ["cka"], **{**QUIET, "block": 4})
    assert "give another device" in str(error.value)
    assert given == [4, 2, 1]


def test_other_errors_of_a_model_are_not_taken_for_memory():
    model = tiny("a", depth=2)

    def fail(module, args):
        raise RuntimeError("shapes do not fit")

    model.module.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        vp.compare([model], squares(8), ["cka"], **QUIET)


def test_nan_that_a_device_tells_late_is_told_with_its_model_and_block(monkeypatch):
    """As on CUDA, whose sums are fetched after the forward pass."""
    run = Recorder.run

    def fetched_later(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(RowMeasure, "settle", lambda measure: None)
            return run(self, *args)

    monkeypatch.setattr(Recorder, "run", fetched_later)
    model = tiny("a", depth=2)
    model.module.blocks[1].attn.qkv.weight.data[0] = torch.nan
    with pytest.raises(VitprobeError, match=r"model 'a', block 0 .*: attention is NaN in layer 1"):
        vp.compare([model], squares(8), ["attention_entropy"], **QUIET)


def test_the_batch_size_is_where_halving_begins():
    model, given = cramped("a", 3)
    with pytest.warns(UserWarning, match="with 6 images"):
        found = vp.compare([model], squares(12), ["cka"], batch_size=6, **QUIET)
    assert given == [6, *[3] * 4]
    assert any(re.search("a: .* with 6 images .* given 3 at a time", n) for n in found.notes)


LIMITED = """
import resource, sys
import torch
torch.set_num_threads(1)
import vitprobe as vp
from models_for_tests import squares, tiny
from vitprobe.errors import VitprobeError

tokens, room = sys.argv[1], int(sys.argv[2]) << 20
model, images = tiny("a", size=64, patch=4, width=96, depth=3), squares(256, size=64)
options = dict(tokens=tokens, block=256, workers=1, device="cpu", progress=False)
vp.compare([model], images[:8], ["cka"], **options)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
try:
    print(vp.compare([model], images, ["cka"], **options).notes)
except VitprobeError as error:
    print("refused:", error)
"""


def limited(tokens, room):
    """What a comparison says that may take so many MB of address space beside what it has."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, tokens, str(room)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_under_a_limit_of_memory_passes_are_halved():
    # A whole block would take 100 MB for the hidden units of a block's MLP alone.
    assert "ran out of memory with 256 images" in limited("mean", 110)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_under_a_limit_of_memory_that_is_too_low_the_block_is_blamed_at_once():
    # Of four layers a block's patches take 25 MB each, whatever a pass takes.
    said = limited("patches", 80)
    assert "refused: model 'a' has no room on cpu for the features of the 256 images" in said


@pytest.mark.parametrize("error", [RuntimeError(CPU_WORDS), MemoryError()])
def test_no_room_for_a_block_is_told_after_the_first_pass(monkeypatch, error):
    model, given = cramped("a", 16)

    def fail(self, *args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", fail)
        with (
            pytest.warns(UserWarning, match="with 32 images"),
            pytest.raises(VitprobeError, match="for the features of the 32 images of a block"),
        ):
            vp.compare([model], squares(64), ["cka"], **QUIET)
    assert given == [32]
