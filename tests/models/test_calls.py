"""Attention calls: what a function computes is what the call says that it computes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprobe.models.calls import AttentionCall, AttentionCalls


class Seeing(AttentionCalls):
    """Keeps all calls; has every query read the keys in `reads`, where that is given."""

    def __init__(self, module: nn.Module, *paths: str, reads: Tensor | None = None) -> None:
        super().__init__(module, paths or ("",))
        self.all: list[AttentionCall] = []
        self.reads = reads

    def on_call(self, call: AttentionCall) -> Tensor | None:
        self.all.append(call)
        return self.reads


class Runs(nn.Module):
    """A module that runs a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_in(function, *args, **options):
    module = Runs(function)
    with Seeing(module, **options) as seeing:
        output = module(*args)
    return seeing.all, output


@pytest.mark.parametrize(
    ("lead", "queries", "keys"),
    [((2, 3), 5, 7), ((4,), 5, 5), ((2, 3, 4), 6, 2), ((2, 2, 3, 2), 1, 9), ((), 5, 7)],
)
def test_weights_times_values_are_what_fused_attention_returns(lead, queries, keys):
    q, k = normal(*lead, queries, 8), normal(*lead, keys, 8, seed=1)
    v = normal(*lead, keys, 6, seed=2)
    bias, keep = normal(queries, keys, seed=3), normal(*lead, queries, keys, seed=4) > -0.5
    keep[..., 0] = True
    for options in ({}, {"scale": 0.3}, {"attn_mask": bias}, {"attn_mask": keep}):
        (call,), output = seen_in(
            lambda q, k, v, o=options: F.scaled_dot_product_attention(q, k, v, **o), q, k, v
        )
        assert call.shape == (*lead, queries, keys)
        assert call.lead == lead
        torch.testing.assert_close(call.logits().softmax(-1) @ v, output, atol=1e-5, rtol=1e-5)


def test_causal_grouped_and_broadcast_keys():
    q, k, v = normal(2, 6, 5, 8), normal(2, 3, 5, 8, seed=1), normal(2, 3, 5, 4, seed=2)
    one = normal(2, 1, 5, 8, seed=3)
    for function, args in (
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, q, q)),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (q, k, v)),
        (F.scaled_dot_product_attention, (q, one.expand(-1, 6, -1, -1), q)),
    ):
        (call,), output = seen_in(lambda *a, f=function: f(*a), *args)
        assert call.value is not None
        rows = call.logits().softmax(-1)
        torch.testing.assert_close(rows @ call.value, output, atol=1e-5, rtol=1e-5)


SPELLINGS = {
    "torch": lambda x, dim: torch.softmax(x, dim),
    "functional": lambda x, dim: F.softmax(x, dim=dim),
    "method": lambda x, dim: x.softmax(dim),
    "named": lambda x, dim: torch.softmax(input=x, dim=dim, dtype=torch.float64),
    "special": lambda x, dim: torch.special.softmax(x, dim),
    "module": lambda x, dim: nn.Softmax(dim)(x),
}


@pytest.mark.parametrize("dim", [-1, 1, 3, -2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_softmax_is_seen_once_however_it_is_spelt(spelling, dim):
    logits = normal(2, 3, 5, 7)
    (call,), output = seen_in(lambda x: SPELLINGS[spelling](x, dim), logits)
    rows = call.logits().softmax(-1).movedim(-1, dim)
    torch.testing.assert_close(rows, output.float(), atol=1e-6, rtol=1e-5)
    assert torch.equal(output, SPELLINGS[spelling](logits, dim))


def test_parts_are_parts_of_the_whole():
    q, k = normal(6, 3, 5, 8), normal(6, 3, 7, 8, seed=1)
    bias = normal(3, 5, 7, seed=2)
    (fused,), _ = seen_in(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=bias), q, k
    )
    (plain,), _ = seen_in(lambda x: x.softmax(-1), fused.logits())
    for call in (fused, plain):
        split = call.split((2, 3, 3))
        assert split.shape == (2, 3, 3, 5, 7)
        whole = call.logits().reshape(2, 3, 3, 5, 7)
        torch.testing.assert_close(split.logits(), whole)
        part = split.logits((slice(1, 2), 2, slice(None)), slice(1, 4))
        torch.testing.assert_close(part, whole[1:2, 2, :, 1:4])
        order = torch.tensor([4, 0])
        torch.testing.assert_close(split.logits((0,), order), whole[0][..., order, :])


MULTI_HEAD = {
    "plain": {},
    "no bias": {"bias": False},
    "other keys": {"kdim": 10, "vdim": 7},
    "bias of keys": {"add_bias_kv": True},
    "a key of zeros": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("masked", ["", "bool", "float", "padding", "padding and bool"])
@pytest.mark.parametrize("variant", MULTI_HEAD)
def test_multi_head_attention_is_what_it_returns(variant, masked):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 3, batch_first=True, **MULTI_HEAD[variant]).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    query = normal(2, 5, 12)
    key = normal(2, 6, module.kdim, seed=1)
    value = normal(2, 6, module.vdim, seed=2)
    options = {}
    if "bool" in masked:
        options["attn_mask"] = normal(5, 6, seed=3) > 0.8
    if masked == "float":
        options["attn_mask"] = normal(2 * 3, 5, 6, seed=3)
    if "padding" in masked:
        options["key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    _, expected = module(query, key, value, average_attn_weights=False, **options)
    with torch.no_grad(), Seeing(module) as seeing:
        module(query, key, value, need_weights=False, **options)
    (call,) = seeing.all
    torch.testing.assert_close(call.logits().softmax(-1), expected, atol=1e-6, rtol=1e-5)


def test_multi_head_attention_with_sequences_first_or_without_images():
    module = nn.MultiheadAttention(12, 3).eval()
    for tokens in (normal(5, 2, 12), normal(5, 12)):
        output, expected = module(tokens, tokens, tokens, average_attn_weights=False)
        with Seeing(module) as seeing:
            seen, _ = module(tokens, tokens, tokens)
        torch.testing.assert_close(
            seeing.all[0].logits().softmax(-1).reshape(expected.shape), expected
        )
        assert torch.equal(seen, output)


def test_the_fast_path_of_an_encoder_layer_is_seen():
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    tokens = normal(2, 5, 12)
    with torch.inference_mode():
        expected = layer(tokens)
        with Seeing(layer) as seeing:
            output = layer(tokens)
    assert [(call.path, call.shape) for call in seeing.all] == [("self_attn", (2, 3, 5, 5))]
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)


def test_a_query_reads_the_one_key_that_it_is_given():
    tokens = normal(2, 3, 4, 8)
    reads = torch.tensor([2, -1, 0, 0]).expand(2, 3, 4)
    expected = tokens[:, :, [2, 0, 0, 0]].clone()
    expected[:, :, 1] = 0
    fused = lambda x: F.scaled_dot_product_attention(x, x, x)  # noqa: E731
    plain = lambda x: (x @ x.mT).softmax(-1) @ x  # noqa: E731
    for function in (fused, plain):
        _, output = seen_in(function, tokens, reads=reads)
        assert torch.equal(output, expected)
    module = nn.MultiheadAttention(12, 3, batch_first=True)
    sequence = normal(2, 4, 12)
    own = torch.arange(4).expand(2, 3, 4)
    with Seeing(module, reads=own):
        output, _ = module(sequence, sequence, sequence)
    weight = module.in_proj_weight[24:]
    torch.testing.assert_close(output, module.out_proj(sequence @ weight.T))


class Nested(nn.Module):
    """Attention in a module of its own and in the module around it, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Runs(lambda x: (x @ x.mT).softmax(-1) @ x)
        self.soft = nn.Softmax(-1)
        self.head = Runs(lambda x: F.softmax(x.mean(1), -1))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.inner(self.inner(tokens))
        return self.head(self.soft(tokens @ tokens.mT) @ tokens)


def test_calls_bear_the_path_of_the_innermost_module_and_their_number():
    module, tokens = Nested(), normal(2, 5, 8)
    with Seeing(module) as seeing:
        module(tokens)
    found = [(call.path, call.call) for call in seeing.all]
    # A softmax that is a module belongs to the module around it.
    assert found == [("inner", 0), ("inner", 1), ("", 0), ("head", 0)]
    assert seeing.seen == {"inner": 2, "": 1, "head": 1}


def test_only_what_was_asked_for_is_looked_at():
    module, tokens = Nested(), normal(2, 5, 8)
    with Seeing(module, "head") as seeing:
        module(tokens)
    assert [call.path for call in seeing.all] == ["head"]
    with Seeing(module, "head") as seeing:
        tokens.softmax(-1)
    assert not seeing.all


def fail(tokens):
    raise ValueError("no tokens")


def test_hooks_go_though_the_module_fails():
    module = Nested()
    module.inner.function = fail
    with pytest.raises(ValueError, match="no tokens"), Seeing(module):
        module(normal(2, 5, 8))
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_gated_positional_attention_is_the_mixture():
    torch.manual_seed(0)
    module = timm.models.convit.GPSA(12, num_heads=3).eval()
    tokens = normal(2, 16, 12)
    output = module(tokens)
    expected = module.get_attention(tokens)
    with Seeing(module) as seeing:
        assert torch.equal(module(tokens), output)
    (call,) = seeing.all
    assert call.path == ""
    torch.testing.assert_close(call.logits().softmax(-1), expected.detach())
    own = torch.arange(16).expand(2, 3, 16)
    with Seeing(module, reads=own):
        output = module(tokens)
    torch.testing.assert_close(output, module.proj(module.v(tokens)))
