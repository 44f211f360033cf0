from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models import Fact, Model, load

Tiny = Callable[..., nn.Module]


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    return path


def test_shapes_give_the_architecture(tmp_path: Path, tiny: Tiny) -> None:
    model = load(saved(tmp_path, tiny(reg_tokens=2).state_dict()), heads=4)
    values = {
        "width": 32,
        "depth": 2,
        "patch_size": (4, 4),
        "grid": (4, 4),
        "prefix_tokens": 3,
        "mlp_ratio": 2.0,
        "final_norm": "norm",
    }
    for name, value in values.items():
        assert model.facts[name] == Fact(value, "tensor shape")
    assert model.facts["heads"] == Fact(4, "user")
    assert model.facts["norm_eps"].evidence == "assumed"
    assert model.facts["mean"] == Fact((0.485, 0.456, 0.406), "assumed", "ImageNet's")
    assert model.describe()["assumed"] == ["norm_eps", "activation", "mean", "std"]
    assert model.input_size == (3, 16, 16)
    assert model.anatomy.blocks == ("blocks.0", "blocks.1")
    assert model.anatomy.norms == ("blocks.0.norm1", "blocks.1.norm1")
    assert model.anatomy.heads == (4, 4)
    assert (model.anatomy.final_norm, model.anatomy.final_norm_pooled) == ("norm", False)


@pytest.mark.parametrize(
    ("wrap", "arguments", "heads"),
    [
        (lambda t: t, {"embed_dim": 128}, Fact(2, "assumed", "64 channels a head")),
        (
            lambda t: {"model": {f"module.model.{k}": v for k, v in t.items()}},
            {"embed_dim": 192},
            Fact(12, "assumed", "the convention of mae_lite"),
        ),
        (
            lambda t: {
                "arch": "vit_small",
                "state_dict": {f"module.base_encoder.{k}": v for k, v in t.items()},
            },
            {"embed_dim": 384},
            Fact(12, "args", "vit_small"),
        ),
        (
            lambda t: {
                "teacher": {f"backbone.{k}": v for k, v in t.items()},
                "args": argparse.Namespace(arch="vit_small"),
            },
            {"embed_dim": 384},
            Fact(6, "args", "vit_small"),
        ),
        (
            lambda t: {"model": t, "args": argparse.Namespace(num_heads=8)},
            {},
            Fact(8, "args", "num_heads"),
        ),
        (
            lambda t: {"model": t, "args": argparse.Namespace(model="deit_tiny_patch16_224")},
            {"embed_dim": 192, "depth": 12},
            Fact(3, "args", "deit_tiny_patch16_224"),
        ),
        (
            lambda t: t,
            {"qk_norm": True, "num_heads": 8},
            Fact(8, "tensor shape", "width of q_norm"),
        ),
    ],
    ids=["convention", "mae_lite", "moco", "dino", "num_heads", "timm-name", "q_norm"],
)
def test_heads_come_from_the_strongest_evidence(
    tmp_path: Path,
    tiny: Tiny,
    wrap: Callable[[Any], Any],
    arguments: dict[str, Any],
    heads: Fact,
) -> None:
    path = saved(tmp_path, wrap(tiny(**arguments).state_dict()))
    assert load(path).facts["heads"] == heads


def test_the_heads_of_the_user_win(tmp_path: Path, tiny: Tiny) -> None:
    content = {"model": tiny().state_dict(), "args": argparse.Namespace(num_heads=8)}
    assert load(saved(tmp_path, content), heads=4).facts["heads"] == Fact(4, "user")


def test_heads_without_evidence_are_asked_for(tmp_path: Path, tiny: Tiny) -> None:
    path = saved(tmp_path, tiny().state_dict())
    with pytest.raises(CheckpointError, match="width of 32; give the number as heads=N"):
        load(path)
    with pytest.raises(SourceError, match="heads=5 does not divide the width 32"):
        load(path, heads=5)


def test_size_resizes_position_embeddings_as_timm_does(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    path = saved(tmp_path, tensors)
    model = load(f"{path},heads=4,size=24x32")
    assert model.anatomy.grid == (6, 8)
    assert model.input_size == (3, 24, 32)
    assert model.facts["position_embedding"].value == "resized bicubic antialiased from 4x4 to 6x8"
    expected = resample_abs_pos_embed(tensors["pos_embed"], [6, 8], [4, 4])
    torch.testing.assert_close(model.module.pos_embed.data, expected)
    same = load(f"{path},heads=4,size=16").facts["position_embedding"]
    assert same == Fact("as loaded", "tensor shape")
    with pytest.raises(SourceError, match="size=225x225 is not a multiple"):
        load(path, heads=4, size=225)


def test_a_grid_that_is_not_square_needs_its_size(tmp_path: Path, tiny: Tiny) -> None:
    path = saved(tmp_path, tiny(img_size=(8, 20)).state_dict())
    with pytest.raises(CheckpointError, match="size=HxW"):
        load(path, heads=4)
    model = load(path, heads=4, size=(8, 20))
    assert model.facts["grid"] == Fact((2, 5), "user")


def test_mean_std_and_eps_of_the_user(tmp_path: Path, tiny: Tiny) -> None:
    path = saved(tmp_path, tiny(in_chans=1).state_dict())
    model = load(f"{path},heads=4,mean=0.5,std=0.25,eps=1e-5")
    assert (model.mean, model.std) == ((0.5,), (0.25,))
    assert model.facts["norm_eps"] == Fact(1e-5, "user")
    assert model.module.blocks[0].norm1.eps == 1e-5
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(model.normalize(images), (images - 0.5) / 0.25)
    assumed = load(path, heads=4)
    assert assumed.mean == (0.449,)
    assert assumed.facts["mean"].evidence == "assumed"
    with pytest.raises(SourceError, match="3 values for images of 1 channel"):
        load(f"{path},heads=4,mean=0.1/0.2/0.3")


def test_mean_and_std_saved_by_timms_training(tmp_path: Path, tiny: Tiny) -> None:
    args = argparse.Namespace(mean=[0.1, 0.2, 0.3], std=None)
    model = load(saved(tmp_path, {"state_dict": tiny().state_dict(), "args": args}), heads=4)
    assert model.facts["mean"] == Fact((0.1, 0.2, 0.3), "args")
    assert model.facts["std"].evidence == "assumed"


def own_checkpoint(tmp_path: Path, module: nn.Module, **changes: Any) -> Path:
    path = tmp_path / "run" / "encoder.safetensors"
    path.parent.mkdir(exist_ok=True)
    architecture = {
        "img_size": [8, 32],
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 0,
        "global_pool": "token",
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 8,
        "mlp_ratio": 2.0,
        "class_token": True,
    }
    described = {
        "architecture": architecture | changes,
        "mean": [0.3],
        "std": [0.2],
        "method": "mae",
        "seed": 0,
    }
    save_file(module.state_dict(), path, metadata={"vitprobe": json.dumps(described)})
    return path


def test_own_checkpoints_say_everything(tmp_path: Path, tiny: Tiny) -> None:
    module = tiny(img_size=(8, 32), in_chans=1, num_heads=8)
    path = own_checkpoint(tmp_path, module)
    for spec in (str(path), f"run:{path.parent}"):
        model = load(spec)
        assert model.describe()["assumed"] == []
        assert model.facts["heads"] == Fact(8, "config")
        # 16 patches would be a square grid as well: the config decides.
        assert model.facts["grid"] == Fact((2, 8), "config")
        assert (model.mean, model.std) == ((0.3,), (0.2,))
        assert model.training == {"method": "mae", "seed": 0}
        assert model.report is not None
        assert model.report.dialect == "vitprobe"
    assert load(f"run:{path.parent}").name == "run"


def test_own_checkpoints_that_contradict_themselves(tmp_path: Path, tiny: Tiny) -> None:
    module = tiny(img_size=(8, 32), in_chans=1)
    with pytest.raises(CheckpointError, match="metadata gives depth 3, its tensors 2"):
        load(own_checkpoint(tmp_path, module, depth=3))
    with pytest.raises(CheckpointError, match="img_size"):
        load(own_checkpoint(tmp_path, module, img_size=[12, 12]))
    with pytest.raises(CheckpointError, match="'wings', which this version"):
        load(own_checkpoint(tmp_path, module, wings=2))
    path = tmp_path / "broken.safetensors"
    save_file(module.state_dict(), path, metadata={"vitprobe": "{"})
    with pytest.raises(CheckpointError, match=r"metadata .* damaged"):
        load(path)
    with pytest.raises(SourceError, match="not a finished run"):
        load(f"run:{tmp_path}")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("blocks.1.mlp.fc1.weight", lambda t: t[:10], r"shape \(10, 32\).* \(64, 32\)"),
        ("patch_embed.proj.weight", lambda t: t.flatten(1), "no plain Vision Transformer has"),
        ("blocks.1.attn.proj.weight", lambda t: t.to(torch.int8), "is int8"),
        ("pos_embed", lambda t: t[:, :-2], "no square grid"),
    ],
)
def test_impossible_tensors(
    tmp_path: Path, tiny: Tiny, key: str, change: Callable[[Any], Any], message: str
) -> None:
    tensors = tiny().state_dict()
    tensors[key] = change(tensors[key])
    with pytest.raises(CheckpointError, match=message):
        load(saved(tmp_path, tensors), heads=4)


def test_missing_blocks_are_named(tmp_path: Path, tiny: Tiny) -> None:
    tensors = {k: v for k, v in tiny(depth=3).state_dict().items() if "blocks.1." not in k}
    with pytest.raises(CheckpointError, match=r"every tensor of blocks\.1"):
        load(saved(tmp_path, tensors), heads=4)


def test_loading_leaves_the_random_state(tmp_path: Path, tiny: Tiny) -> None:
    path = saved(tmp_path, tiny().state_dict())
    before = torch.random.get_rng_state()
    load(path, heads=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_that_are_not_finite_load_and_are_named(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    tensors["blocks.1.norm2.bias"][0] = torch.nan
    model = load(saved(tmp_path, tensors), heads=4)
    assert isinstance(model, Model)
    assert model.describe()["nonfinite"] == ["blocks.1.norm2.bias"]
    json.dumps(model.describe())


def test_the_grid_of_the_size_given_comes_before_a_square_one(tmp_path: Path, tiny: Tiny) -> None:
    """16 positions are those of 4x4 patches, and of 2x8."""
    source = tiny(img_size=(8, 32))
    model = load(saved(tmp_path, source.state_dict()), heads=4, size="8x32")
    torch.testing.assert_close(model.module.state_dict(), source.state_dict())
    assert model.facts["grid"] == Fact((2, 8), "user")
    assert model.facts["position_embedding"].value == "as loaded"


def test_positions_with_a_class_token_come_before_those_without(tmp_path: Path, tiny: Tiny) -> None:
    """50 positions are 7x7 patches and a class token, though 5x10 patches are as many."""
    path = saved(tmp_path, tiny(img_size=28).state_dict())
    model = load(path, heads=4, size="20x40")
    assert "from 7x7 to 5x10" in model.facts["position_embedding"].value


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., nn.Module]], None]:
    """Makes "vit_odd" a model of timm's."""

    def known(build: Callable[..., nn.Module]) -> None:
        registry = timm.models._registry
        names = {*registry._module_to_models["vision_transformer"], "vit_odd"}
        monkeypatch.setitem(registry._model_entrypoints, "vit_odd", lambda **_: build())
        monkeypatch.setitem(registry._module_to_models, "vision_transformer", names)

    return known


@pytest.mark.parametrize("beside", ["args", "config"])
def test_timms_model_of_the_name_says_epsilon_and_activation(
    tmp_path: Path, tiny: Tiny, images: Tensor, beside: str, register: Callable[..., None]
) -> None:
    build = partial(tiny, norm_layer=partial(nn.LayerNorm, eps=1e-3), act_layer="quick_gelu")
    register(build)
    source = build()
    if beside == "args":
        args = argparse.Namespace(model="vit_odd")
        path = saved(tmp_path, {"state_dict": source.state_dict(), "args": args})
    else:
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architecture": "vit_odd"}')
        path = tmp_path
    model = load(path)
    with torch.no_grad():
        expected = source.forward_features(images)
        torch.testing.assert_close(model.module.forward_features(images), expected)
    assert model.facts["norm_eps"] == Fact(1e-3, beside, "vit_odd")
    assert model.facts["activation"] == Fact("QuickGELU", beside, "vit_odd")
    # A model of another size is none of that name.
    path = saved(tmp_path, {"state_dict": tiny(depth=1).state_dict(), "arch": "vit_odd"})
    assert load(path, heads=4).facts["norm_eps"].evidence == "assumed"


def rotary() -> nn.Module:
    return Eva(16, 4, num_classes=0, embed_dim=32, depth=2, num_heads=4, use_rot_pos_emb=True)


@pytest.mark.parametrize("what", ["norms behind its layers", "rotary positions"])
def test_timms_model_of_the_name_computes_what_no_tensor_shows(
    tmp_path: Path, tiny: Tiny, what: str, register: Callable[..., None]
) -> None:
    build = rotary if what == "rotary positions" else partial(tiny, block_fn=ResPostBlock)
    register(build)
    path = saved(tmp_path, {"state_dict": build().state_dict(), "arch": "vit_odd"})
    with pytest.raises(CheckpointError, match=f"vit_odd, whose {what} no tensor .*vitprobe.wrap"):
        load(path, heads=4)


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (1280, 16), (1792, 16), (1024, 16)])
def test_heads_by_convention(tmp_path: Path, tiny: Tiny, width: int, heads: int) -> None:
    tensors = tiny(embed_dim=width, depth=1, mlp_ratio=0.1).state_dict()
    fact = load(saved(tmp_path, tensors)).facts["heads"]
    assert (fact.value, fact.evidence) == (heads, "assumed")


def test_heads_that_cannot_share_the_width(tmp_path: Path, tiny: Tiny) -> None:
    path = saved(tmp_path, {"model": tiny().state_dict(), "args": argparse.Namespace(heads=5)})
    with pytest.raises(CheckpointError, match=r"states 5 attention heads \(args\).*width of 32"):
        load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": "abc"},
        {"img_size": [1, 2, 3]},
        {"img_size": -16},
        {"patch_size": None},
        {"patch_size": [4, 4, 4]},
    ],
)
def test_own_checkpoints_with_an_odd_architecture(
    tmp_path: Path, tiny: Tiny, changes: dict[str, Any]
) -> None:
    path = own_checkpoint(tmp_path, tiny(img_size=(8, 32), in_chans=1), **changes)
    with pytest.raises(CheckpointError, match="are damaged"):
        load(path)


@pytest.mark.parametrize("std", ["abc", ["x"], [0.0], {"a": 1}, [float("nan")], None])
def test_own_checkpoints_with_an_odd_std(tmp_path: Path, tiny: Tiny, std: Any) -> None:
    path = tmp_path / "encoder.safetensors"
    described = {"architecture": {"num_heads": 4}, "std": std}
    save_file(tiny().state_dict(), path, metadata={"vitprobe": json.dumps(described)})
    with pytest.raises(CheckpointError, match="are damaged"):
        load(path)
