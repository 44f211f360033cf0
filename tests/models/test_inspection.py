from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from vitprobe.models import load, wrap
from vitprobe.models.inspection import describe_text


def test_a_checkpoint_is_told_with_its_evidence(
    tmp_path: Path, tiny: Callable[..., nn.Module]
) -> None:
    tensors = tiny(global_pool="avg").state_dict()
    tensors["fc_norm.bias"][0] = torch.inf
    path = tmp_path / "model.pth"
    torch.save({"model": tensors, "model_ema": tensors, "epoch": 3}, path)
    text = describe_text(load(path, heads=4))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "dialect mae",
        "heads 4 user",
        "norm_eps 1e-06 dialect (that of mae)",
        "mean 0.485, 0.456, 0.406 assumed (ImageNet's)",
        "branch model",
        "loaded 100.0% of the encoder",
        "matched 30 (cls_token, pos_embed, patch_embed.proj.weight, …)",
        "missing 0",
        "not finite 1 (fc_norm.bias)",
        "normed 0 to 1: blocks.0.norm1 to blocks.1.norm1; 2: fc_norm",
        "residual 0: input of blocks.0; 1 to 2: output of each block",
        "tokens 0 to 2: 1 prefix token and 4x4 patches of 4x4 pixels, width 32",
        "0 to 1 blocks.0.attn to blocks.1.attn: global, 4 heads of 17 queries (1 prefix) to "
        "17 keys (1 prefix)",
    ):
        assert expected in lines
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_wrapped_module_has_no_weights_section(tiny: Callable[..., nn.Module]) -> None:
    text = describe_text(wrap(tiny(), name="mine"))
    assert "Weights" not in text
    assert "module" in text


def test_windows_and_what_they_are_of_are_told() -> None:
    module = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )
    lines = [" ".join(line.split()) for line in describe_text(wrap(module, name="s")).splitlines()]
    for expected in (
        "tokens 0 to 1: 16x16 patches of 2x2 pixels, width 16",
        "0 layers.0.blocks.0.attn: windows, 2 heads, 16 windows of 16 queries to 16 keys",
        "1 layers.0.blocks.1.attn: windows, 2 heads, 16 windows of 16 queries to 16 keys, masked",
    ):
        assert expected in lines, lines
    assert not any(line.startswith("refused") for line in lines)


def test_what_has_no_distance_is_refused_with_the_reason() -> None:
    module = timm.models.xcit.Xcit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, cls_attn_layers=1
    )
    text = describe_text(wrap(module, name="x", input_size=(3, 32, 32)))
    assert "no attention distance in attention layers 0 to 1: it attends over channels" in text
    assert "class token, 4 heads of 1 query to 17 keys (1 prefix)" in text
    assert "its only query is the class token" in text


def test_a_convolutional_network_says_that_it_has_no_attention() -> None:
    module = timm.create_model("resnet10t", num_classes=0)
    text = describe_text(wrap(module, name="conv", input_size=(3, 64, 64)))
    assert "none  it is convolutional" in text
    assert "width 512" in text
