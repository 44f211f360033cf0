"""Files of DINOv2, DINOv3, BEiT, I-JEPA and iBOT, with transformers or timm as independent oracles.

The authors' own code is no package, so the tensors of a tiny random model of transformers are
written under the authors' names.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

from tests.models.conftest import SMALL
from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models import Fact, Model, load

Tensors = dict[str, Tensor]
Tiny = Callable[..., nn.Module]


def shaken(module: nn.Module) -> nn.Module:
    """The module with weights far from any initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def huggingface(name: str, **changes: Any) -> nn.Module:
    """A tiny random model of transformers, whose names in memory are those of its version 5."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**size, "image_size": 16, "patch_size": 4, "intermediate_size": 64, **changes}
    return shaken(
        getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    )


def hidden(module: nn.Module, images: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return module(images, **more).last_hidden_state


def features(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.forward_features(images)


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    return path


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


NAMES = (
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.lambda_([12])", r".gamma_\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)


def authors(module: nn.Module) -> Tensors:
    """transformers' tensors under the names that the authors' codes share."""
    tensors: Tensors = {}
    for key, tensor in module.state_dict().items():
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        tensors[key] = tensor
    for index in range(2):
        for kind in ("weight", "bias"):
            parts = [
                tensors.pop(f"blocks.{index}.attention.{name}_proj.{kind}", None) for name in "qkv"
            ]
            zeros = torch.zeros_like(parts[0])
            qkv = torch.cat([zeros if part is None else part for part in parts])
            tensors[f"blocks.{index}.attn.qkv.{kind}"] = qkv
    return tensors


def gated(tensors: Tensors, *, together: bool) -> Tensors:
    """SwiGLU's layers as DINOv2 (gate and value in w12) or DINOv3 (w1 and w2) names them."""
    tensors = dict(tensors)
    for index in range(2):
        mlp = f"blocks.{index}.mlp"
        for kind in ("weight", "bias"):
            gate, value, down = (
                tensors.pop(f"{mlp}.{name}_proj.{kind}") for name in ("gate", "up", "down")
            )
            if together:
                tensors[f"{mlp}.w12.{kind}"] = torch.cat([gate, value])
            else:
                tensors |= {f"{mlp}.w1.{kind}": gate, f"{mlp}.w2.{kind}": value}
            tensors[f"{mlp}.w3.{kind}"] = down
    return tensors


def chunked(tensors: Tensors) -> Tensors:
    """Blocks in chunks of one, as DINOv2's training names them: the index counts through."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", k): t for k, t in tensors.items()}


def dinov2(*, registers: bool, swiglu: bool = False) -> tuple[nn.Module, Tensors]:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    module = huggingface(name, mlp_ratio=2, use_swiglu_ffn=swiglu, layer_norm_eps=1e-6)
    tensors = authors(module)
    return module, gated(tensors, together=True) if swiglu else tensors


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_release(tmp_path: Path, images: Tensor, registers: bool, swiglu: bool) -> None:
    module, tensors = dinov2(registers=registers, swiglu=swiglu)
    model = load(saved(tmp_path, tensors), heads=4)
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.loaded_fraction) == ("dinov2", 1)
    assert (model.report.ignored, model.report.unexpected) == (("mask_token",), ())
    assert model.anatomy.prefix_tokens == (5 if registers else 1)
    assert model.facts["registers"] == Fact(4 if registers else 0, "tensor shape")
    assert model.facts["norm_eps"] == Fact(1e-6, "dialect", "that of dinov2")
    expected = ("SwiGLU", "tensor shape") if swiglu else ("GELU", "dialect")
    fact = model.facts["activation"]
    assert (fact.value, fact.evidence) == expected


def test_dinov2_training(tmp_path: Path, images: Tensor) -> None:
    module, tensors = dinov2(registers=True, swiglu=True)
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 32), "ibot_head.last.weight": torch.zeros(3)}
    teacher = prefixed(chunked(tensors), "backbone.") | heads
    student = {key: tensor + 1 for key, tensor in teacher.items()}
    path = saved(tmp_path, {"teacher": teacher, "student": student})
    model = load(path, heads=4)
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.branch) == ("dinov2", "teacher")
    assert len(model.report.ignored) == 3
    together = prefixed(teacher, "teacher.") | prefixed(student, "student.")
    both = load(saved(tmp_path, {"model": together}), heads=4)
    torch.testing.assert_close(both.module.state_dict(), model.module.state_dict())
    assert both.report is not None
    assert both.report.branch == "teacher"
    assert both.report.unexpected == ()


def test_dinov2_resizes_positions_as_its_own_code_does(tmp_path: Path) -> None:
    module, tensors = dinov2(registers=False)
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    model = load(saved(tmp_path, tensors), heads=4, size=(24, 32))
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    text = model.facts["position_embedding"].value
    assert text == "resized bicubic, not antialiased, from 4x4 to 6x8"


def dinov3_is_known() -> None:
    if "rope_type" not in inspect.signature(Eva).parameters:
        pytest.skip("timm's Eva has these rotary positions from 1.0.20")


def dinov3(**changes: Any) -> tuple[nn.Module, Tensors]:
    dinov3_is_known()
    module = huggingface("DINOv3ViT", num_register_tokens=4, **changes)
    tensors = authors(module)
    if not changes.get("use_gated_mlp"):
        tensors = {
            k.replace("up_proj", "fc1").replace("down_proj", "fc2"): t for k, t in tensors.items()
        }
    tensors["storage_tokens"] = tensors.pop("register_tokens")
    tensors["rope_embed.periods"] = 100 ** (torch.arange(2) / 2)
    return module, tensors


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov3(tmp_path: Path, images: Tensor, swiglu: bool) -> None:
    module, tensors = dinov3(use_gated_mlp=swiglu, hidden_act="silu" if swiglu else "gelu")
    tensors = gated(tensors, together=False) if swiglu else tensors
    for index in range(2):
        # The file's bias of keys is masked out: whatever stands there must not count.
        mask = torch.ones(96)
        mask[32:64] = 0
        tensors[f"blocks.{index}.attn.qkv.bias_mask"] = mask
        tensors[f"blocks.{index}.attn.qkv.bias"][32:64] = torch.nan
    path = saved(tmp_path, {"teacher": prefixed(tensors, "backbone.")})
    model = load(path, size=16)
    assert isinstance(model.module, Eva)
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.loaded_fraction) == ("dinov3", 1)
    assert (model.report.ignored, model.report.unexpected) == (("backbone.mask_token",), ())
    assert model.facts["heads"] == Fact(4, "tensor shape", "number of rotary periods")
    assert model.facts["positions"].value == "rotary"
    assert model.facts["norm_eps"].value == 1e-5
    assert model.describe()["nonfinite"] == []


def test_dinov3_at_another_size_and_refused(tmp_path: Path) -> None:
    module, tensors = dinov3()
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    path = saved(tmp_path, tensors)
    model = load(path, size=(16, 24))
    assert model.facts["grid"] == Fact((4, 6), "user", "images of 16x24")
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert load(path).facts["grid"] == Fact((56, 56), "assumed", "images of 224x224")
    with pytest.raises(SourceError, match=r"heads=8 contradicts .* have 4 \(number of rotary"):
        load(path, heads=8)
    tensors["rope_embed.periods"] = 10000 ** (torch.arange(2) / 2)
    with pytest.raises(CheckpointError, match="rotary periods are not 100 to the powers"):
        load(saved(tmp_path, tensors))


def test_timms_port_of_dinov3(tmp_path: Path, images: Tensor) -> None:
    dinov3_is_known()
    rotary = {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True}
    source = shaken(
        Eva(
            **{**SMALL, **rotary, "use_rot_pos_emb": True, "use_abs_pos_emb": False},
            num_reg_tokens=4,
            init_values=0.1,
            swiglu_mlp=True,
            use_fc_norm=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
    )
    args = argparse.Namespace(model="vit_odd_patch4_dinov3")
    model = load(
        saved(tmp_path, {"state_dict": source.state_dict(), "args": args}), heads=4, size=16
    )
    with torch.no_grad():
        torch.testing.assert_close(features(model, images), source.forward_features(images))


def beit(**changes: Any) -> tuple[nn.Module, Tensors]:
    """transformers' BEiT as it is after pre-training, with a norm of all tokens at the end."""
    module = huggingface("Beit", layer_norm_eps=1e-6, use_mean_pooling=False, **changes)
    tensors = authors(module)
    for index in range(2):
        attention = f"blocks.{index}.attn"
        q, _, v = tensors.pop(f"{attention}.qkv.bias").chunk(3)
        tensors |= {f"{attention}.q_bias": q, f"{attention}.v_bias": v}
        table = f"blocks.{index}.relative_position_bias.relative_position_bias_table"
        if table in tensors:
            tensors[f"{attention}.relative_position_bias_table"] = tensors.pop(table)
    shared = "shared_position_bias.relative_position_bias_table"
    if shared in tensors:
        tensors["rel_pos_bias.relative_position_bias_table"] = tensors.pop(shared)
    return module, tensors


BEITS = [
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True},
    {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
]


@pytest.mark.parametrize("changes", BEITS)
def test_beit_pretrained(tmp_path: Path, images: Tensor, changes: dict[str, bool]) -> None:
    module, tensors = beit(**changes)
    more = {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(8, 32)}
    index = {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    args = argparse.Namespace(model="beit_odd", imagenet_default_mean_and_std=False)
    path = saved(tmp_path, {"model": tensors | more | index, "args": args})
    model = load(path)
    assert isinstance(model.module, Beit)
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.unexpected) == ("beit", ())
    assert set(model.report.ignored) == set(more) | set(index)
    assert model.facts["heads"].value == 4
    assert model.facts["heads"].note == "width of the relative position table"
    assert model.facts["mean"] == Fact((0.5,) * 3, "args")
    shared = "use_shared_relative_position_bias" in changes
    relative = "relative, shared by the blocks" if shared else "relative"
    absolute = "absolute and " if "use_absolute_position_embeddings" in changes else ""
    assert model.facts["positions"].value == absolute + relative
    with pytest.raises(SourceError, match=r"heads=8 contradicts"):
        load(path, heads=8)


def tiny_beit(**changes: Any) -> nn.Module:
    usual = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
    return shaken(Beit(**{**SMALL, **usual, **changes}))


def test_beit_finetuned(tmp_path: Path, images: Tensor) -> None:
    source = tiny_beit(num_classes=5)
    model = load(saved(tmp_path, {"module": source.state_dict()}))
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)
    assert model.facts["final_norm"].value == "fc_norm"
    assert model.anatomy.final_norm_pooled


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_beit_at_another_size(tmp_path: Path) -> None:
    source = tiny_beit(use_abs_pos_emb=True)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    model = load(saved(tmp_path, source.state_dict()), size=24)
    if not hasattr(source, "set_input_size"):
        pytest.skip("this timm has no resizing of its own to compare with")
    source.set_input_size(img_size=(24, 24))
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-4, rtol=0)
    assert "geometric series" in model.facts["position_embedding"].value


def test_beit_on_a_grid_that_is_not_square(tmp_path: Path) -> None:
    source = tiny_beit(img_size=(8, 20))
    path = saved(tmp_path, source.state_dict())
    with pytest.raises(CheckpointError, match="30 entries, those of no square grid"):
        load(path)
    images = torch.rand(2, 3, 8, 20, generator=torch.Generator().manual_seed(2))
    model = load(path, size=(8, 20))
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)


def test_ijepa(tmp_path: Path, images: Tensor) -> None:
    module = huggingface("IJepa", layer_norm_eps=1e-6)
    tensors = prefixed(authors(module), "module.")
    encoder = {key: tensor + 1 for key, tensor in tensors.items()}
    predictor = {"module.predictor_blocks.0.norm1.weight": torch.zeros(4)}
    content = {"encoder": encoder, "predictor": predictor, "target_encoder": tensors, "epoch": 3}
    path = saved(tmp_path, content)
    model = load(path, heads=4)
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.branch) == ("ijepa", "target_encoder")
    assert model.anatomy.prefix_tokens == 0
    for branch, name in (("ema", "target_encoder"), ("student", "encoder")):
        report = load(f"{path},heads=4,branch={branch}").report
        assert report is not None
        assert report.branch == name


def test_ibot(tmp_path: Path, tiny: Tiny, images: Tensor) -> None:
    source = tiny()
    teacher = prefixed(source.state_dict(), "backbone.")
    student = prefixed(teacher, "module.") | {"module.backbone.masked_embed": torch.zeros(1, 32)}
    args = argparse.Namespace(arch="vit_odd", use_masked_im_modeling=True)
    path = saved(tmp_path, {"student": student, "teacher": teacher, "args": args})
    for branch in ("teacher", "student"):
        model = load(f"{path},heads=4,branch={branch}")
        torch.testing.assert_close(model.module.state_dict(), source.state_dict())
        assert model.report is not None
        assert (model.report.dialect, model.report.branch) == ("ibot", branch)
        assert model.report.unexpected == ()


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "beit"])
def test_a_dropped_tensor_is_named(tmp_path: Path, kind: str) -> None:
    _, tensors = {
        "dinov2": lambda: dinov2(registers=False),
        "dinov3": dinov3,
        "beit": lambda: beit(use_relative_position_bias=True),
    }[kind]()
    # Without them nothing says that the model ever had them, or the file is no longer one of these.
    free = {"mask_token", "storage_tokens", "rope_embed.periods", "norm.weight", "norm.bias"}
    dropped = [key for key in tensors if key not in free and "blocks.1" not in key]
    for key in dropped:
        path = saved(tmp_path, {name: tensors[name] for name in tensors if name != key})
        with pytest.raises(CheckpointError) as caught:
            load(path, heads=4, size=16)
        # Beit and Eva have names of their own for layer scale and the bias of queries.
        own = key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
        merged = own.replace("qkv.bias", "q_bias").replace("v_bias", "q_bias")
        assert str(path) in str(caught.value)
        assert any(name in str(caught.value) for name in (key, own, merged))


def test_dinov2_with_registers_resizes_positions_with_antialiasing(tmp_path: Path) -> None:
    module, tensors = dinov2(registers=True)
    images = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(2))
    model = load(saved(tmp_path, tensors), heads=4, size=(12, 20))
    torch.testing.assert_close(features(model, images), hidden(module, images), atol=1e-5, rtol=0)


def test_eva02_is_no_beit(tmp_path: Path) -> None:
    module = timm.create_model(
        "eva02_small_patch14_224", img_size=28, depth=2, embed_dim=48, num_heads=2, num_classes=0
    )
    with pytest.raises(CheckpointError, match="gated MLPs are EVA-02's"):
        load(saved(tmp_path, module.state_dict()))


def test_a_beit_of_timm_is_normalised_as_its_folder_says(tmp_path: Path) -> None:
    module = Beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    stated = '{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}'
    (tmp_path / "config.json").write_text(stated)
    model = load(tmp_path)
    assert model.report is not None
    assert model.report.dialect == "beit"
    assert model.facts["mean"] == Fact((0.5,) * 3, "config")
    assert model.facts["std"] == Fact((0.25,) * 3, "config")
