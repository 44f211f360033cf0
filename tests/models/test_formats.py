"""Each dialect is written as its training code writes it, and read back to the same features."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from vitprobe.errors import CheckpointError
from vitprobe.models import load

Tensors = dict[str, Tensor]
Tiny = Callable[..., nn.Module]


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def noise(tensors: Tensors) -> Tensors:
    return {key: tensor + 1 for key, tensor in tensors.items()}


def timm_plain(tensors: Tensors) -> Any:
    return tensors


def timm_ddp_compiled(tensors: Tensors) -> Any:
    return {"epoch": 3, "state_dict": prefixed(tensors, "module._orig_mod.")}


def timm_compiled_ddp(tensors: Tensors) -> Any:
    return {"model": prefixed(tensors, "_orig_mod.module.")}


def timm_ema(tensors: Tensors) -> Any:
    return {"state_dict": tensors, "state_dict_ema": noise(tensors), "arch": "vit_odd"}


def lightning(tensors: Tensors) -> Any:
    return {"state_dict": prefixed(tensors, "model."), "hyper_parameters": {"lr": 0.1}}


def deit(tensors: Tensors) -> Any:
    args = argparse.Namespace(model="deit_odd_patch4_16", lr=1.0)
    return {"model": tensors, "model_ema": noise(tensors), "args": args}


def mae_decoder(tensors: Tensors) -> Tensors:
    return {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(48, 16),
        "decoder_norm.weight": torch.zeros(16),
    }


def mae_full(tensors: Tensors) -> Any:
    return {"model": tensors | mae_decoder(tensors), "args": argparse.Namespace(norm_pix_loss=True)}


def mae_encoder(tensors: Tensors) -> Any:
    return {"model": tensors, "args": argparse.Namespace(model="mae_vit_odd_patch4")}


def mae_finetuned(tensors: Tensors) -> Any:
    return {"model": tensors}


def moco(tensors: Tensors) -> Any:
    projector = {"head.0.weight": torch.zeros(8, 32), "head.1.running_mean": torch.zeros(8)}
    return {
        "arch": "vit_odd",
        "state_dict": prefixed(tensors | projector, "module.base_encoder.")
        | prefixed(noise(tensors | projector), "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.zeros(8, 8)},
    }


def dino(tensors: Tensors) -> Any:
    head = {"head.mlp.0.weight": torch.zeros(8, 32), "head.last_layer.weight_g": torch.zeros(8, 1)}
    student = prefixed(noise(tensors), "backbone.") | head
    return {
        "teacher": prefixed(tensors, "backbone.") | head,
        "student": prefixed(student, "module."),
        "dino_loss": {"center": torch.zeros(1, 8)},
        "args": argparse.Namespace(arch="vit_odd"),
    }


def mae_lite(tensors: Tensors) -> Any:
    return {"model": prefixed(tensors | mae_decoder(tensors), "module.model."), "start_epoch": 400}


DIALECTS: list[tuple[Callable[[Tensors], Any], str, dict[str, Any], str | None]] = [
    (timm_plain, "timm", {}, None),
    (timm_plain, "timm", {"num_classes": 5}, None),
    (timm_plain, "timm", {"global_pool": "avg", "class_token": False}, None),
    (timm_plain, "timm", {"reg_tokens": 4, "no_embed_class": True}, None),
    (timm_plain, "timm", {"reg_tokens": 4}, None),
    (timm_plain, "timm", {"init_values": 0.1, "qkv_bias": False, "qk_norm": True}, None),
    (timm_plain, "timm", {"pre_norm": True, "in_chans": 3, "proj_bias": False}, None),
    (timm_ddp_compiled, "timm", {}, None),
    (timm_compiled_ddp, "timm", {}, None),
    (timm_ema, "timm", {}, "model"),
    (lightning, "timm", {}, None),
    (deit, "deit", {"num_classes": 5}, "model"),
    (deit, "deit", {"num_classes": 5, "distilled": True}, "model"),
    (mae_full, "mae", {}, None),
    (mae_encoder, "mae", {}, None),
    (mae_finetuned, "mae", {"num_classes": 5, "global_pool": "avg"}, None),
    (moco, "moco_v3", {}, "base_encoder"),
    (dino, "dino", {}, "teacher"),
    (mae_lite, "mae_lite", {}, None),
]
EACH = pytest.mark.parametrize(
    ("write", "dialect", "arguments", "branch"),
    DIALECTS,
    ids=[f"{write.__name__}-{'-'.join(arguments)}" for write, _, arguments, _ in DIALECTS],
)


@EACH
def test_round_trip(
    tmp_path: Path,
    tiny: Tiny,
    images: Tensor,
    write: Callable[[Tensors], Any],
    dialect: str,
    arguments: dict[str, Any],
    branch: str | None,
) -> None:
    source = tiny(**arguments)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(write(source.state_dict()), path)
    model = load(path, heads=4)
    with torch.no_grad():
        torch.testing.assert_close(
            model.module.forward_features(images),
            source.forward_features(images),
            atol=1e-6,
            rtol=0,
        )
        torch.testing.assert_close(model.module(images), source(images), atol=1e-6, rtol=0)
    report = model.report
    assert report is not None
    assert (report.dialect, report.branch) == (dialect, branch)
    assert report.loaded_fraction == 1
    assert set(report.matched) == set(source.state_dict())
    assert (report.missing, report.unexpected) == ((), ())
    assert model.name == "checkpoint"
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@EACH
def test_a_dropped_key_is_named(
    tmp_path: Path,
    tiny: Tiny,
    write: Callable[[Tensors], Any],
    dialect: str,
    arguments: dict[str, Any],
    branch: str | None,
) -> None:
    tensors = tiny(**arguments).state_dict()
    path = tmp_path / "checkpoint.pth"
    for key in list(tensors):
        if key.startswith("head") or (".0." not in key and "blocks" in key):
            continue
        torch.save(write({name: tensor for name, tensor in tensors.items() if name != key}), path)
        # Without positions of their own, prefix tokens leave no trace in the other tensors.
        if key.endswith("_token") and "no_embed_class" in arguments:
            continue
        with pytest.raises(CheckpointError, match=re.escape(key)) as caught:
            load(path, heads=4)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("write", "branch"),
    [(timm_ema, "ema"), (deit, "model_ema"), (moco, "momentum_encoder"), (dino, "student")],
)
def test_the_other_branch(
    tmp_path: Path, tiny: Tiny, write: Callable[[Tensors], Any], branch: str
) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(write(tensors), path)
    model = load(f"{path},heads=4,branch={branch}")
    torch.testing.assert_close(model.module.state_dict(), noise(tensors))
    with pytest.raises(CheckpointError, match="no branch 'teachr'; it holds"):
        load(f"{path},heads=4,branch=teachr")


@pytest.mark.parametrize("write", [timm_ema, deit, moco, dino])
def test_branches_go_by_any_usual_name(
    tmp_path: Path, tiny: Tiny, write: Callable[[Tensors], Any]
) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(write(tensors), path)
    student, teacher = (tensors, noise(tensors)) if write is not dino else (noise(tensors), tensors)
    for branch in ("ema", "teacher", "momentum"):
        torch.testing.assert_close(load(path, heads=4, branch=branch).module.state_dict(), teacher)
    torch.testing.assert_close(load(path, heads=4, branch="student").module.state_dict(), student)


def test_a_branch_that_is_not_there_is_not_made_up(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": tiny().state_dict()}, path)
    with pytest.raises(CheckpointError, match="no branch 'teacher'; it holds model"):
        load(path, heads=4, branch="teacher")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.model._orig_mod.backbone.",
        "_orig_mod.backbone.module.",
        "model.module.encoder.net.",
        "backbone.model.",
        "vit.",
    ],
)
def test_wrappers_in_any_order(tmp_path: Path, tiny: Tiny, prefix: str) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": prefixed(tensors, prefix)}, path)
    model = load(path, heads=4)
    torch.testing.assert_close(model.module.state_dict(), tensors)
    assert model.report is not None
    assert model.report.branch is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(tmp_path: Path, tiny: Tiny, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in tiny().state_dict().items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors}, path)
    state = load(path, heads=4).module.state_dict()
    torch.testing.assert_close(
        state, {key: t.float() for key, t in tensors.items()}, rtol=0, atol=0
    )


def test_a_distillation_run_is_no_dino(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    content = prefixed(tensors, "module.model.") | prefixed(noise(tensors), "module.teacher.")
    torch.save({"model": content}, path)
    report = load(path, heads=4).report
    assert report is not None
    assert (report.dialect, report.branch) == ("mae_lite", "model")
    assert len(report.ignored) == len(tensors)


def test_safetensors(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path)
    model = load(path, heads=4)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    torch.testing.assert_close(model.module.state_dict(), tensors, atol=1e-3, rtol=1e-3)


def test_a_head_that_timm_could_not_hold_is_left_out(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny(num_classes=5).state_dict()
    path = tmp_path / "model.pth"
    torch.save({key: tensors[key] for key in tensors if key != "head.bias"}, path)
    model = load(path, heads=4)
    assert model.report is not None
    assert model.report.ignored == ("head.weight",)
    assert isinstance(model.module.head, nn.Identity)


def test_a_pooling_by_attention_is_left_out(tmp_path: Path, tiny: Tiny, images: Tensor) -> None:
    source = tiny(global_pool="map", class_token=False, num_classes=5)
    path = tmp_path / "model.pth"
    torch.save(source.state_dict(), path)
    model = load(path, heads=4)
    with torch.no_grad():
        expected = source.forward_features(images)
        torch.testing.assert_close(model.module.forward_features(images), expected)
    assert model.report is not None
    assert {key.partition(".")[0] for key in model.report.ignored} == {"attn_pool"}
    assert model.report.unexpected == ()


def test_keys_outside_the_encoder_are_reported(tmp_path: Path, tiny: Tiny) -> None:
    path = tmp_path / "model.pth"
    extra = {"lm_thing.weight": torch.zeros(2)}
    torch.save({"state_dict": prefixed(tiny().state_dict(), "backbone.") | extra}, path)
    report = load(path, heads=4).report
    assert report is not None
    assert report.unexpected == ("lm_thing.weight",)


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.attn.lambda_q1",
        "blocks.1.gamma_3",
        "rope.freqs",
        "meta_tokens",
        "cls_norm.weight",
        "norm_post.weight",
    ],
)
def test_keys_that_would_change_the_features_are_refused(
    tmp_path: Path, tiny: Tiny, key: str
) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny().state_dict() | {key: torch.zeros(4, 4)}, path)
    with pytest.raises(CheckpointError, match=f"no plain Vision Transformer: it also holds {key}"):
        load(path, heads=4)


def test_a_branch_within_another(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(prefixed(tensors, "model.") | prefixed(noise(tensors), "model.ema."), path)
    for branch, expected in (("model", tensors), ("ema", noise(tensors))):
        model = load(path, heads=4, branch=branch)
        torch.testing.assert_close(model.module.state_dict(), expected)
        assert model.report is not None
        assert (len(model.report.ignored), model.report.unexpected) == (len(tensors), ())


def test_a_container_of_several_branches_is_none_of_them(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    both = prefixed(tensors, "student.") | prefixed(noise(tensors), "teacher.")
    torch.save({"model": both}, path)
    with pytest.raises(CheckpointError, match="no branch 'model'; it holds student, teacher"):
        load(path, heads=4, branch="model")


def test_encoders_in_two_dialects_are_chosen_by_name(tmp_path: Path, tiny: Tiny) -> None:
    """A student of timm beside its teacher of torchvision: neither is taken for the other."""
    tensors = tiny().state_dict()
    teacher = torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64).state_dict()
    path = tmp_path / "distilled.pth"
    torch.save({"model": tensors, "teacher": teacher}, path)
    with pytest.raises(CheckpointError, match="different kinds: teacher, model; choose one with"):
        load(path, heads=4)
    torch.testing.assert_close(load(path, heads=4, branch="model").module.state_dict(), tensors)
    report = load(path, heads=4, branch="teacher").report
    assert report is not None
    assert (report.dialect, report.branch) == ("torchvision", "teacher")


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_wrappers_of_single_blocks(tmp_path: Path, tiny: Tiny, wrapper: str) -> None:
    tensors = tiny().state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({re.sub(r"^(blocks\.\d+)", rf"\1.{wrapper}", k): tensors[k] for k in tensors}, path)
    model = load(path, heads=4)
    torch.testing.assert_close(model.module.state_dict(), tensors)
    assert model.report is not None
    assert model.report.unexpected == ()


@pytest.mark.parametrize("key", ["pre_layernorm.weight", "ln_pre.bias"])
def test_a_norm_that_nothing_is_known_of_is_refused(tmp_path: Path, tiny: Tiny, key: str) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(tiny().state_dict() | {key: torch.ones(32)}, path)
    with pytest.raises(CheckpointError, match=f"also holds {key}"):
        load(path, heads=4)


def test_what_is_not_whole_is_never_said_to_be(tmp_path: Path, tiny: Tiny) -> None:
    tensors = tiny(embed_dim=256, depth=8).state_dict()
    del tensors["norm.bias"]
    path = tmp_path / "checkpoint.pth"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"only 99\.9% of its encoder: it lacks norm\.bias"):
        load(path)
