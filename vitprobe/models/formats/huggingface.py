"""Vision Transformers of transformers, https://github.com/huggingface/transformers.

Files of `save_pretrained`, or of a model's own `state_dict()`: transformers 5 renamed its modules
but mostly not what it writes, and both are read. What stands in front says which model it was:
`vit.`, `dinov2.`, `vision_model.` or nothing. Queries, keys and values lie apart. The number of
heads, the LayerNorm epsilon and the activation are in the `config.json` of a saved folder; to a
file alone apply the defaults of transformers, as assumed.

Positions are resized without antialiasing, as transformers does, but with it where there are
registers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitprobe.models.formats.base import Dialect, Settings, Tensors, fold_class_position

_BLOCK = r"^(blocks\.\d+)\."
_RENAME = (
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_)?layernorm\.", "norm."),
    # BEiT without a final norm normalises what it has pooled.
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^((encoder|model)\.)?layers?\.(?=\d)", "blocks."),
    (_BLOCK + r"(layernorm_before|layer_norm1)\.", r"\1.norm1."),
    (_BLOCK + r"(layernorm_after|layer_norm2)\.", r"\1.norm2."),
    (_BLOCK + r"(attention\.attention\.)?relative_position_bias\.", r"\1.attn."),
    (_BLOCK + r"attention\.attention\.([qkv])(uery|ey|alue)\.", r"\1.attn.\2."),
    (_BLOCK + r"(?:attention|self_attn)\.([qkv])_proj\.", r"\1.attn.\2."),
    (_BLOCK + r"attention\.(output\.dense|o_proj)\.", r"\1.attn.proj."),
    (_BLOCK + r"self_attn\.out_proj\.", r"\1.attn.proj."),
    (_BLOCK + r"(intermediate\.dense|mlp\.weights_in)\.", r"\1.mlp.fc1."),
    (_BLOCK + r"mlp\.gate_proj\.", r"\1.mlp.fc1_g."),
    (_BLOCK + r"mlp\.up_proj\.", r"\1.mlp.fc1_x."),
    (_BLOCK + r"(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", r"\1.mlp.fc2."),
    (_BLOCK + r"layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
    (_BLOCK + r"lambda_([12])$", r"\1.gamma_\2"),
)  # fmt: skip
# Where the config of a model with an image encoder in it has that encoder's.
_TOWERS = ("vision_config", "vision_config_dict", "backbone_config", "encoder")
_HEADS = r"layernorm\.|pooler\.|(\w+_)?classifier\.|decoder\.|lm_head\.|head\.|visual_projection\."
_IGNORED = (
    rf"{_HEADS}|text_|logit_|(beit\.)?embeddings\.(mask_token|position_ids)$"
    r"|.*relative_position_index$"
)


def _convert(tensors: Tensors) -> Tensors:
    # Older files keep this buffer, which follows from the grid.
    converted = {
        key: tensors[key] for key in tensors if not key.endswith("relative_position_index")
    }
    if "cls_token" in tensors and tensors["cls_token"].ndim == 1:
        converted["cls_token"] = tensors["cls_token"][None, None]
    if "pos_embed" in tensors and tensors["pos_embed"].ndim == 2:
        converted["pos_embed"] = tensors["pos_embed"][None]
    if "reg_token" in tensors and not tensors["reg_token"].numel():
        del converted["reg_token"]
    for key in tensors:
        # A projection "up" is gated only where there is a gate.
        if ".mlp.fc1_x." in key and key.replace("fc1_x", "fc1_g") not in tensors:
            converted[key.replace("fc1_x", "fc1")] = converted.pop(key)
    return fold_class_position(converted)


def _seen(tensors: Tensors) -> Mapping[str, Any]:
    registers = "reg_token" in tensors and "pos_embed" in tensors
    return {"no_embed_class": True, "antialias": True} if registers else {}


def _stated(settings: Settings) -> Mapping[str, Any]:
    """Facts in a `config.json`, of the vision tower where there are two, and beside it."""
    towers = (settings.get(name) for name in _TOWERS)
    config = next((tower for tower in towers if isinstance(tower, Mapping)), settings)
    rope = config.get("rope_parameters")
    names = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "img_size": "image_size",
    }
    return {
        **{name: config.get(key) for name, key in names.items()},
        "rope_base": (rope if isinstance(rope, Mapping) else config).get("rope_theta"),
        **_statistics(settings),
    }


def _statistics(settings: Settings) -> Mapping[str, Any]:
    """What the preprocessor normalises by: a number a channel, one for all, or nothing at all."""
    if settings.get("do_normalize") is False:
        return {"mean": (0.0,), "std": (1.0,)}
    stated = {name: settings.get(f"image_{name}") for name in ("mean", "std")}
    return {
        name: (value,) if isinstance(value, int | float) else value
        for name, value in stated.items()
    }


def _dialect(
    landmark: str,
    own: str,
    norm_eps: float,
    activation: str = "gelu",
    *,
    rename: tuple[tuple[str, str], ...] = (),
    **fixed: Any,
) -> Dialect:
    """The dialect of the models that have a key with this part of their `own`."""
    return Dialect(
        name="huggingface",
        recognise=lambda branches, settings: any(
            re.search(rf"(^|\.){own}", key) for branch in branches for key in branch.keys
        ),
        ignored=_IGNORED,
        landmark=landmark,
        rename=(*rename, *_RENAME),
        convert=_convert,
        stated=_stated,
        seen=_seen,
        fixed={"antialias": False, **fixed},
        usual={"norm_eps": norm_eps, "activation": activation},
    )


_PATCHES = "embeddings.patch_embeddings.projection.weight"
_TOWER = "embeddings.patch_embedding.weight"

# As it is pre-trained, BEiT has its final norm outside the encoder and none within.
_BEIT_PRETRAINED = replace(
    _dialect(f"beit.{_PATCHES}", "", 1e-12, rename=((r"^beit\.", ""),)),
    recognise=lambda branches, settings: any(
        "layernorm.weight" in branch.keys and "beit.layernorm.weight" not in branch.keys
        for branch in branches
    ),
)
HUGGINGFACE = (
    _BEIT_PRETRAINED,
    _dialect(_PATCHES, "lambda_1$", 1e-12),  # BEiT, data2vec
    _dialect(_PATCHES, r"layer_scale1\.", 1e-6),  # DINOv2
    _dialect(_PATCHES, "", 1e-12),  # ViT, DeiT, ViTMAE, I-JEPA, ViT-MSN
    _dialect("embeddings.patch_embeddings.weight", r"layer_scale1\.", 1e-5, rope="dinov3"),
    _dialect(_TOWER, r"pre_layrnorm\.", 1e-5, "quick_gelu"),  # CLIP
    _dialect(_TOWER, "", 1e-6, "gelu_tanh"),  # SigLIP
)
