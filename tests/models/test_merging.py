from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitprobe.models.merging import merged


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_queries_keys_and_values_are_joined_in_this_order() -> None:
    q, k, v = random(4, 4), random(4, 4), random(4, 4)
    joined = merged({f"blocks.3.attn.{n}.weight": t for n, t in zip("qkv", (q, k, v), strict=True)})
    assert list(joined) == ["blocks.3.attn.qkv.weight"]
    assert torch.equal(joined["blocks.3.attn.qkv.weight"], torch.cat([q, k, v]))


def test_keys_without_bias_get_zeros() -> None:
    q, v = random(4), random(4)
    expected = torch.cat([q, torch.zeros(4), v])
    for names in ("blocks.0.attn.{}.bias", "blocks.0.attn.{}_bias"):
        joined = merged({names.format("q"): q, names.format("v"): v})
        assert list(joined) == ["blocks.0.attn.qkv.bias"]
        assert torch.equal(joined["blocks.0.attn.qkv.bias"], expected)


def test_a_bias_of_keys_that_was_lost_is_not_made_up() -> None:
    tensors = {f"blocks.{i}.attn.{n}.bias": random(4) for i in range(2) for n in "qkv"}
    del tensors["blocks.0.attn.k.bias"]
    joined = merged(tensors)
    assert "blocks.1.attn.qkv.bias" in joined
    assert "blocks.0.attn.qkv.bias" not in joined
    assert {"blocks.0.attn.q.bias", "blocks.0.attn.v.bias"} <= joined.keys()


def test_gate_comes_before_value() -> None:
    gate, value = random(6, 4), random(6, 4)
    joined = merged({"blocks.0.mlp.fc1_x.weight": value, "blocks.0.mlp.fc1_g.weight": gate})
    assert torch.equal(joined["blocks.0.mlp.fc1.weight"], torch.cat([gate, value]))


def test_layer_scale_has_one_name() -> None:
    gamma = random(4)
    assert torch.equal(merged({"blocks.0.gamma_2": gamma})["blocks.0.ls2.gamma"], gamma)


@pytest.mark.parametrize("extra", ["q.bias", "q_bias", "v_bias"])
def test_what_is_there_stays_and_what_lacks_its_counterpart_too(extra: str) -> None:
    tensors = {"blocks.0.attn.qkv.bias": random(12), f"blocks.0.attn.{extra}": random(4)}
    assert merged(tensors) == tensors


def test_shapes_that_do_not_go_together() -> None:
    tensors = {"blocks.0.mlp.fc1_g.weight": random(6, 4), "blocks.0.mlp.fc1_x.weight": random(6, 5)}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        merged(tensors)
