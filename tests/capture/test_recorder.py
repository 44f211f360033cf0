from __future__ import annotations

import pytest
import timm
import torch

import vitprobe as vp
from vitprobe.capture import Recorder
from vitprobe.errors import CaptureError
from vitprobe.measures import chunks as chunks_module
from vitprobe.measures.attention import ATTENTION_MEASURES

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
VARIANTS = {
    "plain": {},
    "fine-tuned": {"global_pool": "avg", "fc_norm": True, "class_token": True},
    "registers": {"reg_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "no head": {"num_classes": 0},
    "one channel": {"in_chans": 1},
    "oblong": {"img_size": (24, 40)},
}


def build(fused=True, seed=0, **options):
    torch.manual_seed(seed)
    options = {**TINY, **options}
    module = timm.models.vision_transformer.VisionTransformer(**options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in module.blocks:
        block.attn.fused_attn = fused
    size = options["img_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    channels = options.get("in_chans", 3)
    return vp.wrap(module, name="tiny", input_size=(channels, height, width), mean=0.5, std=0.5)


def images(model, n=5):
    return torch.rand(n, *model.input_size, generator=torch.Generator().manual_seed(1))


def record(model, x, **options):
    features, chunks = {}, []
    with (
        torch.inference_mode(),
        Recorder(
            model,
            on_features=lambda layer, tokens: features.__setitem__(layer, tokens.clone()),
            on_attention=chunks.append,
            **options,
        ) as recorder,
    ):
        output = recorder.run(x)
    return output, features, chunks


def full_maps(chunks, layer):
    parts = [chunk for chunk in chunks if chunk.layer == layer]
    images = sorted({chunk.first_image for chunk in parts})
    return torch.cat(
        [torch.cat([c.log_p for c in parts if c.first_image == i], dim=2) for i in images]
    ).exp()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("convention", ["normed", "residual"])
def test_output_is_bit_identical(variant, fused, convention):
    model = build(fused, **VARIANTS[variant])
    x = images(model)
    with torch.inference_mode():
        expected = model.module(model.normalize(x))
    output, features, chunks = record(model, x, convention=convention)
    assert torch.equal(output, expected)
    assert sorted(features) == [0, 1, 2, 3]
    assert {chunk.layer for chunk in chunks} == {0, 1, 2}
    assert not model.module._forward_hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_what_the_definitions_say(variant):
    model = build(**VARIANTS[variant])
    module, x = model.module, model.normalize(images(model))
    with torch.inference_mode():
        tokens = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
        residual, normed = [tokens], []
        for block in module.blocks:
            normed.append(block.norm1(tokens))
            tokens = block(tokens)
            residual.append(tokens)
        pooled = isinstance(module.norm, torch.nn.Identity)
        normed.append((module.fc_norm if pooled else module.norm)(tokens))
    for convention, expected in (("normed", normed), ("residual", residual)):
        _, features, _ = record(model, images(model), convention=convention)
        for layer, tokens in enumerate(expected):
            assert torch.equal(features[layer], tokens), (convention, layer)
    assert pooled == (variant in ("fine-tuned", "no class token"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_equals_the_unfused_softmax(variant):
    model = build(fused=True, **VARIANTS[variant])
    plain = build(fused=False, **VARIANTS[variant])
    seen = []
    for block in plain.module.blocks:
        block.attn.attn_drop.register_forward_hook(lambda m, a, output: seen.append(output))
    x = images(model)
    with torch.inference_mode():
        plain.module(plain.normalize(x))
    for fused in (model, plain):
        _, _, chunks = record(fused, x)
        for layer, expected in enumerate(seen[:3]):
            torch.testing.assert_close(full_maps(chunks, layer), expected, atol=1e-6, rtol=1e-5)


def test_recomputed_attention_reproduces_the_fused_output():
    model = build(fused=True)
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is sdpa:
                calls.append((args[2], result))
            return result

    with Watch():
        _, _, chunks = record(model, images(model))
    assert len(calls) == 3
    for layer, (value, output) in enumerate(calls):
        torch.testing.assert_close(full_maps(chunks, layer) @ value, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("elements", [1, 300, 2000, 10**9])
def test_chunk_size_changes_nothing(monkeypatch, elements):
    model = build(reg_tokens=2)
    x = images(model)
    _, _, whole = record(model, x)
    expected = [cls() for cls in ATTENTION_MEASURES]
    for chunk in whole:
        for measure in expected:
            measure.update(chunk)
    monkeypatch.setattr(chunks_module, "CHUNK_ELEMENTS", elements)
    parts = [part for chunk in whole for part in chunk.parts()]
    for layer in range(3):
        torch.testing.assert_close(full_maps(parts, layer), full_maps(whole, layer))
    for cls, reference in zip(ATTENTION_MEASURES, expected, strict=True):
        measure = cls()
        for chunk in parts:
            measure.update(chunk)
        for layer, found in measure.compute().items():
            torch.testing.assert_close(found.mean, reference.compute()[layer].mean)


def test_masks_biases_and_scales_of_fused_attention():
    model = build()
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=torch.Generator().manual_seed(0)).unbind()
    bias = torch.randn(3, 17, 17)
    keep = torch.rand(2, 1, 17, 17) > 0.3
    keep[..., 0] = True
    for mask, scale in ((None, 0.7), (bias, None), (keep, None)):
        module = model.module.blocks[0].attn
        logits = q @ k.mT * (scale or 8**-0.5)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask is keep else logits + mask
        module.forward = lambda x, *a, m=mask, s=scale, **kw: (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=s)
            .transpose(1, 2)
            .reshape(2, 17, 24)
        )
        _, _, chunks = record(model, images(model, 2))
        torch.testing.assert_close(full_maps(chunks, 0), logits.softmax(-1))


def test_a_silent_layer_raises():
    model = build()
    model.module.blocks[1].attn.forward = lambda x, *args, **kwargs: x
    with pytest.raises(CaptureError, match="model 'tiny' gave no attention in layers 1"):
        record(model, images(model))


def test_a_skipped_block_raises():
    model = build()
    model.module.blocks[2].forward = lambda x, *args, **kwargs: x
    with pytest.raises(CaptureError, match=r"gave no (features|attention) in layers 2"):
        record(model, images(model))


def test_attention_seen_twice_raises():
    model = build(fused=False)
    attn = model.module.blocks[0].attn
    before = attn.forward
    attn.forward = lambda x, *args, **kwargs: before(before(x))
    with pytest.raises(CaptureError, match="attention more than once in layers 0"):
        record(model, images(model))


def test_hooks_go_when_a_forward_fails():
    model = build()
    with (
        pytest.raises(RuntimeError),
        Recorder(model, on_features=lambda *a: None, on_attention=lambda c: None) as recorder,
    ):
        recorder.run(torch.rand(2, 5, 3, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())


def test_unknown_convention():
    with pytest.raises(CaptureError, match="unknown layers 'output': use 'normed' or 'residual'"):
        record(build(), images(build()), convention="output")
