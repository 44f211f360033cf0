"""Models written by transformers, in memory and on disk, give transformers' own features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitprobe.errors import CheckpointError
from vitprobe.models import load

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50000,
}


def build(kind: str, config: str, **arguments: Any) -> Any:
    """A model of transformers with weights far from any initial value."""
    settings = getattr(transformers, config)(**{**SMALL, **arguments})
    module = getattr(transformers, kind)(settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def two_towers(kind: str) -> Any:
    image = getattr(transformers, f"{kind}VisionConfig")(**SMALL).to_dict()
    config = getattr(transformers, f"{kind}Config")(vision_config=image, text_config=TEXT)
    return build_from(getattr(transformers, f"{kind}Model")(config))


def build_from(module: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: build("ViTModel", "ViTConfig"),
    "vit classifier": lambda: build("ViTForImageClassification", "ViTConfig", hidden_act="relu"),
    "deit": lambda: build("DeiTModel", "DeiTConfig", qkv_bias=False),
    "deit classifier": lambda: build("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "ijepa": lambda: build("IJepaModel", "IJepaConfig"),
    "dinov2": lambda: build("Dinov2Model", "Dinov2Config"),
    "dinov2 classifier": lambda: build("Dinov2ForImageClassification", "Dinov2Config"),
    "dinov2 swiglu": lambda: build("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "dinov2 registers": lambda: build("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "dinov3": lambda: build("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    "dinov3 gated": lambda: build(
        "DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu"
    ),
    "beit": lambda: build("BeitModel", "BeitConfig", use_relative_position_bias=True),
    "beit shared": lambda: build(
        "BeitModel",
        "BeitConfig",
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
    ),
    "beit pretraining": lambda: build(
        "BeitForMaskedImageModeling",
        "BeitConfig",
        use_relative_position_bias=True,
        use_mask_token=True,
    ),
    "clip": lambda: build("CLIPVisionModel", "CLIPVisionConfig"),
    "clip gelu": lambda: build("CLIPVisionModel", "CLIPVisionConfig", hidden_act="gelu"),
    "clip projection": lambda: build("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "clip whole": lambda: two_towers("CLIP"),
    "siglip": lambda: build("SiglipVisionModel", "SiglipVisionConfig"),
    "siglip whole": lambda: two_towers("Siglip"),
}
EACH = pytest.mark.parametrize("name", list(MODELS))


def encoder(module: Any) -> Any:
    """The part that reads images: `vit` of a classifier, `vision_model` of two towers."""
    if hasattr(module, "vision_model"):
        return module.vision_model
    return module if type(module).__name__.endswith("Model") else module.base_model


def features(module: Any, images: Tensor) -> Tensor:
    """All tokens after the final norm, or before it where transformers applies none to tokens."""
    part = encoder(module)
    with torch.no_grad():
        tokens = part(pixel_values=images).last_hidden_state
        # Of CLIP's tokens only the pooled one is normalised; BEiT's are outside, in pre-training.
        if "CLIP" in type(part).__name__:
            return part.post_layernorm(tokens)
        return module.layernorm(tokens) if "ForMasked" in type(module).__name__ else tokens


def probed(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.forward_features(images)


@EACH
def test_a_saved_folder(tmp_path: Path, images: Tensor, name: str) -> None:
    source = MODELS[name]()
    source.save_pretrained(tmp_path)
    model = load(tmp_path, name="mine")
    torch.testing.assert_close(probed(model, images), features(source, images), atol=1e-5, rtol=0)
    report = model.report
    assert report is not None
    assert report.dialect == "huggingface"
    assert report.loaded_fraction == 1
    assert (report.missing, report.unexpected, report.branch) == ((), (), None)
    heads = model.facts["heads"]
    assert heads.value == 4
    assert heads.evidence in ("config", "tensor shape")
    assert model.facts["norm_eps"].evidence == "config"
    assert model.facts["activation"].evidence in ("config", "tensor shape")


@EACH
def test_its_state_dict(tmp_path: Path, images: Tensor, name: str) -> None:
    """The names in memory; what a config says has to come from the user."""
    source = MODELS[name]()
    path = tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    config = getattr(source.config, "vision_config", source.config)
    given = {"eps": config.layer_norm_eps, "activation": config.hidden_act, "heads": 4}
    model = load(path, **given, **({"size": 16} if name.startswith("dinov3") else {}))
    torch.testing.assert_close(probed(model, images), features(source, images), atol=1e-5, rtol=0)


def test_shards_give_what_one_file_gives(tmp_path: Path, images: Tensor) -> None:
    source = MODELS["vit"]()
    source.save_pretrained(tmp_path / "whole")
    source.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    torch.testing.assert_close(probed(shards, images), probed(whole, images), atol=0, rtol=0)
    assert whole.sha256 != shards.sha256
    assert shards.sha256
    assert len(shards.sha256) == 64


def test_the_file_in_a_folder_is_read_with_its_config(tmp_path: Path, images: Tensor) -> None:
    source = MODELS["vit classifier"]()
    source.save_pretrained(tmp_path)
    model = load(tmp_path / "model.safetensors")
    torch.testing.assert_close(probed(model, images), features(source, images), atol=1e-5, rtol=0)
    assert model.name == "model"
    assert model.facts["activation"].value == "ReLU"


def test_a_file_alone_says_what_is_assumed(tmp_path: Path) -> None:
    source = build("ViTModel", "ViTConfig", hidden_size=64)
    source.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    model = load(tmp_path / "model.safetensors")
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (1, "assumed")
    assert (model.facts["norm_eps"].value, model.facts["norm_eps"].evidence) == (1e-12, "assumed")
    assert {"heads", "norm_eps", "activation", "mean", "std"} <= set(model.describe()["assumed"])


def test_mean_and_std_are_those_of_the_preprocessor(tmp_path: Path) -> None:
    MODELS["vit"]().save_pretrained(tmp_path)
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    model = load(tmp_path)
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert model.facts["mean"].evidence == "config"
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "processor_config.json")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": stated}))
    assert load(tmp_path).mean == (0.5, 0.4, 0.3)


def test_buffers_that_older_versions_kept(tmp_path: Path, images: Tensor) -> None:
    beit, clip = MODELS["beit"](), MODELS["clip projection"]()
    table = "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    for source, key in ((beit, table), (clip, "vision_model.embeddings.position_ids")):
        source.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        # Of another size than the model's: nothing may be made of it.
        tensors[key] = torch.arange(5)
        save_file(tensors, tmp_path / "model.safetensors")
        model = load(tmp_path)
        torch.testing.assert_close(
            probed(model, images), features(source, images), atol=1e-5, rtol=0
        )
        assert model.report is not None
        assert model.report.unexpected == ()


def test_the_masked_autoencoder_sees_all_patches(tmp_path: Path, images: Tensor) -> None:
    source = build(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        mask_ratio=0.0,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )
    source.save_pretrained(tmp_path)
    model = load(tmp_path)
    in_order = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        expected = source.vit(pixel_values=images, noise=in_order).last_hidden_state
    torch.testing.assert_close(probed(model, images), expected, atol=1e-5, rtol=0)
    assert model.report is not None
    assert all(key.startswith("decoder") for key in model.report.ignored)


def test_positions_are_resized_as_transformers_does(tmp_path: Path) -> None:
    source = MODELS["dinov2"]()
    source.save_pretrained(tmp_path)
    model = load(tmp_path, size=24)
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(probed(model, images), features(source, images), atol=1e-5, rtol=0)
    assert "not antialiased" in str(model.facts["position_embedding"].value) or (
        "without antialias" in str(model.facts["position_embedding"].value)
    )


@EACH
def test_a_dropped_tensor_is_missed(tmp_path: Path, name: str) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last = ("fc2.weight", ".1.output.dense.weight", "weights_out.weight", "down_proj.weight")
    del tensors[next(key for key in tensors if key.endswith(last) and "text_" not in key)]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks (every tensor of )?blocks\.\d"):
        load(tmp_path)


def test_other_models_of_transformers_are_refused(tmp_path: Path) -> None:
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
    transformers.SwinModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks"):
        load(tmp_path)


def test_positions_are_resized_with_antialiasing_where_there_are_registers(tmp_path: Path) -> None:
    source = MODELS["dinov2 registers"]()
    source.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(3))
    model = load(tmp_path, size=(12, 20))
    torch.testing.assert_close(probed(model, images), features(source, images), atol=1e-5, rtol=0)
    assert "bicubic antialiased" in model.facts["position_embedding"].value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_registers_in_half_precision(tmp_path: Path, images: Tensor, dtype: torch.dtype) -> None:
    source = MODELS["dinov2 registers"]().to(dtype)
    source.save_pretrained(tmp_path)
    expected = features(source.float(), images)
    torch.testing.assert_close(probed(load(tmp_path), images), expected, atol=1e-5, rtol=0)


def test_the_base_of_rotary_periods(tmp_path: Path, images: Tensor) -> None:
    source = build("DINOv3ViTModel", "DINOv3ViTConfig", rope_theta=10000.0)
    source.save_pretrained(tmp_path)
    expected = features(source, images)
    torch.testing.assert_close(probed(load(tmp_path), images), expected, atol=1e-5, rtol=0)
    restated(tmp_path, rope_theta=-1)
    with pytest.raises(CheckpointError, match="the base -1 of its rotary periods"):
        load(tmp_path)


def restated(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "its config gives depth 3, its tensors 2"),
        ({"hidden_size": 64}, "its config gives embed_dim 64, its tensors 32"),
    ],
)
def test_a_config_that_contradicts_the_tensors(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    MODELS["vit"]().save_pretrained(tmp_path)
    restated(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, 0.0, 1.0),
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.0, 1.0),
    ],
)
def test_what_a_preprocessor_normalises_by(
    tmp_path: Path, stated: dict[str, Any], mean: float, std: float
) -> None:
    MODELS["vit"]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    model = load(tmp_path)
    assert (model.mean, model.std) == ((mean,) * 3, (std,) * 3)
    assert model.facts["mean"].evidence == model.facts["std"].evidence == "config"


@pytest.mark.parametrize(
    ("name", "value"), [("std", 0.0), ("std", -0.5), ("std", float("nan")), ("mean", float("inf"))]
)
def test_statistics_that_normalise_nothing(tmp_path: Path, name: str, value: float) -> None:
    MODELS["vit"]().save_pretrained(tmp_path)
    stated = {f"image_{name}": [value] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=f"states {name} .*give it as {name}="):
        load(tmp_path)
    assert getattr(load(tmp_path, **{name: 0.5}), name) == (0.5,) * 3


def test_the_config_of_a_backbone(tmp_path: Path, images: Tensor) -> None:
    backbone = transformers.Dinov2Config(**SMALL, layer_norm_eps=1e-3, out_features=["stage2"])
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8
    )
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (4, "config")
    assert (model.facts["norm_eps"].value, model.facts["norm_eps"].evidence) == (1e-3, "config")
