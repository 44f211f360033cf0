"""Attention as a recorder hands it on, for models that are no plain Vision Transformers."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from models_for_tests import tiny
from torch import Tensor, nn

import vitprobe as vp
from vitprobe.capture import Recorder
from vitprobe.capture.attention import AttentionTap
from vitprobe.errors import CaptureError
from vitprobe.measures import chunks as chunks_module
from vitprobe.models import Model
from vitprobe.models.calls import AttentionCall, AttentionCalls


def wrapped(module: nn.Module, size: int = 64, std: float = 0.05) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return vp.wrap(module, name="foreign", input_size=(3, size, size), mean=0.5, std=0.5)


def swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
    )


def pyramid() -> nn.Module:
    return timm.models.PyramidVisionTransformerV2(
        depths=(1, 1, 1, 1),
        embed_dims=(16, 32, 48, 64),
        num_heads=(1, 2, 3, 4),
        sr_ratios=(8, 4, 2, 1),
    )


def grid() -> nn.Module:
    return timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1,), embed_dim=(32,))


def class_attention() -> nn.Module:
    return timm.models.Cait(img_size=64, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def channels() -> nn.Module:
    return timm.models.Xcit(img_size=64, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def gated() -> nn.Module:
    return timm.models.ConVit(
        img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=4, local_up_to_layer=1
    )


def mobile() -> nn.Module:
    return timm.create_model("mobilevitv2_050", num_classes=5)


FOREIGN = {
    make.__name__: make for make in (swin, pyramid, grid, class_attention, channels, gated, mobile)
}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    torch.manual_seed(0)
    return {name: wrapped(make()) for name, make in FOREIGN.items()}


def images(n: int = 3, size: int = 64) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def chunks_of(model: Model, x: Tensor):
    chunks = []
    with torch.inference_mode(), Recorder(model, on_attention=chunks.append) as recorder:
        output = recorder.run(x)
    return chunks, output


def maps_of(chunks, layer: int, windows: int) -> Tensor:
    """(images, windows, heads, queries, keys), prefix tokens first."""
    parts = [chunk for chunk in chunks if chunk.layer == layer]
    whole = torch.cat(
        [
            torch.cat([part.log_p for part in parts if part.first_image == first], dim=2)
            for first in sorted({part.first_image for part in parts})
        ]
    ).exp()
    return whole.unflatten(2, (windows, -1)).transpose(1, 2)


class Calls(AttentionCalls):
    """Keeps every call and what its function returns, as the model goes on to use it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.pairs: list[tuple[AttentionCall, Tensor]] = []

    def on_call(self, call: AttentionCall) -> None:
        self.last = call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.last = None
        output = super().__torch_function__(func, types, args, kwargs)
        if self.last is not None:
            self.pairs.append((self.last, output))
        return output


@pytest.mark.parametrize("name", FOREIGN)
def test_outputs_are_bit_identical_and_every_row_is_a_distribution(models, name):
    model = models[name]
    with torch.inference_mode():
        expected = model.module(model.normalize(images()))
    chunks, output = chunks_of(model, images())
    assert torch.equal(output, expected)
    for layer, site in enumerate(model.anatomy.sites):
        maps = maps_of(chunks, layer, site.windows)
        assert maps.shape == (3, site.windows, site.heads, site.queries, site.keys)
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("name", ["pyramid", "swin", "grid", "class_attention"])
def test_weights_times_values_are_what_the_model_goes_on_with(name):
    model = wrapped(FOREIGN[name]())
    for block in model.module.modules():
        if hasattr(block, "fused_attn"):
            block.fused_attn = True
    with torch.inference_mode(), Calls(model.module) as calls:
        model.module(model.normalize(images()))
    chunks, _ = chunks_of(model, images())
    checked = 0
    for layer, site in enumerate(model.anatomy.sites):
        ((call, output),) = [
            (call, output)
            for call, output in calls.pairs
            if (call.path, call.call) == (site.path, site.call)
        ]
        maps = maps_of(chunks, layer, site.windows)
        for order, axis in ((site.query_order, 3), (site.key_order, 4)):
            if order is not None:
                maps = maps.index_select(axis, order.argsort())
        # (images, windows, heads) and (images, heads, windows) both occur.
        if site.axes and site.axes[0][0] == "heads" and site.windows > 1:
            maps = maps.transpose(1, 2)
        maps = maps.reshape(call.shape)
        if call.value is None:
            torch.testing.assert_close(maps, output, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(maps @ call.value, output, atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked == (2 if name == "class_attention" else len(model.anatomy.sites))


def test_unfused_attention_of_windows_is_what_attn_drop_reads():
    model = wrapped(swin())
    seen = []
    for path, module in model.module.named_modules():
        if path.endswith(".attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda m, a, output: seen.append(output))
    chunks, _ = chunks_of(model, images())
    for layer, (site, expected) in enumerate(zip(model.anatomy.sites, seen, strict=True)):
        maps = maps_of(chunks, layer, site.windows).flatten(0, 1)
        torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-5)


def test_eager_attention_of_transformers_is_its_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=48,
    )  # fmt: skip
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        config._attn_implementation = implementation
        model = wrapped(transformers.ViTModel(config), 32, std=0.2)
        chunks, _ = chunks_of(model, images(2, 32))
        model.module.set_attn_implementation("eager")
        with torch.inference_mode():
            expected = model.module(model.normalize(images(2, 32)), output_attentions=True)
        for layer, own in enumerate(expected.attentions):
            maps = maps_of(chunks, layer, 1)[:, 0]
            torch.testing.assert_close(maps, own, atol=1e-6, rtol=1e-5)


def test_torchvision_differs_by_rounding_alone():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48
    )
    model = wrapped(module, 32)
    x = images(2, 32)
    with torch.inference_mode():
        expected = model.module(model.normalize(x))
    chunks, output = chunks_of(model, x)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
    assert {chunk.layer for chunk in chunks} == {0, 1}
    assert maps_of(chunks, 1, 1).shape == (2, 1, 3, 17, 17)


@pytest.mark.parametrize("elements", [1, 100, 3000, 10**9])
@pytest.mark.parametrize("name", ["swin", "pyramid"])
def test_the_size_of_chunks_changes_nothing(models, name, elements, monkeypatch):
    model = models[name]
    whole, _ = chunks_of(model, images())
    monkeypatch.setattr(chunks_module, "CHUNK_ELEMENTS", elements)
    parts = [part for chunk in whole for part in chunk.parts()]
    for layer, site in enumerate(model.anatomy.sites):
        torch.testing.assert_close(
            maps_of(parts, layer, site.windows), maps_of(whole, layer, site.windows)
        )
    assert all(
        chunk.log_p.numel() <= max(elements, chunk.log_p.shape[1] * chunk.log_p.shape[3])
        for chunk in parts
    )


def test_chunks_say_where_their_tokens_lie_and_count_over_windows(models):
    model = models["swin"]
    chunks, _ = chunks_of(model, images())
    for layer, site in enumerate(model.anatomy.sites):
        own = [chunk for chunk in chunks if chunk.layer == layer]
        assert [chunk.first_query for chunk in own] == [16 * i for i in range(site.windows)]
        assert {chunk.queries for chunk in own} == {16 * site.windows}
        assert not any(chunk.whole for chunk in own)
        for window, chunk in enumerate(own):
            assert torch.equal(chunk.query_xy, site.query_xy[window])
            assert torch.equal(chunk.key_xy, site.key_xy[window])


def test_what_has_no_place_says_so(models):
    model = models["class_attention"]
    chunks, _ = chunks_of(model, images())
    last = chunks[-1]
    assert model.anatomy.sites[last.layer].queries == 1
    assert (last.query_xy, last.key_xy, last.query_prefix, last.key_prefix) == (None, None, 0, 1)
    assert chunks[0].query_xy is not None


class ClassLast(nn.Module):
    """An encoder of one block whose class token comes last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 3
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.blocks = nn.ModuleList([timm.models.vision_transformer.Block(24, 3)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.embed(x).flatten(2).mT, self.cls.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def test_prefix_tokens_come_first_wherever_the_model_has_them():
    model = wrapped(ClassLast(), 32)
    with torch.inference_mode(), Calls(model.module) as calls:
        model.module(model.normalize(images(2, 32)))
    ((call, _),) = calls.pairs
    expected = call.logits().softmax(-1).roll((1, 1), (2, 3))
    chunks, _ = chunks_of(model, images(2, 32))
    assert (chunks[0].query_prefix, chunks[0].key_prefix) == (1, 1)
    torch.testing.assert_close(maps_of(chunks, 0, 1)[:, 0], expected)


def test_rows_without_a_key_are_undefined_and_not_nan():
    model = tiny(depth=1)
    keep = torch.ones(17, 17, dtype=torch.bool)
    keep[3] = False
    module = model.module.blocks[0].attn
    module.forward = lambda x, *a, **k: F.scaled_dot_product_attention(
        *(3 * [x[:, None].expand(-1, 3, -1, -1)]), attn_mask=keep
    )[:, 0].nan_to_num()
    chunks, _ = chunks_of(model, images(2, 32))
    assert not chunks[0].has_nan
    assert chunks[0].entropy.isnan().sum() == 2 * 3
    assert chunks[0].entropy[:, :, 2].isnan().all()


def test_other_shapes_than_described_raise(models):
    model = models["pyramid"]
    tap = AttentionTap(model, lambda chunk: None)
    with pytest.raises(CaptureError, match=r"attention layer 0 \('stages.0.*does not fit"), tap:
        model.module(torch.rand(1, 3, 96, 96))


def test_a_tap_stays_for_several_passes_and_keeps_gradients_where_asked():
    model = tiny(depth=2)
    kept = []
    tap = AttentionTap(model, kept.append, gradients=True)
    x = images(2, 32).requires_grad_()
    with tap:
        model.module(x)
        model.module(x)
    assert tap.calls == {0: 1, 1: 1}
    assert [chunk.layer for chunk in kept] == [0, 1, 0, 1]
    (gradient,) = torch.autograd.grad(kept[1].entropy.sum(), x)
    assert gradient.abs().sum() > 0
    with AttentionTap(model, kept.append):
        model.module(x)
    assert not kept[-1].log_p.requires_grad


def test_attention_is_single_precision_under_autocast():
    model = tiny(depth=1)
    kept = []
    with torch.no_grad(), AttentionTap(model, kept.append), torch.autocast("cpu", torch.bfloat16):
        model.module(images(2, 32))
    assert kept[0].log_p.dtype == torch.float32
    sums = kept[0].log_p.exp().sum(-1)
    assert (sums - 1).abs().max() < 1e-5
    assert math.isclose(float(sums.mean()), 1, abs_tol=1e-6)
