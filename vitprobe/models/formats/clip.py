"""Image towers of CLIP: OpenAI's, https://github.com/openai/CLIP, and open_clip's,
https://github.com/mlfoundations/open_clip.

The whole model's file has the tower under `visual.`, the text tower beside it. The tokens are
normalised before the blocks, the patch embedding has no bias, and LayerNorm's epsilon is torch's
1e-5. OpenAI trained with QuickGELU; most of open_clip's own weights use GELU, and nothing in a file
tells: only what OpenAI's releases hold beside the weights (`input_resolution`, …), or the
`open_clip_config.json` of a folder, does. `,activation=quick_gelu` sets it.

open_clip's other towers, SigLIP's among them, are timm's models, under `visual.trunk.`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vitprobe.models.formats.base import Branch, Dialect, Settings, Tensors

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_RELEASE = ("input_resolution", "context_length", "vocab_size")
_BLOCK = r"^transformer\.resblocks\.(\d+)\."
_RENAME = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (_BLOCK + r"ln_([12])\.", r"blocks.\1.norm\2."),
    (_BLOCK + r"attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (_BLOCK + r"attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (_BLOCK + r"mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (_BLOCK + r"mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    (_BLOCK + r"ls_([12])\.gamma$", r"blocks.\1.ls\2.gamma"),
    (_BLOCK, r"blocks.\1."),
)
# The projections into the shared space, and all of the text tower: of its blocks only what the
# image tower's have too, whose own are never left over.
_IGNORED = (
    r"(text_)?proj(ection)?$|head\.|attn_pool\.|text|logit_|token_embedding|positional_embedding$"
    r"|transformer\.resblocks\.\d+\.(ln_[12]\.|attn\.(in_proj_|out_proj\.)|mlp\.c_(fc|proj)\.)"
    rf"|ln_final\.|attn_mask$|({'|'.join(_RELEASE)})$"
)


def _convert(tensors: Tensors) -> Tensors:
    converted = dict(tensors)
    for key, dimensions in (("cls_token", 1), ("pos_embed", 2)):
        if key in tensors and tensors[key].ndim == dimensions:
            converted[key] = tensors[key].reshape(1, -1, tensors[key].shape[-1])
    return converted


def _inner(settings: Settings, *names: str) -> Mapping[str, Any]:
    """The mapping under these names, one within the other; empty where there is none."""
    for name in names:
        value = settings.get(name)
        settings = value if isinstance(value, Mapping) else {}
    return settings


def _stated(settings: Settings) -> Mapping[str, Any]:
    """Facts in an `open_clip_config.json`."""
    model, images = _inner(settings, "model_cfg"), _inner(settings, "preprocess_cfg")
    tower = _inner(model, "vision_cfg")
    width, head_width = tower.get("width"), tower.get("head_width", 64)
    counted = isinstance(width, int) and isinstance(head_width, int) and head_width > 0
    tanh = _inner(tower, "act_kwargs").get("approximate") == "tanh"
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
    return {
        "timm_model": tower.get("timm_model_name"),
        "num_heads": width // head_width if counted else None,
        "norm_eps": _inner(tower, "norm_kwargs").get("eps"),
        "activation": activation if tower else None,
        "img_size": tower.get("image_size"),
        "mean": images.get("mean"),
        "std": images.get("std"),
    }


def _is_without_norm(branches: Sequence[Branch], settings: Settings) -> bool:
    return _inner(settings, "model_cfg", "vision_cfg").get("no_ln_pre") is True and any(
        "conv1.weight" in branch.keys for branch in branches
    )


OPENAI_CLIP = Dialect(
    name="openai_clip",
    recognise=lambda branches, settings: any(
        key in branch.tensors for branch in branches for key in _RELEASE
    ),
    landmark="ln_pre.weight",
    ignored=_IGNORED,
    rename=_RENAME,
    convert=_convert,
    fixed={"norm_eps": 1e-5, "activation": "quick_gelu", "mean": _MEAN, "std": _STD},
)
OPEN_CLIP = replace(
    OPENAI_CLIP,
    name="open_clip",
    recognise=lambda branches, settings: True,
    stated=_stated,
    fixed={"norm_eps": 1e-5},
    usual={"activation": "gelu", "mean": _MEAN, "std": _STD},
)
# CLIPA's have no norm before the blocks, which only the config beside them tells from a lost one.
OPEN_CLIP_WITHOUT_NORM = replace(
    OPEN_CLIP,
    recognise=_is_without_norm,
    landmark="class_embedding",
    fixed={**OPEN_CLIP.fixed, "patch_bias": False},
)
OPEN_CLIP_TIMM = Dialect(
    name="open_clip",
    recognise=lambda branches, settings: any(
        branch.prefix.endswith("visual.trunk.") for branch in branches
    ),
    ignored=_IGNORED,
    stated=lambda settings: {
        key: value
        for key, value in _stated(settings).items()
        if key in ("timm_model", "mean", "std")
    },
)
