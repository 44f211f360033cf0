"""Image towers written by open_clip give open_clip's own tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitprobe.errors import CheckpointError
from vitprobe.models import Fact, load

open_clip = pytest.importorskip("open_clip")

TOWER = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}


def build(*, quick_gelu: bool = False, **tower: Any) -> Any:
    """A CLIP of open_clip with weights far from any initial value."""
    from open_clip.model import CLIP

    module = CLIP(8, {**TOWER, **tower}, TEXT, quick_gelu=quick_gelu).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def tokens(tower: Any, images: Tensor) -> Tensor:
    """All tokens after the final norm, seen as it is computed, and the blocks' output normed."""
    seen: list[Tensor] = []
    hook = tower.transformer.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        tower(images)
        hook.remove()
        return tower.ln_post(seen[0])


def probed(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.forward_features(images)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("tower", [{}, {"ls_init_value": 0.1}, {"mlp_ratio": 2.0}])
def test_the_image_tower_of_a_whole_model(
    tmp_path: Path, images: Tensor, quick: bool, tower: dict[str, Any]
) -> None:
    source = build(quick_gelu=quick, **tower)
    path = tmp_path / "open_clip.pt"
    torch.save({"epoch": 1, "state_dict": source.state_dict()}, path)
    given = {"activation": "quick_gelu"} if quick else {}
    model = load(path, heads=4, **given)
    torch.testing.assert_close(
        probed(model, images), tokens(source.visual, images), atol=1e-5, rtol=0
    )
    assert model.report is not None
    assert model.report.dialect == "open_clip"
    assert model.report.loaded_fraction == 1
    assert (model.report.missing, model.report.unexpected) == ((), ())
    assert model.facts["norm_before_blocks"].value is True
    assert (model.facts["norm_eps"].value, model.facts["norm_eps"].evidence) == (1e-5, "dialect")
    assert model.facts["activation"].evidence == ("user" if quick else "assumed")
    assert model.mean == (0.48145466, 0.4578275, 0.40821073)
    assert model.facts["mean"].evidence == "assumed"


def test_the_tower_alone_under_wrappers(tmp_path: Path, images: Tensor) -> None:
    source = build()
    path = tmp_path / "tower.pt"
    tower = source.visual.state_dict()
    torch.save({f"module.{key}": tensor for key, tensor in tower.items()}, path)
    model = load(path, heads=4)
    torch.testing.assert_close(
        probed(model, images), tokens(source.visual, images), atol=1e-5, rtol=0
    )


def test_the_releases_of_openai_have_quick_gelu(tmp_path: Path, images: Tensor) -> None:
    source = build(quick_gelu=True).half()
    path = tmp_path / "ViT.pt"
    sizes = {"input_resolution": 16, "context_length": 8, "vocab_size": 50}
    numbers = {name: torch.tensor(size) for name, size in sizes.items()}
    torch.save({**source.state_dict(), **numbers}, path)
    model = load(path, heads=4)
    torch.testing.assert_close(
        probed(model, images), tokens(source.float().visual, images), atol=1e-5, rtol=0
    )
    assert model.report is not None
    assert model.report.dialect == "openai_clip"
    assert model.report.unexpected == ()
    assert (model.facts["activation"].value, model.facts["activation"].evidence) == (
        "QuickGELU",
        "dialect",
    )
    assert model.facts["mean"].evidence == "dialect"


def test_a_saved_folder_with_its_config(tmp_path: Path, images: Tensor) -> None:
    source = build(quick_gelu=True)
    torch.save(source.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    stated = {
        "model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": TOWER, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    model = load(tmp_path)
    torch.testing.assert_close(
        probed(model, images), tokens(source.visual, images), atol=1e-5, rtol=0
    )
    assert (model.facts["heads"].value, model.facts["heads"].evidence) == (4, "config")
    assert model.facts["activation"].evidence == "config"
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_a_tower_of_timm(tmp_path: Path, images: Tensor, tiny: Any) -> None:
    """As open_clip's SigLIP: timm's model, and behind it an attention pool."""
    trunk = tiny(class_token=False, global_pool="map", num_heads=4)
    text = {"text.token_embedding.weight": torch.zeros(50, 16), "logit_scale": torch.zeros(())}
    own = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    path = tmp_path / "siglip.pt"
    torch.save({**own, **text, "visual.head.proj.weight": torch.zeros(8, 32)}, path)
    model = load(path, heads=4)
    with torch.no_grad():
        expected = trunk.forward_features(images)
    torch.testing.assert_close(probed(model, images), expected, atol=1e-6, rtol=0)
    assert model.report is not None
    assert (model.report.dialect, model.report.unexpected) == ("open_clip", ())


def test_a_tensor_that_would_change_the_tower_is_refused(tmp_path: Path) -> None:
    tensors = build().state_dict()
    path = tmp_path / "odd.pt"
    torch.save({**tensors, "visual.transformer.resblocks.0.attn.ln_q.weight": torch.ones(8)}, path)
    with pytest.raises(CheckpointError, match=r"also holds visual\..*ln_q\.weight"):
        load(path, heads=4)


def test_a_residual_network_of_clip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "RN50.pt"
    torch.save(
        {"visual.conv1.weight": torch.ones(4, 3, 3, 3), **nn.Linear(2, 2).state_dict()}, path
    )
    with pytest.raises(CheckpointError, match="no Vision Transformer"):
        load(path)


def test_a_tower_without_a_norm_before_its_blocks(tmp_path: Path, images: Tensor) -> None:
    """As CLIPA's: only the config tells it from one that has lost its norm."""
    tower = {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}
    source = build(**tower)
    torch.save(source.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no Vision Transformer"):
        load(tmp_path / "open_clip_pytorch_model.bin")
    stated = {"model_cfg": {"vision_cfg": {**TOWER, **tower}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    model = load(tmp_path)
    torch.testing.assert_close(
        probed(model, images), tokens(source.visual, images), atol=1e-5, rtol=0
    )
    assert (model.facts["norm_eps"].value, model.facts["norm_eps"].evidence) == (1e-3, "config")
    assert model.facts["activation"].value == "GELUTanh"


def test_a_tower_of_timm_by_its_name(tmp_path: Path) -> None:
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=32)
    own = {f"visual.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    torch.save(own, tmp_path / "open_clip_pytorch_model.bin")
    stated = {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    facts = load(tmp_path).facts
    for name, value in (("heads", 3), ("norm_eps", 1e-6), ("activation", "GELU")):
        assert facts[name] == Fact(value, "config", "vit_tiny_patch16_224")
