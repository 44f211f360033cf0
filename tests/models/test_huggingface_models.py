from __future__ import annotations

import builtins
import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models import hub, load
from vitprobe.models.untrained import is_untrained, untrained

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


def tokens(module: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(pixel_values=images).last_hidden_state


@pytest.fixture
def vit(tmp_path: Path) -> Any:
    module = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    module.save_pretrained(tmp_path)
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    return module


def test_a_saved_folder(tmp_path: Path, vit: Any, images: Tensor) -> None:
    model = load(f"hf:{tmp_path}")
    torch.testing.assert_close(tokens(model.module, images), tokens(vit.vit, images))
    assert type(model.module).__name__ == "ViTModel"
    assert model.name == tmp_path.name
    assert model.input_size == (3, 16, 16)
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert model.facts["mean"].evidence == "config"
    assert (model.facts["depth"].value, model.facts["heads"].value) == (2, 4)
    assert model.sha256 == load(tmp_path).sha256
    report = model.report
    assert report is not None
    assert (report.dialect, report.loaded_fraction) == ("transformers", 1)
    # The task's head is left out; the pooler behind the last layer is made anew.
    assert set(report.unexpected) == {"classifier.weight", "classifier.bias"}
    assert set(report.missing) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not set(report.missing) & set(report.matched)


def test_random_weights(tmp_path: Path, vit: Any) -> None:
    before = torch.random.get_rng_state()
    first, same, other = (load(f"init:hf:{tmp_path}{seed}") for seed in ("", ",seed=0", ",seed=1"))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(first.module.state_dict(), same.module.state_dict(), rtol=0, atol=0)
    key = "embeddings.cls_token"
    assert not torch.equal(first.module.state_dict()[key], other.module.state_dict()[key])
    assert first.report is None
    assert first.mean == (0.5, 0.4, 0.3)
    assert is_untrained(first)
    twin = untrained(load(f"hf:{tmp_path}"), "twin")
    torch.testing.assert_close(twin.module.state_dict(), first.module.state_dict())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_two_towers_the_one_for_images(tmp_path: Path, images: Tensor, kind: str) -> None:
    image = getattr(transformers, f"{kind}VisionConfig")(**SMALL).to_dict()
    config = getattr(transformers, f"{kind}Config")(vision_config=image, text_config=TEXT)
    source = getattr(transformers, f"{kind}Model")(config).eval()
    source.save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}")
    expected = tokens(source.vision_model, images)
    torch.testing.assert_close(tokens(model.module, images), expected)
    assert model.report is not None
    assert model.report.missing == ()


def test_the_masked_autoencoder_masks_nothing(tmp_path: Path, images: Tensor) -> None:
    config = transformers.ViTMAEConfig(**SMALL, decoder_num_hidden_layers=1, decoder_hidden_size=32)
    source = transformers.ViTMAEForPreTraining(config).eval()
    source.save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}")
    source.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = source.vit(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    torch.testing.assert_close(tokens(model.module, images), expected)


def test_weights_that_do_not_fill_the_model(tmp_path: Path, vit: Any) -> None:
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(key for key in tensors if key.endswith("layernorm_before.weight"))
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != dropped},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"does not fill its ViTModel: it lacks layers\.0\."):
        load(f"hf:{tmp_path}")


def test_it_is_silent(tmp_path: Path, vit: Any, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    load(f"hf:{tmp_path}")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_folder_that_transformers_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="transformers cannot load"):
        load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SourceError, match="transformers cannot load") as caught:
        load(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open(r'{tmp_path / 'owned'}', 'w')\nclass C: pass\n")
    stated = {"model_type": "odd", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(SourceError, match="transformers cannot load"):
        load(f"hf:{tmp_path}")
    assert not (tmp_path / "owned").exists()


def test_a_cached_repository_needs_no_network(
    tmp_path: Path, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: config)
    monkeypatch.setattr(hub, "unreachable", lambda url: pytest.fail("asked the network"))
    model = load("hf:some/vit")
    assert (model.name, model.report is not None) == ("vit", True)
    (tmp_path / "model.safetensors").unlink()
    assert load("init:hf:some/vit").name == "init:vit"
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    with pytest.raises(SourceError, match="is not in the local cache"):
        load("hf:some/vit")


def test_what_is_no_name_of_a_repository() -> None:
    with pytest.raises(SourceError, match="neither a folder nor the name of a repository"):
        load("hf:no/such/folder")


@pytest.mark.parametrize("mean", [0.5, [0.5]])
def test_one_mean_for_all_channels(tmp_path: Path, vit: Any, mean: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    assert load(f"init:hf:{tmp_path}").mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    assert load(f"init:hf:{tmp_path}").facts["mean"].evidence == "assumed"


def test_offline_is_honoured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda url: pytest.fail("asked the network"))
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    with pytest.raises(SourceError, match=r"'nobody/nothing' is no folder.*HF_HUB_OFFLINE forbids"):
        load("hf:nobody/nothing")


def test_an_unreachable_hub_is_said_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    real = hub.unreachable
    # 192.0.2.0/24 is reserved for documentation: nothing ever answers there (RFC 5737).
    monkeypatch.setattr(hub, "unreachable", lambda url: real("http://192.0.2.1"))
    start = time.monotonic()
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        load("hf:nobody/nothing")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SourceError, match=r"pip install 'vitprobe\[hf\]'"):
        load(f"hf:{tmp_path}")
