from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitprobe.capture.features import Convention, feature_layouts, hook_features
from vitprobe.errors import CaptureError
from vitprobe.models import Model, wrap

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def wrapped(name: str, **options: Any) -> Model:
    """A random model of timm with all parameters away from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False, **options).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return wrap(module, name=name, input_size=(3, 64, 64))


def features(model: Model, convention: Convention, images: Tensor = IMAGES) -> dict[int, Tensor]:
    """What is handed on in one pass, checked against the layouts that were announced."""
    got: dict[int, Tensor] = {}
    handles = hook_features(model, convention, lambda i, tokens: got.update({i: tokens}))
    with torch.no_grad():
        model.module(images)
    for handle in handles:
        handle.remove()
    layouts = feature_layouts(model, convention)
    assert sorted(got) == list(range(len(layouts)))
    for layer, layout in enumerate(layouts):
        shape = (len(images), layout.prefix_tokens + layout.patches, layout.width)
        assert got[layer].shape == shape
    return got


def outputs(model: Model, path: str) -> Tensor:
    kept: list[Tensor] = []
    handle = model.module.get_submodule(path).register_forward_hook(
        lambda *call: kept.append(call[2])
    )
    with torch.no_grad():
        model.module(IMAGES)
    handle.remove()
    return kept[0]


def test_maps_are_handed_on_as_tokens_row_by_row() -> None:
    model = wrapped("resnet10t")
    got = features(model, "residual")
    for layer, path in enumerate(model.anatomy.blocks, start=1):
        maps = outputs(model, path)
        assert torch.equal(got[layer], maps.flatten(2).mT)
    assert feature_layouts(model, "normed") == feature_layouts(model, "residual")


def test_grids_of_windows_are_handed_on_row_by_row() -> None:
    model = wrapped(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
    )
    normed = features(model, "normed")
    assert torch.equal(normed[1], outputs(model, "layers.0.blocks.1.norm1").flatten(1, 2))
    assert torch.equal(normed[4], outputs(model, "norm").flatten(1, 2))
    residual = features(model, "residual")
    assert torch.equal(residual[2], outputs(model, "layers.0.blocks.1").flatten(1, 2))


def test_unrolled_tokens_are_brought_into_rows() -> None:
    """Hiera's own inverse of its order is the reference."""
    model = wrapped("hiera_tiny_224", img_size=64, embed_dim=16, stages=(1, 1, 2, 1))
    got = features(model, "residual")
    for layer in (1, 2, 4, 5):
        rolled = model.module.reroll(outputs(model, f"blocks.{layer - 1}"), layer - 1)
        assert torch.equal(got[layer], rolled.flatten(1, 2))


def test_a_norm_of_pooled_tokens_is_applied_to_every_token() -> None:
    model = wrapped("vit_tiny_patch16_224", img_size=64, depth=2, global_pool="avg")
    assert model.anatomy.final_norm == "fc_norm"
    expected = model.module.fc_norm(features(model, "residual")[2])
    torch.testing.assert_close(features(model, "normed")[2], expected)


def test_a_norm_of_pooled_maps_is_applied_to_every_token() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 8)
            self.up, self.down = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

        def forward(self, maps: Tensor) -> Tensor:
            return maps + self.down(self.up(self.norm(maps)).relu())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 8, 8), nn.GroupNorm(2, 8)
            self.layers = nn.Sequential(Block(), Block())

        def forward(self, images: Tensor) -> Tensor:
            maps = self.layers(self.stem(images))
            return self.norm(maps.mean((2, 3), keepdim=True)).flatten(1)

    torch.manual_seed(0)
    model = wrap(Own(), name="own", input_size=(3, 64, 64))
    assert model.anatomy.final_norm_pooled
    tokens = features(model, "residual")[2]
    expected = model.module.norm(tokens.reshape(-1, 8, 1, 1)).view(2, 64, 8)
    torch.testing.assert_close(features(model, "normed")[2], expected)


def test_branches_are_read_where_they_have_been_added() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.down(self.up(self.norm(tokens)).relu())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Conv2d(3, 16, 16, 16), nn.LayerNorm(16)
            self.layers = nn.ModuleList(Branch() for _ in range(3))

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images).flatten(2).mT
            for layer in self.layers:
                tokens = tokens + layer(tokens)
            self.seen = tokens
            return self.last(tokens)

    torch.manual_seed(0)
    model = wrap(Own(), name="own", input_size=(3, 64, 64))
    residual = features(model, "residual")
    assert torch.equal(residual[3], model.module.seen)
    stream = residual[0]
    for layer, branch in enumerate(model.module.layers, start=1):
        stream = stream + branch(stream)
        torch.testing.assert_close(residual[layer], stream)
    assert torch.equal(features(model, "normed")[3], model.module.last(model.module.seen))


def test_gradients_are_kept() -> None:
    model = wrapped("vit_tiny_patch16_224", img_size=64, depth=2, global_pool="avg")
    got: dict[int, Tensor] = {}
    handles = hook_features(model, "normed", lambda i, tokens: got.update({i: tokens}))
    model.module(IMAGES)
    for handle in handles:
        handle.remove()
    assert all(tokens.requires_grad for tokens in got.values())


def test_other_images_than_were_looked_at_are_refused() -> None:
    model = wrapped("resnet10t")
    with pytest.raises(
        CaptureError, match=r"'resnet10t', layer 0: \(2, 64, 8, 8\) is not 0 \+ 256"
    ):
        features(model, "residual", IMAGES[..., :32, :32])


def test_unknown_conventions_are_refused() -> None:
    model = wrapped("vit_tiny_patch16_224", img_size=64, depth=1)
    with pytest.raises(CaptureError, match="unknown layers 'raw': use 'normed' or 'residual'"):
        feature_layouts(model, "raw")
