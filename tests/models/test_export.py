"""Exports: what timm and transformers load again computes the same features."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import vitprobe as vp
from vitprobe.errors import ResultError, SourceError
from vitprobe.models.export import export

Build = Callable[..., VisionTransformer]

needs_local_dir = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.16"), reason="timm's local-dir: came with 1.0.16"
)


@pytest.fixture
def file(tmp_path: Path, tiny: Build) -> Callable[..., tuple[str, VisionTransformer]]:
    """A checkpoint's spec and the module that it holds."""

    def write(**arguments: Any) -> tuple[str, VisionTransformer]:
        module = tiny(**arguments)
        path = tmp_path / "weights.safetensors"
        save_file(module.state_dict(), path)
        return f"{path},heads=4", module

    return write


@pytest.fixture
def run(tmp_path: Path, tiny: Build) -> tuple[Path, VisionTransformer]:
    """The folder of a run, as `vitprobe pretrain` leaves it: grey images, 3 classes."""
    module = tiny(in_chans=1, num_classes=3, img_size=8)
    about = {
        "architecture": {
            "img_size": [8, 8], "patch_size": 4, "in_chans": 1, "num_classes": 3,
            "global_pool": "token", "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0,
            "class_token": True,
        },
        "mean": [0.3], "std": [0.4], "method": "supervised", "classes": ["a", "b", "c"],
    }  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(
        module.state_dict(),
        folder / "encoder.safetensors",
        metadata={"vitprobe": json.dumps(about)},
    )
    return folder, module


def like(module: VisionTransformer) -> torch.Tensor:
    """Two images for it."""
    size = (2, module.patch_embed.proj.in_channels, *module.patch_embed.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


PLAIN: dict[str, dict[str, Any]] = {
    "no head": {},
    "a head": {"num_classes": 3},
    "oblong, one channel": {"img_size": (8, 20), "patch_size": (4, 2), "in_chans": 1},
    "no bias of queries": {"qkv_bias": False},
    "a class token without a position": {"no_embed_class": True},
    "an odd MLP": {"mlp_ratio": 37 / 32},
}
TIMMS_OWN: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 2},
    "pooled patches": {"global_pool": "avg", "num_classes": 3},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 0.1},
    "norms of queries and keys": {"qk_norm": True},
    "a norm before the blocks": {"pre_norm": True},
    "no bias of projections": {"proj_bias": False},
}


# -- timm ------------------------------------------------------------------------------------------


@needs_local_dir
@pytest.mark.parametrize("arguments", [*PLAIN.values(), *TIMMS_OWN.values()], ids=str)
def test_timm_loads_the_same_model(tmp_path: Path, file: Any, arguments: dict[str, Any]) -> None:
    spec, module = file(**arguments)
    if "img_size" in arguments:
        spec += ",size=8x20"
    out = export(spec, "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = like(module)
    assert_same(loaded.forward_features(images), module.forward_features(images))
    assert_same(loaded(images), module(images))


@needs_local_dir
def test_timm_loads_a_distilled_model(tmp_path: Path, file: Any) -> None:
    spec, module = file(distilled=True, num_classes=3)
    out = export(spec, "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert_same(loaded(like(module)), module(like(module)))


@needs_local_dir
def test_timm_learns_how_images_are_prepared_and_what_the_classes_are(
    tmp_path: Path, run: tuple[Path, VisionTransformer]
) -> None:
    out = export(run[0], "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    # A list or a tuple, as timm's version has it.
    assert json.loads(json.dumps(config)) == {
        "input_size": [1, 8, 8], "interpolation": "bicubic", "mean": [0.3], "std": [0.4],
        "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    # Another head on the same encoder, as for fine-tuning.
    tuned = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)
    assert tuned.head.out_features == 7
    assert torch.equal(tuned.norm.weight, loaded.norm.weight)


def test_vitprobe_loads_the_exported_file_as_it_loaded_the_source(
    tmp_path: Path, run: tuple[Path, VisionTransformer], file: Any
) -> None:
    for spec in (f"run:{run[0]}", file(reg_tokens=2, init_values=0.1)[0] + ",mean=0.2,std=0.3"):
        source = vp.load(spec)
        out = export(spec, "timm", tmp_path / "out", force=True)
        again = vp.load(out / "model.safetensors")
        assert (again.mean, again.std, again.training) == (
            source.mean,
            source.std,
            source.training,
        )
        assert again.input_size == source.input_size
        assert again.facts["heads"].value == source.facts["heads"].value
        assert again.facts["heads"].evidence == "config"
        images = like(source.module)
        assert torch.equal(again.module(images), source.module(images))


def test_an_epsilon_that_timm_cannot_say_is_refused(tmp_path: Path, file: Any) -> None:
    with pytest.raises(SourceError, match=r"epsilon of 1e-05.*export it to hf"):
        export(f"{file()[0]},eps=1e-5", "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_timm_would_make_otherwise_is_refused(
    tmp_path: Path, file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = vp.models.export._arguments

    def forgetful(module: VisionTransformer) -> Any:
        stated, unusual = arguments(module)
        return {**stated, "num_heads": 2}, unusual

    monkeypatch.setattr("vitprobe.models.export._arguments", forgetful)
    with pytest.raises(SourceError, match="does not describe all parts of this model"):
        export(file()[0], "timm", tmp_path / "out")


# -- transformers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers")
        # Its classes are imported when first asked for.
        _ = module.ViTModel, module.ViTForImageClassification, module.AutoImageProcessor
    return module


def told(kind: Any, folder: Path, **options: Any) -> Any:
    """A model that transformers loads from a folder without missing or leaving over a tensor."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    "arguments", [value for value in PLAIN.values() if "num_classes" not in value], ids=str
)
def test_transformers_loads_the_same_tokens(
    tmp_path: Path, file: Any, transformers: Any, arguments: dict[str, Any]
) -> None:
    spec, module = file(**arguments)
    if "img_size" in arguments:
        spec += ",size=8x20"
    out = export(spec, "hf", tmp_path / "out")
    loaded = told(transformers.ViTModel, out)
    with torch.no_grad():
        found = loaded(like(module))
    expected = module.forward_features(like(module)).detach()
    assert_same(found.last_hidden_state, expected)
    assert_same(found.pooler_output, expected[:, 0])


def test_transformers_loads_the_same_logits_and_labels(
    tmp_path: Path, run: tuple[Path, VisionTransformer], transformers: Any
) -> None:
    folder, module = run
    out = export(folder, "hf", tmp_path / "out")
    loaded = told(transformers.ViTForImageClassification, out)
    with torch.no_grad():
        assert_same(loaded(like(module)).logits, module(like(module)))
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.config.label2id == {"a": 0, "b": 1, "c": 2}
    encoder = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False)
    with torch.no_grad():
        tokens = encoder(like(module)).last_hidden_state
    assert_same(tokens, module.forward_features(like(module)))


def test_the_epsilon_and_unnamed_classes_travel(
    tmp_path: Path, file: Any, transformers: Any
) -> None:
    spec, module = file(num_classes=3, norm_layer=partial(torch.nn.LayerNorm, eps=1e-3))
    out = export(f"{spec},eps=1e-3", "hf", tmp_path / "out")
    loaded = told(transformers.ViTForImageClassification, out)
    with torch.no_grad():
        assert_same(loaded(like(module)).logits, module(like(module)))
    assert loaded.config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize("channels", [1, 3])
def test_transformers_prepares_images_alike(
    tmp_path: Path, file: Any, transformers: Any, channels: int
) -> None:
    out = export(f"{file(in_chans=channels)[0]},mean=0.2,std=0.5", "hf", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    levels = np.random.default_rng(0).integers(256, size=(16, 16, channels), dtype=np.uint8)
    found = processor(images=levels.transpose(2, 0, 1), return_tensors="pt")["pixel_values"]
    expected = (torch.from_numpy(levels).permute(2, 0, 1) / 255 - 0.2) / 0.5
    assert_same(found[0], expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"reg_tokens": 2}, "has register tokens"),
        ({"init_values": 0.1}, "has layer scale"),
        ({"global_pool": "avg"}, r"has a norm after pooling \(fc_norm\)"),
        ({"global_pool": "avg", "class_token": False, "fc_norm": False}, "has no class token"),
        ({"qk_norm": True}, "has norms of queries and keys"),
        ({"pre_norm": True}, "has a norm before its blocks"),
        ({"proj_bias": False}, "has no bias in its projections"),
        ({"distilled": True}, "not |has a distillation token"),
    ],
    ids=str,
)
def test_what_transformers_cannot_express_is_refused_by_name(
    tmp_path: Path, file: Any, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(SourceError, match=named):
        export(file(**arguments)[0], "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- either ----------------------------------------------------------------------------------------


def test_weights_are_safetensors_and_nothing_else_is_left(tmp_path: Path, file: Any) -> None:
    spec, _ = file()
    for to, names in (
        ("timm", {"config.json", "model.safetensors"}),
        ("hf", {"config.json", "model.safetensors", "preprocessor_config.json"}),
    ):
        out = export(spec, to, tmp_path / "deep" / to)
        assert {path.name for path in out.iterdir()} == names
        with safe_open(out / "model.safetensors", "pt") as weights:
            assert weights.metadata()["format"] == "pt"
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"timm", "hf"}


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_it_is_an_export(
    tmp_path: Path, file: Any
) -> None:
    spec, _ = file()
    out = export(spec, "hf", tmp_path / "out")
    with pytest.raises(ResultError, match="exists; choose another folder, or force"):
        export(spec, "timm", out)
    assert export(spec, "timm", out, force=True) == out
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    (out / "thesis.tex").touch()
    with pytest.raises(ResultError, match=r"is no export, for it holds thesis\.tex"):
        export(spec, "timm", out, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="is no folder"):
        export(spec, "timm", tmp_path / "file", force=True)


def test_assumed_heads_are_said(tmp_path: Path, tiny: Build) -> None:
    path = tmp_path / "wide.safetensors"
    save_file(tiny(embed_dim=64, depth=1).state_dict(), path)
    with pytest.warns(UserWarning, match=r"how many attention heads .* has: 1 are assumed"):
        export(str(path), "timm", tmp_path / "out")


def test_other_formats_and_other_models_are_refused(tmp_path: Path, file: Any) -> None:
    with pytest.raises(ResultError, match="'onnx' is no format to export to"):
        export(file()[0], "onnx", tmp_path / "out")
    with pytest.raises(SourceError, match="no plain Vision Transformer"):
        export("init:vit_base_patch16_clip_quickgelu_224", "hf", tmp_path / "out")
