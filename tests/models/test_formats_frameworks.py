"""Checkpoints of training frameworks, and of JAX, written by hand under their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import CheckpointError
from vitprobe.models import load

Tensors = dict[str, Tensor]
Tiny = Callable[..., nn.Module]

_MMPRETRAIN = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm\.", "ln1."),
    (r"^fc_norm\.", "ln2."),
    (r"^norm_pre\.", "pre_norm."),
    (r"^blocks\.(\d+)\.norm", r"layers.\1.ln"),
    (r"^blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
    (r"^blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
    (r"^blocks\.(\d+)\.ls1\.gamma", r"layers.\1.attn.gamma1.weight"),
    (r"^blocks\.(\d+)\.ls2\.gamma", r"layers.\1.ffn.gamma2.weight"),
    (r"^blocks\.", "layers."),
)


def renamed(tensors: Tensors, rules: tuple[tuple[str, str], ...], prefix: str = "") -> Tensors:
    result = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[prefix + key] = tensor
    return result


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return renamed(tensors, (), prefix)


def same(model: Any, source: Any, images: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            model.module.forward_features(images),
            source.forward_features(images),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"pre_norm": True, "embed_layer": PatchEmbed},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg"},
    ],
)
def test_mmpretrain(tmp_path: Path, tiny: Tiny, images: Tensor, arguments: dict[str, Any]) -> None:
    source = tiny(**arguments)
    own = renamed(source.state_dict(), _MMPRETRAIN, "backbone.")
    content = {"meta": {"epoch": 3}, "state_dict": {**own, "head.fc.weight": torch.zeros(5, 32)}}
    path = tmp_path / "epoch_3.pth"
    torch.save(content, path)
    model = load(path, heads=4)
    same(model, source, images)
    report = model.report
    assert report is not None
    assert (report.dialect, report.unexpected) == ("mmpretrain", ())
    assert report.ignored == ("head.fc.weight",)


def test_mmpretrains_beit(tmp_path: Path, images: Tensor) -> None:
    source = Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, init_values=0.1,
        use_rel_pos_bias=True, num_classes=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    own = renamed(source.state_dict(), _MMPRETRAIN, "backbone.")
    own = {re.sub(r"(layers\.\d+\.)ln", r"\1norm", key): tensor for key, tensor in own.items()}
    path = tmp_path / "beit.pth"
    torch.save({"state_dict": own}, path)
    model = load(path)
    same(model, source, images)
    assert model.facts["heads"].evidence == "tensor shape"


@pytest.mark.parametrize(("method", "heads"), [("mocov3", 12), ("mae", 12), ("dino", 6)])
def test_solo_learn(tmp_path: Path, tiny: Tiny, images: Tensor, method: str, heads: int) -> None:
    """Its Small has 12 heads or 6, by the method."""
    source = tiny(embed_dim=48, num_heads=heads)
    other = {key: tensor + 1 for key, tensor in source.state_dict().items()}
    content = {
        "state_dict": {
            **prefixed(source.state_dict(), "backbone."),
            **prefixed(other, "momentum_backbone."),
            "projector.0.weight": torch.zeros(8, 48),
            "momentum_projector.0.weight": torch.zeros(8, 48),
            "predictor.0.weight": torch.zeros(8, 8),
            "classifier.weight": torch.zeros(5, 48),
        },
        "hyper_parameters": {"method": method, "backbone": {"name": "vit_small"}},
    }
    path = tmp_path / "solo.ckpt"
    torch.save(content, path)
    model = load(path)
    same(model, source, images)
    report = model.report
    assert report is not None
    assert (report.dialect, report.branch, report.unexpected) == ("solo_learn", "model", ())
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (heads, "args")
    momentum = load(path, branch="momentum")
    assert momentum.report is not None
    assert momentum.report.branch == "momentum_backbone"
    torch.testing.assert_close(momentum.module.state_dict(), other)


def test_lightly_by_its_names(tmp_path: Path, tiny: Tiny, images: Tensor) -> None:
    source = tiny()
    other = {key: tensor + 1 for key, tensor in source.state_dict().items()}
    content = {
        **prefixed(source.state_dict(), "backbone.vit."),
        "backbone.mask_token": torch.zeros(1, 1, 32),
        **prefixed(other, "student_backbone.vit."),
        "student_projection_head.layers.0.weight": torch.zeros(8, 32),
    }
    path = tmp_path / "lightly.ckpt"
    torch.save({"state_dict": content}, path)
    model = load(path, heads=4)
    same(model, source, images)
    report = model.report
    assert report is not None
    assert (report.dialect, report.branch, report.unexpected) == ("lightly", "model", ())
    student = load(path, heads=4, branch="student")
    torch.testing.assert_close(student.module.state_dict(), other)


def test_lightly_itself(tmp_path: Path, tiny: Tiny, images: Tensor) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    masked = modules.MaskedVisionTransformerTIMM(vit=tiny()).eval()
    with torch.no_grad():  # its constructor draws all weights anew
        for parameter in masked.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = masked

    path = tmp_path / "lightly.ckpt"
    torch.save({"state_dict": Method().state_dict()}, path)
    model = load(path, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.module.forward_features(images), masked.encode(images), atol=1e-5, rtol=0
        )


def flax_names(
    heads: int, tensors: Tensors, *, big_vision: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """timm's tensors as Flax has them: kernels as (in, out), one axis for heads."""
    attention, mlp = ("_0", "_0") if big_vision else ("_1", "_3")
    second = "LayerNorm_1" if big_vision else "LayerNorm_2"
    arrays: dict[str, Tensor] = {
        "cls": tensors["cls_token"],
        "embedding/kernel": tensors["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding": tensors[
            "pos_embed"
        ],
    }
    for name, norm in (("encoder_norm", "norm"),):
        arrays[f"Transformer/{name}/scale"] = tensors[f"{norm}.weight"]
        arrays[f"Transformer/{name}/bias"] = tensors[f"{norm}.bias"]
    width = tensors["norm.weight"].numel()
    for block in range(2):
        own, root = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        for flax, norm in (("LayerNorm_0", "norm1"), (second, "norm2")):
            arrays[f"{root}{flax}/scale"] = tensors[f"{own}{norm}.weight"]
            arrays[f"{root}{flax}/bias"] = tensors[f"{own}{norm}.bias"]
        root_of_attention = f"{root}MultiHeadDotProductAttention{attention}/"
        weights = tensors[f"{own}attn.qkv.weight"].chunk(3)
        biases = tensors[f"{own}attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{root_of_attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{root_of_attention}{name}/bias"] = bias.reshape(heads, -1)
        out = tensors[f"{own}attn.proj.weight"].T
        arrays[f"{root_of_attention}out/kernel"] = out.reshape(heads, -1, width)
        arrays[f"{root_of_attention}out/bias"] = tensors[f"{own}attn.proj.bias"]
        for index in range(2):
            linear = f"{own}mlp.fc{index + 1}"
            arrays[f"{root}MlpBlock{mlp}/Dense_{index}/kernel"] = tensors[f"{linear}.weight"].T
            arrays[f"{root}MlpBlock{mlp}/Dense_{index}/bias"] = tensors[f"{linear}.bias"]
    return {key: tensor.contiguous().numpy() for key, tensor in arrays.items()}


@pytest.mark.parametrize("big_vision", [False, True])
def test_jax(tmp_path: Path, tiny: Tiny, images: Tensor, big_vision: bool) -> None:
    """timm's own reader of these files, given Flax's GELU, is the reference."""
    written = tiny()
    arrays = flax_names(4, written.state_dict(), big_vision=big_vision)
    prefix = "params/img/" if big_vision else ""
    arrays = {prefix + key: array for key, array in arrays.items()}
    head = {f"{prefix}head/kernel": np.zeros((32, 5), "f"), f"{prefix}head/bias": np.zeros(5, "f")}
    path = tmp_path / "ViT-odd.npz"
    np.savez(path, **arrays, **head)
    reference = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0,
        num_classes=5, act_layer="gelu_tanh",
    ).eval()  # fmt: skip
    reference.load_pretrained(str(path))
    model = load(path)
    same(model, reference, images)
    assert model.name == "ViT-odd"
    report = model.report
    assert report is not None
    assert (report.dialect, report.loaded_fraction, report.unexpected) == ("jax", 1, ())
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (4, "tensor shape")
    assert model.facts["activation"].evidence == "dialect"
    assert (model.mean, model.std) == ((0.5,) * 3, (0.5,) * 3)


def test_a_jax_file_without_a_kernel(tmp_path: Path, tiny: Tiny) -> None:
    arrays = flax_names(4, tiny().state_dict(), big_vision=False)
    del arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel"]
    path = tmp_path / "vit.npz"
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.mlp\.fc2\.weight"):
        load(path)


def test_timm_reads_the_same_file(tmp_path: Path) -> None:
    """The hub's folders of timm: an architecture by name, with its statistics."""
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": '
        '{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}'
    )
    model = load(tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    same(model, source, images)
    assert model.mean == (0.5, 0.5, 0.5)


def test_mmpretrain_resizes_positions_without_antialiasing(tmp_path: Path, tiny: Tiny) -> None:
    tensors = renamed(tiny().state_dict(), _MMPRETRAIN, "backbone.")
    path = tmp_path / "mmpretrain.pth"
    torch.save({"state_dict": tensors, "meta": {}}, path)
    fact = load(path, heads=4, size=24).facts["position_embedding"]
    assert fact.value == "resized bicubic, not antialiased, from 4x4 to 6x6"


def test_a_hybrid_of_jax_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    arrays = flax_names(4, tiny(patch_size=1, in_chans=8).state_dict(), big_vision=False)
    stem = {"conv_root/kernel": np.zeros((7, 7, 3, 8), "f"), "gn_root/scale": np.zeros(8, "f")}
    path = tmp_path / "R50+ViT.npz"
    np.savez(path, **arrays, **stem)
    with pytest.raises(CheckpointError, match=r"also holds .*conv_root"):
        load(path)


def test_timm_names_a_grid_that_is_not_square(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny(img_size=(8, 32))
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_odd", "model_args": {"num_heads": 4}, '
        '"pretrained_cfg": {"input_size": [3, 8, 32]}}'
    )
    model = load(tmp_path)
    torch.testing.assert_close(model.module.state_dict(), source.state_dict())
    assert (model.facts["grid"].value, model.facts["grid"].evidence) == ((2, 8), "config")
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (4, "config")
