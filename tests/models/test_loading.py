"""Real weights, where they are at hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitprobe.models import Fact, load

FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_dinov2_in_half_precision_at_another_size(shared: Path) -> None:
    path = shared / "weights" / "dinov2s14_imgfocus_timm_fp16.safetensors"
    model = load(f"{path},size=224", name="DINOv2, saliency fine-tuned")
    assert model.anatomy.grid == (16, 16)
    assert model.facts["heads"] == Fact(6, "assumed", "64 channels a head")
    assert (
        model.facts["position_embedding"].value == "resized bicubic antialiased from 37x37 to 16x16"
    )
    assert model.report is not None
    assert len(model.report.matched) == 174
    assert model.report.unexpected == model.report.ignored == ()
    random = load("init:vit_small_patch14_dinov2,size=224")
    assert random.module.state_dict().keys() == model.module.state_dict().keys()


@pytest.mark.parametrize(("heads", "lowest", "highest"), [(4, 0.89, 0.93), (2, 0.4, 0.65)])
def test_fashion_mnist_accuracy(shared: Path, heads: int, lowest: float, highest: float) -> None:
    """The published head count is right, and another loads without any error but classifies ill."""
    if not FASHION.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    path = shared / "weights" / "fmnist_vit_d128l6h4_timm.pth"
    model = load(f"{path},heads={heads},mean=0.5,std=0.5")
    assert model.input_size == (1, 28, 28)

    def idx(name: str, offset: int) -> np.ndarray:
        with gzip.open(FASHION / f"t10k-{name}-ubyte.gz") as stream:
            return np.frombuffer(stream.read(), np.uint8, offset=offset)

    pixels = idx("images-idx3", 16).reshape(-1, 1, 28, 28)[:1000]
    labels = torch.from_numpy(idx("labels-idx1", 8)[:1000].astype(np.int64))
    with torch.no_grad():
        logits = model.module(model.normalize(torch.from_numpy(pixels / np.float32(255))))
    assert lowest < float((logits.argmax(1) == labels).float().mean()) < highest


def test_init_of_a_file_takes_the_architecture_and_draws_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    before = torch.get_rng_state()
    spec = f"init:{tmp_path / 'vit.pth'},heads=3"
    random, again, other = load(spec), load(spec), load(spec, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.module.blocks[0].attn.qkv.weight for model in (random, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], module.blocks[0].attn.qkv.weight)
    assert 0.01 < float(weights[0].std()) < 0.03  # timm's truncated normal of deviation 0.02
    assert random.name == "init:vit"
    assert random.report is None
    assert random.sha256 is None
    assert random.facts["heads"].value == 3
    assert random.facts["position_embedding"].value == "random"
