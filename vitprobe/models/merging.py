"""Tensors that other code keeps apart and timm's VisionTransformer keeps in one.

Whatever the dialect, an encoder's renamed tensors may hold, of each block: `attn.q`, `attn.k` and
`attn.v` instead of `attn.qkv`; `attn.q_bias` and `attn.v_bias` instead of its bias (keys have none,
as in BEiT); `gamma_1` and `gamma_2` instead of `ls1.gamma` and `ls2.gamma`; `mlp.fc1_g` and
`mlp.fc1_x`, gate and value of a SwiGLU, instead of the two in `mlp.fc1`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_BLOCK = re.compile(r"blocks\.\d+\.")


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of one layer together; what lacks its counterpart stays as it is.

    Raises RuntimeError where shapes do not go together, or where some are integers.
    """
    tensors = dict(tensors)
    blocks = dict.fromkeys(match[0] for key in tensors if (match := _BLOCK.match(key)))
    # Keys go without a bias in the whole model, or in none of its blocks: then one was lost.
    biased = any(f"{block}attn.k.bias" in tensors for block in blocks)
    for block in blocks:
        for number in "12":
            _join(tensors, f"{block}ls{number}.gamma", [f"{block}gamma_{number}"])
        for kind in ("weight", "bias"):
            qkv = [f"{block}attn.{name}.{kind}" for name in "qkv"]
            if kind == "bias" and not biased:
                _add_zeros(tensors, *qkv)
            _join(tensors, f"{block}attn.qkv.{kind}", qkv)
            gated = [f"{block}mlp.fc1_{name}.{kind}" for name in "gx"]
            _join(tensors, f"{block}mlp.fc1.{kind}", gated)
        biases = [f"{block}attn.{name}_bias" for name in "qkv"]
        _add_zeros(tensors, *biases)
        _join(tensors, f"{block}attn.qkv.bias", biases)
    return tensors


def _add_zeros(tensors: dict[str, Tensor], query: str, key: str, value: str) -> None:
    if query in tensors and value in tensors:
        tensors.setdefault(key, torch.zeros_like(tensors[query]))


def _join(tensors: dict[str, Tensor], whole: str, parts: list[str]) -> None:
    if whole not in tensors and all(part in tensors for part in parts):
        if not all(tensors[part].is_floating_point() for part in parts):
            raise RuntimeError(f"not all parts of {whole} are floating-point numbers")
        tensors[whole] = torch.cat([tensors.pop(part) for part in parts])
