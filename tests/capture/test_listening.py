"""Whole attention logits and hidden states, with gradients, of sequences of any length."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import squares, tiny
from torch.utils.checkpoint import checkpoint

from vitprobe.capture import Recorder, listen
from vitprobe.errors import CaptureError
from vitprobe.models import Model


def blocks_on(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    return model.module.blocks(tokens)


def tokens_of(model: Model, images: int = 2, count: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, count, model.anatomy.width, generator=generator)


def fused(model: Model, yes: bool) -> Model:
    for block in model.module.blocks:
        block.attn.fused_attn = yes
    return model


@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([1, 2, 3, 6]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_logits_are_scaled_products_of_queries_and_keys(images, count, heads, fuse):
    model = fused(tiny(heads=heads), fuse)
    tokens = tokens_of(model, images, count)
    heard = listen(model, lambda: blocks_on(model, tokens), attention=(0,))
    block = model.module.blocks[0]
    qkv = block.attn.qkv(block.norm1(tokens)).view(images, count, 3, heads, 24 // heads)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    by_hand = torch.einsum("bhqd,bhkd->bhqk", q, k) / (24 // heads) ** 0.5
    torch.testing.assert_close(heard.attention[0], by_hand)


def test_output_is_bit_identical_and_no_hook_stays():
    model, tokens = tiny(), tokens_of(tiny()).requires_grad_()
    heard = listen(model, lambda: blocks_on(model, tokens), attention=(1,), hidden=(0, 1, 2, 3))
    assert torch.equal(heard.output, blocks_on(model, tokens))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())


def test_softmax_of_the_logits_is_what_the_recorder_hands_on():
    model, images = tiny(), squares(2)
    chunks = []
    with torch.no_grad():
        with Recorder(model, on_attention=chunks.append) as recorder:
            recorder.run(images)
        normal = model.normalize(images)
        heard = listen(model, lambda: model.module(normal), attention=(0, 1, 2))
    for layer, logits in enumerate(heard.attention):
        (chunk,) = [chunk for chunk in chunks if chunk.layer == layer]
        assert torch.equal(logits.log_softmax(-1), chunk.log_p)


def test_hidden_states_are_the_residual_stream_in_the_order_asked_for():
    model, tokens = tiny(), tokens_of(tiny()).requires_grad_()
    heard = listen(model, lambda: blocks_on(model, tokens), hidden=(3, 0, 2, 2))
    stream = [tokens]
    for block in model.module.blocks:
        stream.append(block(stream[-1]))
    for layer, found in zip((3, 0, 2, 2), heard.hidden, strict=True):
        assert torch.equal(found, stream[layer])


@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_are_those_of_the_formula(fuse):
    model = fused(tiny(), fuse)
    tokens = tokens_of(model).requires_grad_()
    weight = torch.randn(2, 3, 7, 7)
    heard = listen(model, lambda: blocks_on(model, tokens), attention=(0,))
    (found,) = torch.autograd.grad((heard.attention[0] * weight).sum(), tokens)
    block = model.module.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    (expected,) = torch.autograd.grad((q @ k.mT * 8**-0.5 * weight).sum(), tokens)
    torch.testing.assert_close(found, expected)


def test_logits_are_single_precision_under_autocast():
    model = fused(tiny(), True)
    tokens = tokens_of(model)
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is sdpa:
                seen.append(args[:2])
            return func(*args, **(kwargs or {}))

    with Watch(), torch.autocast("cpu", torch.bfloat16):
        heard = listen(model, lambda: blocks_on(model, tokens), attention=(0,))
    q, k = seen[0]
    assert q.dtype == torch.bfloat16
    assert heard.attention[0].dtype == torch.float32
    torch.testing.assert_close(heard.attention[0], (q.float() * 8**-0.5) @ k.float().mT)


def test_recomputed_blocks_are_heard_with_their_gradient():
    tokens = tokens_of(tiny())

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = tiny()
        if recompute:
            for block in model.module.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        heard = listen(model, lambda: blocks_on(model, tokens), attention=(0, 2), hidden=(1,))
        sum(x.square().sum() for x in (*heard.attention, *heard.hidden, heard.output)).backward()
        return [block.attn.qkv.weight.grad for block in model.module.blocks]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


def test_a_layer_without_a_gradient_raises():
    model = tiny()
    model.module.requires_grad_(False)
    tokens = tokens_of(model)
    with pytest.raises(CaptureError, match="without a gradient"):
        listen(model, lambda: blocks_on(model, tokens), attention=(0,))
    with torch.no_grad():
        assert len(listen(model, lambda: blocks_on(model, tokens), attention=(0,)).attention) == 1


@pytest.mark.parametrize("chosen", [{"attention": (1,)}, {"hidden": (2,)}])
def test_a_silent_layer_raises(chosen):
    model = tiny()
    tokens = tokens_of(model)
    with pytest.raises(CaptureError, match=r"'tiny' gave no .* in layers \d; choose others"):
        listen(model, lambda: model.module.blocks[0](tokens), **chosen)


@pytest.mark.parametrize("chosen", [{"attention": (1,)}, {"hidden": (0,)}])
def test_a_layer_that_speaks_twice_raises(chosen):
    model = tiny()
    tokens = tokens_of(model)
    with pytest.raises(CaptureError, match="more than once in layers"):
        listen(model, lambda: blocks_on(model, blocks_on(model, tokens)), **chosen)


def test_what_is_no_tensor_raises():
    model = tiny()
    tokens = tokens_of(model)
    block = model.module.blocks[0]
    before = block.forward
    block.forward = lambda x: (before(x), None)
    with pytest.raises(CaptureError, match="layer 1: its block handles tuple"):
        listen(model, lambda: block(tokens), hidden=(1,))


def test_blocks_that_were_not_chosen_are_not_looked_at():
    model = tiny()
    # Attention without an axis of heads is none of ours, which matters only where it is heard.
    attention = model.module.blocks[0].attn
    attention.forward = lambda x, **_: torch.nn.functional.scaled_dot_product_attention(x, x, x)
    tokens = tokens_of(model)
    listen(model, lambda: blocks_on(model, tokens), attention=(2,))
    with pytest.raises(CaptureError, match="cannot be listened to"):
        listen(model, lambda: blocks_on(model, tokens), attention=(0,))
