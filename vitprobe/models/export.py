"""Write a model as a folder that timm or transformers loads, with nothing more to be said.

    timm.create_model("local-dir:FOLDER", pretrained=True)          # timm >= 1.0.16
    transformers.ViTModel.from_pretrained("FOLDER")                 # transformers 4.51 to 5
    transformers.ViTForImageClassification.from_pretrained("FOLDER")  # where there is a head
    transformers.AutoImageProcessor.from_pretrained("FOLDER")

Neither library can say everything a Vision Transformer may hold; what one cannot say is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import ResultError, SourceError
from vitprobe.models.loading import load
from vitprobe.models.model import ASSUMED, Model

Target = Literal["timm", "hf"]

_CONFIG, _WEIGHTS, _PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_OWN = {_CONFIG, _WEIGHTS, _PREPROCESSOR}
# Entries of timm's registry through which every size of these two classes is made.
_ENTRIES = {
    VisionTransformer: "vit_tiny_patch16_224",
    VisionTransformerDistilled: "deit_tiny_distilled_patch16_224",
}
_TIMM_EPS = 1e-6

# timm's names → those of transformers 4, which 5 reads as well.
_TO_HF = (
    (r"cls_token$", "embeddings.cls_token"),
    (r"pos_embed$", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"norm\.", "layernorm."),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
# What transformers' ViT has no place for, and what it always has, by the tensor that shows it.
_NO_PLACE = {
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "norm_pre.weight": "a norm before its blocks",
    "fc_norm.weight": "a norm after pooling (fc_norm)",
    "blocks.0.ls1.gamma": "layer scale",
    "blocks.0.attn.q_norm.weight": "norms of queries and keys",
}
_NEEDED = {
    "cls_token": "class token",
    "pos_embed": "position embeddings",
    "norm.weight": "final norm",
    "patch_embed.proj.bias": "bias in its patch embedding",
    "blocks.0.attn.proj.bias": "bias in its projections",
}


def export(spec: str | os.PathLike[str], to: Target, out: Path, *, force: bool = False) -> Path:
    """Write the model of `spec` (of `vitprobe.load`, or a run's folder) into the new folder `out`.

    "timm": model.safetensors and config.json. The weights' file is also one that `vitprobe.load`
    takes, heads, mean, std and training included.

    "hf": the same with transformers' names, and preprocessor_config.json. Tokens after the final
    norm are `last_hidden_state`; without a head, the pooler hands on the class token as it is. The
    image processor resizes the whole image: unlike vitprobe and timm it cuts out no square.

    Returns `out`. The folder appears whole or not at all; `force` replaces an earlier export.

    Raises:
        SourceError: the model is none that the library can express.
        ResultError: `out` exists (without `force`), is no export, or cannot be written.
    """
    if to not in get_args(Target):
        raise ResultError(f"'{to}' is no format to export to; there are timm and hf")
    out = Path(out)
    _check_folder(out, force)
    spec = os.fspath(spec)
    model = load(f"run:{spec}" if Path(spec).is_dir() else spec)
    module = _plain(model)
    tensors, header, files = (_for_timm if to == "timm" else _for_hf)(model, module)
    if model.facts["heads"].evidence == ASSUMED:
        warnings.warn(
            f"nothing says how many attention heads '{spec}' has: {model.facts['heads'].value} are "
            "assumed and exported; give heads=N in the spec if it has others",
            stacklevel=2,
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}.", suffix=".part"
        ) as part:
            fresh = Path(part, "new")
            fresh.mkdir()
            save_file(tensors, fresh / _WEIGHTS, metadata={"format": "pt", **header})
            for name, content in files.items():
                text = json.dumps(content, indent=2, ensure_ascii=False)
                (fresh / name).write_text(f"{text}\n", encoding="utf-8")
            if out.exists():
                os.replace(out, Path(part, "old"))
            os.replace(fresh, out)
    except OSError as error:
        raise ResultError(f"cannot write '{out}': {error.strerror or error}") from error
    return out


def _check_folder(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise ResultError(f"'{out}' exists; choose another folder, or force replacing its export")
    if out.is_symlink() or not out.is_dir():
        raise ResultError(f"'{out}' is no folder; choose another")
    if others := sorted({path.name for path in out.iterdir()} - _OWN):
        raise ResultError(f"'{out}' is no export, for it holds {others[0]}; choose another folder")


def _plain(model: Model) -> VisionTransformer:
    """The module, if it is timm's own Vision Transformer with its usual parts."""
    module: Any = model.module
    usual = type(module) in _ENTRIES and all(
        (type(block), type(block.attn), type(block.mlp)) == (Block, Attention, Mlp)
        and type(block.mlp.act) is nn.GELU
        and block.mlp.act.approximate == "none"
        for block in module.blocks
    )
    if not usual:
        raise SourceError(
            f"'{model.spec}' is no plain Vision Transformer with GELU, which is all that is "
            "exported."
        )
    return cast(VisionTransformer, module)


Folder = tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]


def _for_timm(model: Model, module: VisionTransformer) -> Folder:
    if (eps := _eps(model, module)) != _TIMM_EPS:
        raise SourceError(
            f"'{model.spec}' has a LayerNorm epsilon of {eps:g}, and timm's configuration can only "
            f"say {_TIMM_EPS:g}; export it to hf."
        )
    stated, unusual = _arguments(module)
    entry = _ENTRIES[type(module)]
    _check_rebuilt(model, module, entry, stated | unusual)
    described = {
        "architecture": {**stated, "norm_eps": eps},
        "mean": list(model.mean),
        "std": list(model.std),
        **(model.training or {}),
    }
    config = {
        "architecture": entry,
        "num_classes": module.num_classes,
        "num_features": module.num_features,
        "global_pool": module.global_pool,
        "model_args": stated | unusual,
        "pretrained_cfg": {
            "num_classes": module.num_classes,
            "input_size": list(model.input_size),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(model.mean),
            "std": list(model.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head" if type(module) is VisionTransformer else ["head", "head_dist"],
        },
    }
    if labels := _labels(model, module):
        config["label_names"] = labels
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    return tensors, {"vitprobe": json.dumps(described)}, {_CONFIG: config}


def _for_hf(model: Model, module: VisionTransformer) -> Folder:
    tensors = module.state_dict()
    for key, part in _NO_PLACE.items():
        if key in tensors:
            raise SourceError(f"'{model.spec}' has {part}, which transformers' ViT does not have.")
    for key, part in _NEEDED.items():
        if key not in tensors:
            raise SourceError(f"'{model.spec}' has no {part}, which transformers' ViT needs.")
    if module.num_classes and module.global_pool != "token":
        raise SourceError(
            f"'{model.spec}' classifies its pooled patches, where transformers' ViT classifies the "
            "class token."
        )
    block = cast(Any, module.blocks[0])
    _, height, width = model.input_size
    config: dict[str, Any] = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if module.num_classes else "ViTModel"],
        "hidden_size": module.embed_dim,
        "num_hidden_layers": len(module.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": _eps(model, module),
        "image_size": _side(model.input_size[1:]),
        "patch_size": _side(module.patch_embed.patch_size),
        "num_channels": model.input_size[0],
        "qkv_bias": block.attn.qkv.bias is not None,
        "pooler_act": "linear",
        "torch_dtype": "float32",
    }
    if module.num_classes:
        labels = _labels(model, module) or [str(i) for i in range(module.num_classes)]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
        "do_convert_rgb": model.input_size[0] == 3,
    }
    return _hf_tensors(module), {}, {_CONFIG: config, _PREPROCESSOR: preprocessor}


def _hf_tensors(module: VisionTransformer) -> dict[str, Tensor]:
    """The state dict under transformers' names."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        if match := _QKV.match(key):
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"encoder.layer.{match[1]}.attention.attention.{name}.{match[2]}"] = part
            continue
        for pattern, replacement in _TO_HF:
            key = re.sub(f"^{pattern}", replacement, key)
        tensors[key] = tensor
    if module.no_embed_class:
        # The class token has no position there, and one of zeros is the same.
        patches = tensors["embeddings.position_embeddings"]
        tensors["embeddings.position_embeddings"] = nn.functional.pad(patches, (0, 0, 1, 0))
    if module.num_classes:
        head = {key: tensors.pop(key) for key in ("head.weight", "head.bias")}
        tensors = {f"vit.{key}": tensor for key, tensor in tensors.items()}
        tensors |= {key.replace("head", "classifier"): tensor for key, tensor in head.items()}
    else:
        # ViTModel always pools, by a layer on the class token: this one changes nothing.
        tensors["pooler.dense.weight"] = torch.eye(module.embed_dim)
        tensors["pooler.dense.bias"] = torch.zeros(module.embed_dim)
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _arguments(module: VisionTransformer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of timm's VisionTransformer: those that vitprobe's own files state, and those that
    it reads from tensors, where they are not timm's defaults."""
    embed, block = module.patch_embed, cast(Any, module.blocks[0])
    attention, hidden = block.attn, block.mlp.fc1.out_features
    ratio = hidden / module.embed_dim
    if int(module.embed_dim * ratio) != hidden:
        ratio = math.nextafter(ratio, math.inf)
    stated = {
        "img_size": list(embed.img_size),
        "patch_size": _side(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": module.num_classes,
        "global_pool": module.global_pool,
        "embed_dim": module.embed_dim,
        "depth": len(module.blocks),
        "num_heads": attention.num_heads,
        "mlp_ratio": ratio,
        "qkv_bias": attention.qkv.bias is not None,
        "class_token": module.cls_token is not None,
        "no_embed_class": module.no_embed_class,
        "reg_tokens": module.num_reg_tokens,
    }
    if not isinstance(block.ls1, nn.Identity):
        stated["init_values"] = 1.0
    unusual = {
        "qk_norm": (not isinstance(attention.q_norm, nn.Identity), False),
        "proj_bias": (attention.proj.bias is not None, True),
        "pre_norm": (not isinstance(module.norm_pre, nn.Identity), False),
        "fc_norm": (not isinstance(module.fc_norm, nn.Identity), module.global_pool == "avg"),
    }
    return stated, {name: value for name, (value, usual) in unusual.items() if value != usual}


def _check_rebuilt(
    model: Model, module: VisionTransformer, entry: str, arguments: dict[str, Any]
) -> None:
    """Raise SourceError where timm would make another model of these arguments."""
    images = torch.rand(2, *model.input_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            rebuilt = timm.create_model(entry, pretrained=False, **arguments).eval()
            rebuilt.load_state_dict(module.state_dict())
            same = torch.allclose(rebuilt(images), module(images), rtol=1e-4, atol=1e-4)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        same = False
    if not same:
        raise SourceError(
            f"'{model.spec}' cannot be exported to timm: its configuration for {entry} does not "
            "describe all parts of this model."
        )


def _eps(model: Model, module: nn.Module) -> float:
    """The epsilon of all its LayerNorms."""
    found = {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}
    if len(found) != 1:
        raise SourceError(f"'{model.spec}' has not one LayerNorm epsilon but {len(found)}.")
    return found.pop()


def _labels(model: Model, module: VisionTransformer) -> list[str]:
    """Names of the classes, where the run that trained the head left them."""
    names = (model.training or {}).get("classes", [])
    return list(map(str, names)) if len(names) == module.num_classes else []


def _side(size: tuple[int, ...]) -> int | list[int]:
    """One number for a square, else [height, width]."""
    return size[0] if len(set(size)) == 1 else list(size)
