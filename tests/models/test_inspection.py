from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        "norm_eps 1e-06 assumed (timm's default)",
        "mean 0.485, 0.456, 0.406 assumed (ImageNet's)",
        "branch model",
        "loaded 100.0% of the encoder",
        "matched 30 (cls_token, pos_embed, patch_embed.proj.weight, …)",
        "missing 0",
        "not finite 1 (fc_norm.bias)",
        "normed 0 to 1: blocks.0.norm1 to blocks.1.norm1; 2: fc_norm",
        "residual 0: input of blocks.0; 1 to 2: output of each block",
        "attention blocks.0.attn to blocks.1.attn",
    ):
        assert expected in lines
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_wrapped_module_has_no_weights_section(tiny: Callable[..., nn.Module]) -> None:
    text = describe_text(wrap(tiny(), name="mine"))
    assert "Weights" not in text
    assert "module" in text
