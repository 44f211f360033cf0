"""The fused kernel against whole maps in double precision.

Without a CUDA device these tests run in a second process, under Triton's interpreter, which has to
be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_for_tests import squares, tiny
from torch import Tensor

import vitprobe as vp
from vitprobe.measures import fused
from vitprobe.measures.chunks import grid_positions

ON_CUDA = torch.cuda.is_available() and fused.available(torch.device("cuda"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_CUDA else "cpu"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
needs_kernel = pytest.mark.skipif(
    not (ON_CUDA or INTERPRETED), reason="runs on CUDA or under Triton's interpreter"
)


def expected(query, key, *, scale, key_prefix, query_xy, key_xy, mask=None) -> fused.Rows:
    """The same from whole maps, in double precision."""
    logits = (query.double() * scale) @ key.double().mT
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        logits = logits + mask
    unread = logits.amax(-1) == -torch.inf
    rows = torch.softmax(logits[..., key_prefix:], dim=-1)
    distance = None
    if query_xy is not None:
        distance = (rows * torch.cdist(query_xy.double(), key_xy.double())).sum(-1)
    sink = torch.softmax(logits, dim=-1)[..., :key_prefix].sum(-1).masked_fill(unread, 0)
    return fused.Rows(torch.special.entr(rows).sum(-1), distance, sink)


def run(query: Tensor, key: Tensor, **options) -> fused.Rows:
    """What the kernel gives, on the CPU again."""

    def there(value):
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    found = fused.rows(there(query), there(key), **{k: there(v) for k, v in options.items()})
    return fused.Rows(*(None if part is None else part.cpu() for part in found))


def check(query: Tensor, key: Tensor, **options) -> fused.Rows:
    found, known = run(query, key, **options), expected(query, key, **options)
    for ours, truth, close in zip(found, known, (2e-5, 5e-4, 2e-6), strict=True):
        if truth is None:
            assert ours is None
        else:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=close, equal_nan=True)
    return found


def tokens(images=2, heads=2, queries=20, keys=20, depth=16, *, seed=0, sharpness=1.0):
    """Queries and keys of one piece each, and the scale of their products."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(images, heads, queries, depth, generator=generator) * sharpness
    key = torch.randn(images, heads, keys, depth, generator=generator)
    return query, key, depth**-0.5


def places(queries, patches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(queries + patches, 2, generator=generator, dtype=torch.float64) * 518
    return {"query_xy": xy[:queries], "key_xy": xy[queries:]}


@needs_kernel
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_rows_are_those_of_a_whole_map(data):
    draw = data.draw
    prefix = draw(st.sampled_from([0, 1, 5, 20]), "prefix")
    queries, patches = draw(st.integers(1, 70), "queries"), draw(st.integers(1, 70), "patches")
    images, heads = draw(st.sampled_from([(1, 1), (3, 2), (1, 3)]), "images, heads")
    depth = draw(st.sampled_from([16, 24, 40, 64, 80, 128, 130]), "depth")
    seed = draw(st.integers(0, 1000), "seed")
    sharpness = draw(st.sampled_from([0.0, 1.0, 8.0]), "sharpness")
    query, key, scale = tokens(
        images, heads, queries, prefix + patches, depth, seed=seed, sharpness=sharpness
    )
    # The interpreter's products of bfloat16 are wrong, those of float16 are not.
    dtype = draw(st.sampled_from([torch.float32, torch.float16, *[torch.bfloat16] * ON_CUDA]))
    mask = None
    shape = draw(st.sampled_from([(images, heads), (1, heads), (images, 1), (1, 1), ()]), "mask")
    generator = torch.Generator().manual_seed(seed)
    match draw(st.sampled_from(["none", "read", "added"]), "kind of mask"):
        case "read":
            mask = torch.rand(*shape, queries, prefix + patches, generator=generator) > 0.6
        case "added":
            mask = torch.randn(*shape, 1, prefix + patches, generator=generator) * 3
            mask[..., 0] = -torch.inf
    where = places(queries, patches, seed) if draw(st.booleans(), "places") else {}
    where = where or {"query_xy": None, "key_xy": None}
    check(query.to(dtype), key.to(dtype), scale=scale, key_prefix=prefix, mask=mask, **where)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_keys(dtype):
    query, key, scale = tokens(1, 1, 3, 401, 64, sharpness=2)
    check(query.to(dtype), key.to(dtype), scale=scale, key_prefix=1, **places(3, 400))


@needs_kernel
def test_uniform_attention():
    query, key, scale = tokens(queries=41, keys=45)
    found = run(torch.zeros_like(query), key, scale=scale, key_prefix=5, **places(41, 40))
    mean = torch.cdist(*places(41, 40).values()).mean(-1)
    torch.testing.assert_close(found.entropy, torch.tensor(40.0).log().expand(2, 2, 41))
    torch.testing.assert_close(found.distance, mean.float().expand(2, 2, 41))
    torch.testing.assert_close(found.sink, torch.tensor(5 / 45).expand(2, 2, 41))


@needs_kernel
def test_a_head_that_looks_at_one_patch():
    query, key = torch.eye(16)[None, None] * 1e4, torch.eye(16)[None, None]
    xy = grid_positions((4, 4), 16)
    found = run(query, key, scale=1.0, key_prefix=0, query_xy=xy, key_xy=xy.roll(1, 0))
    assert (found.entropy == 0).all()
    torch.testing.assert_close(
        found.distance[0, 0], torch.linalg.vector_norm(xy - xy.roll(1, 0), dim=-1).float()
    )
    assert (found.sink == 0).all()


@needs_kernel
@pytest.mark.parametrize("height", [60.0, 1e4, 1e30])
def test_patches_are_read_beside_a_sink_that_takes_everything(height):
    query, key, scale = tokens(queries=40, keys=41)
    query[..., 0] = 1
    key[:, :, 0], key[:, :, 0, 0] = 0, height / scale
    alone = check(query, key[:, :, 1:], scale=scale, key_prefix=0, **places(40, 40))
    found = check(query, key, scale=scale, key_prefix=1, **places(40, 40))
    torch.testing.assert_close(found.entropy, alone.entropy)
    torch.testing.assert_close(found.distance, alone.distance)
    torch.testing.assert_close(found.sink, torch.ones(2, 2, 40))


@needs_kernel
def test_rows_that_may_read_nothing():
    query, key, scale = tokens(queries=20, keys=45)
    mask = torch.ones(20, 45, dtype=torch.bool)
    mask[3] = False
    mask[4, 5:] = False
    mask[5, :44] = False
    mask[6, 5:40] = False
    for given_mask in (mask, torch.zeros(20, 45).masked_fill(~mask, -torch.inf)):
        found = check(query, key, scale=scale, key_prefix=5, mask=given_mask, **places(20, 40))
        assert found.entropy[..., 3:6].isnan().tolist() == [[[True, True, False]] * 2] * 2
        assert (found.entropy[..., 5] == 0).all()
        assert found.sink[0, 0, 3:6].tolist() == [0, 1, 0]


@needs_kernel
def test_the_lowest_number_masks_all_patches_alike():
    query, key, scale = tokens(queries=20, keys=45)
    mask = torch.zeros(45)
    mask[5:] = torch.finfo(torch.float32).min
    found = run(query, key, scale=scale, key_prefix=5, mask=mask, **places(20, 40))
    torch.testing.assert_close(found.entropy, torch.tensor(40.0).log().expand(2, 2, 20))
    assert (found.sink == 1).all()


@needs_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of its arithmetic
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show_in_the_sink(prefix, broken):
    query, key, scale = tokens(queries=20, keys=40, depth=24)
    good = run(query, key, scale=scale, key_prefix=prefix, query_xy=None, key_xy=None)
    query[1, 0, 7], key[1, 0] = broken, key[1, 0].abs()
    found = run(query, key, scale=scale, key_prefix=prefix, query_xy=None, key_xy=None)
    assert found.sink[1, 0, 7].isnan()
    assert found.sink.isnan().sum() == 1
    torch.testing.assert_close(found.entropy[0], good.entropy[0])
    torch.testing.assert_close(found.sink[1, 1], good.sink[1, 1])


@needs_kernel
def test_queries_and_keys_as_models_have_them():
    """Views of one projection, as timm's are, and one key for all heads."""
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 21, 3, 4, 24, generator=generator).to(DEVICE)
    query, key, _ = projected.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    options = {"scale": 0.2, "key_prefix": 1, **places(21, 20)}
    for k in (key, key[:, :1].expand_as(key), key.half(), key.double()):
        found = fused.rows(query, k, **options)
        known = expected(query.cpu(), k.cpu(), **options)
        for ours, truth in zip(found, known, strict=True):
            torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=5e-4)


@needs_kernel
def test_no_patch_keys():
    query, key, scale = tokens(keys=3)
    found = run(query, key, scale=scale, key_prefix=3, query_xy=None, key_xy=None)
    assert found.entropy.isnan().all()
    torch.testing.assert_close(found.sink, torch.ones_like(found.sink))


@pytest.mark.skipif(ON_CUDA or INTERPRETED, reason="the other tests of this file run here")
@needs_triton
@pytest.mark.slow
def test_under_the_interpreter():
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n0", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    assert f"{test_rows_are_those_of_a_whole_map.__name__} PASSED" in found.stdout


def test_a_cpu_has_no_kernel():
    assert not fused.available(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "span"), [("bf16", 64), ("fp32", 32)])
def test_it_compiles_for_devices_that_are_not_here(tmp_path, monkeypatch, capability, dtype, span):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitprobe.measures.fused_kernel import kernel

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):
        pytest.skip("earlier versions compile by other calls")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {
        "depth": 64, "masked": "none", "places": True, "tile_queries": 64, "tile_keys": 32,
        "tile_prefix": 16, "span": span,
    }  # fmt: skip
    kinds = dict.fromkeys(("query", "key", "mask"), f"*{dtype}") | dict.fromkeys(
        ("query_xy", "key_xy", "entropy", "distance", "sink"), "*fp32"
    )
    signature = {
        name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(kernel, {**signature, "scale": "fp32"}, fixed),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    assert compiled.asm["cubin"]


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_comparisons_on_cuda(monkeypatch, precision):
    models = [tiny("a", size=48, patch=4), tiny("b", seed=1, size=48, patch=4, reg_tokens=4)]
    names = ["attention_distance", "attention_entropy", "sink_mass"]

    def attention(device):
        result = vp.compare(
            models, squares(40, 48), names, device=device, precision=precision, progress=False
        )
        return {
            (model, name): result.attention(name, model).values
            for model in ("a", "b")
            for name in names
        }

    with_kernel = attention("cuda")
    on_cpu = attention("cpu") if precision == "fp32" else {}
    monkeypatch.setattr(fused, "available", lambda device: False)
    without = attention("cuda")
    for key, values in with_kernel.items():
        np.testing.assert_allclose(values, without[key], rtol=1e-5, atol=1e-5)
        if on_cpu:
            np.testing.assert_allclose(values, on_cpu[key], rtol=1e-4, atol=1e-4)
