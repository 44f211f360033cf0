"""The original Vision Transformers of JAX: https://github.com/google-research/vision_transformer
and https://github.com/google-research/big_vision, as `.npz`.

Names of Flax, with "." for "/": `Transformer.encoderblock_N`, kernels as (in, out), those of
queries, keys and values as (width, heads, channels), which gives the number of heads. In front
stands nothing, `opt.target.`, `params.` or `params.img.`. Flax's GELU is the tanh approximation
(timm computes the exact one with the same weights), its LayerNorm has 1e-6, and images were scaled
to -1 … 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitprobe.models.formats.base import Dialect, Tensors

_BLOCK = r"^Transformer\.encoderblock_(\d+)\."
_ATTENTION = _BLOCK + r"MultiHeadDotProductAttention_\d\."
_IGNORED = r"(head|pre_logits|MAPHead_0)\.|(opt|txt|params)\.|t$|b$"


def _seen(tensors: Tensors) -> Mapping[str, Any]:
    kernel = tensors.get("blocks.0.attn.q.kernel")
    return {} if kernel is None or kernel.ndim != 3 else {"num_heads": kernel.shape[1]}


def _convert(tensors: Tensors) -> Tensors:
    return dict(_converted(key, tensor) for key, tensor in tensors.items())


def _converted(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    name = key.removesuffix(".kernel") + ".weight"
    if key.endswith("patch_embed.proj.kernel"):
        return name, tensor.permute(3, 2, 0, 1)
    if key.endswith("attn.proj.kernel"):
        return name, tensor.flatten(0, 1).T
    if key.endswith(".kernel"):
        return name, tensor.flatten(1).T
    if key.endswith((".attn.q.bias", ".attn.k.bias", ".attn.v.bias")):
        return key, tensor.flatten()
    return key, tensor


JAX = Dialect(
    name="jax",
    recognise=lambda branches, settings: any(
        key.startswith("Transformer.") for branch in branches for key in branch.keys
    ),
    landmark="embedding.kernel",
    ignored=_IGNORED,
    rename=(
        (r"^cls$", "cls_token"),
        (r"^(Transformer\.posembed_input\.)?pos_embedding$", "pos_embed"),
        (r"^embedding\.", "patch_embed.proj."),
        # The convolutional network before the hybrids' patches, which is refused.
        (r"^(conv_root|gn_root|block\d+)\.", r"patch_embed.backbone.\1."),
        (r"^Transformer\.encoder_norm\.", "norm."),
        (_BLOCK + r"LayerNorm_0\.", r"blocks.\1.norm1."),
        (_BLOCK + r"LayerNorm_[12]\.", r"blocks.\1.norm2."),
        (_ATTENTION + r"out\.", r"blocks.\1.attn.proj."),
        (_ATTENTION + r"([qkv])(uery|ey|alue)\.", r"blocks.\1.attn.\2."),
        (_BLOCK + r"MlpBlock_\d\.Dense_0\.", r"blocks.\1.mlp.fc1."),
        (_BLOCK + r"MlpBlock_\d\.Dense_1\.", r"blocks.\1.mlp.fc2."),
        (_BLOCK, r"blocks.\1."),
        (r"^((?:blocks\.\d+\.)?norm[12]?)\.scale$", r"\1.weight"),
    ),
    convert=_convert,
    seen=_seen,
    fixed={"norm_eps": 1e-6, "activation": "gelu_tanh", "mean": (0.5,), "std": (0.5,)},
)
