from __future__ import annotations

import json
import sys
import threading

import numpy as np
import pytest
import timm
import torch
from models_for_tests import squares, tiny
from PIL import Image
from safetensors import safe_open

import vitprobe as vp
from vitprobe.capture import storing
from vitprobe.errors import CaptureError, DataError, ResultError

DEPTH, HEADS, TOKENS, WIDTH = 3, 3, 17, 24


@pytest.fixture
def model():
    return tiny()


def by_hand(model, images):
    """Features of both conventions and attention, written out."""
    vit = model.module
    tokens = vit._pos_embed(vit.patch_embed(model.normalize(images)))
    residual, normed, attention = [tokens], [], []
    for block in vit.blocks:
        normed.append(block.norm1(tokens))
        q, k, _ = block.attn.qkv(normed[-1]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attention.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        tokens = block(tokens)
        residual.append(tokens)
    return {"normed": [*normed, vit.norm(tokens)], "residual": residual, "attention": attention}


def hooks_of(module):
    return [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("convention", ["normed", "residual"])
def test_what_is_captured_is_what_the_model_computes(model, convention, batch_size):
    images = squares(5)
    captured = vp.capture(
        model, images, what="both", convention=convention, batch_size=batch_size, device="cpu"
    )
    with torch.no_grad():
        expected = by_hand(model, images)
    assert list(captured.features) == [0, 1, 2, 3]
    assert list(captured.attention) == [0, 1, 2]
    for layer, features in captured.features.items():
        torch.testing.assert_close(features, expected[convention][layer], atol=1e-5, rtol=1e-5)
    for layer, attention in captured.attention.items():
        torch.testing.assert_close(attention, expected["attention"][layer], atol=1e-6, rtol=1e-5)
    assert captured.convention == convention
    assert captured.names == ("0", "1", "2", "3", "4")
    assert captured.layouts[0].grid == (4, 4)
    assert captured.sites[2].query_prefix == 1
    assert not hooks_of(model.module)


def test_chosen_layers_alone_are_kept(model):
    captured = vp.capture(model, squares(2), [-1, 0, 0], what="both")
    assert list(captured.features) == [0, DEPTH]
    assert list(captured.attention) == [0, DEPTH - 1]
    assert list(vp.capture(model, squares(2), what="attention").features) == []
    with pytest.raises(KeyError, match="layer 1 was not captured; layers that were: 0, 3"):
        captured.features[1]


@pytest.mark.parametrize(
    "layers",
    [np.array([0, -1]), torch.tensor([-1, 0]), range(0, 3, 2)],
    ids=["array", "tensor", "range"],
)
def test_layers_are_any_integers(model, tmp_path, layers):
    captured = vp.capture(
        model, squares(2), layers, what="attention", out=tmp_path / "x.safetensors"
    )
    assert list(captured.attention) == [0, DEPTH - 1]


def test_layers_of_a_generator_are_those_of_features_and_attention(model):
    captured = vp.capture(model, squares(2), (i for i in (0, 1)), what="both")
    assert list(captured.features) == list(captured.attention) == [0, 1]


@pytest.mark.parametrize("layers", [3, "all", ["blocks.0"], [1.0], [True, False], []])
def test_what_numbers_no_layers_is_refused(model, layers):
    with pytest.raises(CaptureError, match="are no numbers of layers: give integers such as"):
        vp.capture(model, squares(2), layers)
    with (
        pytest.raises(CaptureError, match="are no numbers of layers"),
        vp.capturing(model, layers),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "'tiny' has features in layers 0 to 3; there is no 4"),
        ({"layers": [-4], "what": "attention"}, "has attention in layers 0 to 2; there is no -4"),
        ({"what": "keys"}, "cannot capture 'keys': choose one of features, attention, both"),
        ({"batch_size": 0}, "a batch of 0 images is none"),
        ({"convention": "output"}, "unknown layers 'output'"),
        ({"precision": "fp16"}, "unknown precision 'fp16': use fp32 or bf16"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no torch dtype of floats"),
        ({"dtype": "float16"}, "dtype='float16' is no torch dtype of floats"),
    ],
)
def test_what_cannot_be_captured_is_refused(model, options, message):
    with pytest.raises(CaptureError, match=message):
        vp.capture(model, squares(2), **options)


def test_attention_in_windows_has_an_axis_for_them():
    torch.manual_seed(0)
    module = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )
    seen = []
    for part in module.modules():
        if isinstance(part, timm.models.swin_transformer.WindowAttention):
            part.fused_attn = False
            part.attn_drop.register_forward_hook(lambda drop, args, output: seen.append(output))
    captured = vp.capture(module, squares(3), what="both")
    del seen[:-4]  # those before are of the survey
    assert captured.attention[1].shape == (3, 16, 2, 16, 16)
    assert captured.sites[1].query_xy.shape == (16, 16, 2)
    for layer, expected in enumerate(seen):
        torch.testing.assert_close(captured.attention[layer].flatten(0, 1), expected)
    assert [tuple(features.shape) for features in captured.features.values()] == [
        (3, 256, 16), (3, 256, 16), (3, 64, 32), (3, 64, 32), (3, 64, 32),
    ]  # fmt: skip


def test_a_convolutional_network_has_features_alone():
    module = timm.create_model("resnet10t", num_classes=0).eval()
    model = vp.wrap(module, name="conv", input_size=(3, 64, 64))
    captured = vp.capture(model, squares(2, size=64))
    assert captured.convention == "residual"
    last = captured.features[len(captured.features) - 1]
    with torch.no_grad():
        maps = module.forward_features(model.normalize(squares(2, size=64)))
    torch.testing.assert_close(last, maps.flatten(2).mT)
    with pytest.raises(CaptureError, match=r"'conv' has no attention to capture: .*convol"):
        vp.capture(model, squares(2), what="both")


def test_only_modules_have_something_to_capture():
    with pytest.raises(CaptureError, match=r"cannot capture str: give a torch\.nn\.Module"):
        vp.capture("timm:vit_tiny_patch16_224", squares(2))


def test_arrays_keep_their_order_and_are_resized(model):
    images = squares(4, size=64)
    found = vp.capture(model, images.numpy(), [-1]).features[DEPTH]
    turned = vp.capture(model, images.flip(0).numpy(), [-1]).features[DEPTH]
    torch.testing.assert_close(found, turned.flip(0))
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    expected = vp.capture(model, resized.clamp(0, 1), [-1]).features[DEPTH]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_images_of_the_models_own_oblong_size_need_no_crop():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=(16, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3
    )
    captured = vp.capture(model, torch.rand(2, 3, 16, 32))
    assert captured.layouts[0].grid == (2, 4)
    with pytest.raises(DataError, match="images of 16 x 40 pixels: crop them to squares"):
        vp.capture(model, torch.rand(2, 3, 16, 40))


def test_folders_are_read_in_the_order_of_vp_images(model, tmp_path):
    for i in range(5):
        Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    found = vp.capture(model, tmp_path, [0], batch_size=2)
    assert found.names == tuple(vp.images(tmp_path).names)
    grey = torch.tensor([int(name[0]) * 40 / 255 for name in found.names])
    plain = grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    torch.testing.assert_close(found.features[0], vp.capture(model, plain, [0]).features[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 32, 32), r"images of shape \(3, 32, 32\) are none"),
        (torch.rand(0, 3, 32, 32), "are none"),
        (torch.randn(2, 3, 32, 32), r"give floats in \[0, 1\]; to run a model on inputs of your"),
        (torch.full((1, 3, 32, 32), torch.nan), r"give floats in \[0, 1\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"torch.uint8 from 0 to 0"),
        (torch.rand(2, 2, 32, 32), "images of 2 channels cannot be given to a model of 3"),
        (
            torch.rand(2, 32, 32, 3),
            r"\(2, 32, 32, 3\) have their channels last: give \(n, channels",
        ),
        (42, "cannot read images from int"),
    ],
)
def test_images_that_are_none(model, images, message):
    with pytest.raises(DataError, match=message):
        vp.capture(model, images)


@pytest.mark.parametrize("suffix", [".safetensors", ".zarr"])
def test_files_hold_what_memory_would(model, tmp_path, suffix):
    images = squares(5)
    path = tmp_path / f"out{suffix}"
    found = vp.capture(model, images, what="both", batch_size=2, out=path)
    expected = vp.capture(model, images, what="both", batch_size=2)
    assert found.path == path
    assert expected.path is None
    for group in ("features", "attention"):
        found_layers, expected_layers = getattr(found, group), getattr(expected, group)
        assert list(found_layers) == list(expected_layers)
        assert all(torch.equal(found_layers[i], expected_layers[i]) for i in expected_layers)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_safetensors_file_explains_itself(model, tmp_path):
    path = tmp_path / "out.safetensors"
    vp.capture(model, squares(3), [-1], what="both", out=path, dtype=torch.bfloat16)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {
            "features.3", "attention.2", "places.2.query_xy", "places.2.key_xy",
        }  # fmt: skip
        assert file.get_tensor("features.3").dtype == torch.bfloat16
        assert torch.equal(file.get_tensor("places.2.key_xy"), model.anatomy.sites[2].key_xy)
        about = json.loads(file.metadata()["capture"])
    assert about["images"] == ["0", "1", "2"]
    assert about["model"]["name"] == "tiny"
    assert about["features"]["3"]["grid"] == [4, 4]
    assert about["attention"]["2"]["heads"] == HEADS


def test_a_zarr_folder_explains_itself(model, tmp_path):
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    vp.capture(model, squares(5), [0], what="both", out=path, dtype=torch.float16, batch_size=2)
    group = zarr.open_group(str(path), mode="r")
    assert group["features/0"].shape == (5, TOKENS, WIDTH)
    assert group["features/0"].chunks == (2, TOKENS, WIDTH)
    assert group["attention/0"].dtype == np.float16
    assert group.attrs["capture"]["convention"] == "normed"


@pytest.mark.parametrize("suffix", [".safetensors", ".zarr"])
def test_files_are_replaced_only_when_forced_and_left_whole(model, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"out{suffix}"
    first = vp.capture(model, squares(2), [0], out=path).features[0]
    with pytest.raises(ResultError, match=f"out{suffix}' exists; give another out, or force=True"):
        vp.capture(model, squares(2), [0], out=path)

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(storing.os, "replace", broken)
        with pytest.raises(ResultError, match="No space left on device"):
            vp.capture(model, squares(3), [0], out=tmp_path / f"other{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = vp.capture(model, squares(3), [0], out=path, force=True)
    assert len(again.features[0]) == 3
    assert torch.equal(again.features[0][:2], first)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failure_leaves_nothing_behind(model, tmp_path):
    loader = torch.utils.data.DataLoader([torch.rand(3, 32, 32), torch.randn(3, 32, 32)])
    with pytest.raises(DataError, match="not normalised"):
        vp.capture(model, loader, out=tmp_path / "out.zarr", batch_size=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("out.h5", {}, ResultError, r"give out a name that ends in \.safetensors or \.zarr"),
        ("no/out.zarr", {}, ResultError, "there is no folder"),
        ("folder.zarr", {"force": True}, ResultError, "is no zarr to replace"),
        ("out.zarr", {"dtype": torch.bfloat16}, CaptureError, "cannot hold torch.bfloat16"),
    ],
)
def test_files_that_cannot_be_written(model, tmp_path, name, options, error, message):
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "precious").touch()
    with pytest.raises(error, match=message):
        vp.capture(model, squares(2), out=tmp_path / name, **options)
    assert (tmp_path / "folder.zarr" / "precious").exists()


def test_zarr_is_asked_for_by_name_where_it_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(CaptureError, match=r"pip install 'vitprobe\[zarr\]'"):
        vp.capture(model, squares(2), out=tmp_path / "out.zarr")


def test_more_than_memory_holds_is_refused_before_the_run(model, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(CaptureError, match=r"do not fit into .* out='NAME.zarr'"):
        vp.capture(model, squares(2))


def test_a_module_of_ones_own_stays_as_it_was():
    module = tiny().module.train()
    module.blocks[1].eval()
    captured = vp.capture(module, squares(2), [0])
    assert captured.model.name == "VisionTransformer"
    assert module.training
    assert not module.blocks[1].training
    assert not captured.features[0].requires_grad
    assert not captured.features[0].is_inference()
    with vp.capturing(module, [0]):
        assert module.training
        module(squares(2))
    assert not hooks_of(module)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_the_callers_choice(model, precision):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vp.capture(model, squares(2), [-1], precision=precision).features[DEPTH]
    with torch.no_grad():
        expected = by_hand(model, squares(2))["normed"][DEPTH]
    error = (found - expected).abs().max()
    assert found.dtype == torch.float32
    assert error < 1e-5 if precision == "fp32" else 1e-4 < error < 1


def test_own_forward_passes_join_one_after_the_other(model):
    images = squares(5)
    inputs = model.normalize(images)
    with torch.no_grad(), vp.capturing(model, what="both") as captured:
        first = model.module(inputs[:2])
        assert len(captured.features[0]) == 2
        second = model.module(inputs[2:])
    expected = vp.capture(model, images, what="both")
    for layer in expected.features:
        torch.testing.assert_close(captured.features[layer], expected.features[layer])
    for layer in expected.attention:
        torch.testing.assert_close(captured.attention[layer], expected.attention[layer])
    with torch.no_grad():
        assert torch.equal(first, model.module(inputs[:2]))
        assert torch.equal(second, model.module(inputs[2:]))
    assert captured.names == ()


def test_gradients_reach_the_input_through_what_was_captured(model):
    inputs = model.normalize(squares(2)).requires_grad_()
    with vp.capturing(model, [1], what="both") as captured:
        model.module(inputs)
        objective = captured.attention[1].square().sum() + captured.features[1].pow(3).sum()
    objective.backward()
    found, inputs.grad = inputs.grad, None
    with torch.enable_grad():
        images = inputs * 0.5 + 0.5  # by_hand normalises
        expected = by_hand(model, images)
        (expected["attention"][1].square().sum() + expected["normed"][1].pow(3).sum()).backward()
    torch.testing.assert_close(found, inputs.grad, atol=1e-4, rtol=1e-4)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_under_autocast_attention_is_that_of_the_rounded_queries_in_single_precision(fused):
    model = tiny()
    for block in model.module.blocks:
        block.attn.fused_attn = fused
    inputs = model.normalize(squares(2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.module(inputs)
        with vp.capturing(model, what="both") as captured:
            output = model.module(inputs)
    assert torch.equal(output, plain)
    assert captured.attention[0].dtype == torch.float32
    torch.testing.assert_close(
        captured.attention[2].sum(-1), torch.ones(2, HEADS, TOKENS), atol=1e-5, rtol=0
    )
    with torch.no_grad():
        exact = by_hand(model, squares(2))["attention"]
    assert (captured.attention[2] - exact[2]).abs().max() < 0.1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["whole", "block"])
def test_compiled_models_are_seen(model, backend, what):
    inputs = model.normalize(squares(2))
    expected = vp.capture(model, squares(2), what="both")
    module = model.module
    if what == "whole":
        module = torch.compile(module, backend=backend)
    else:
        module.blocks[1].compile(backend=backend)
    with torch.no_grad():
        module(inputs)  # compiled before anything watches
        with vp.capturing(model, what="both") as captured:
            module(inputs)
    wrapped = vp.wrap(module, name="compiled", input_size=(3, 32, 32), mean=0.5, std=0.5)
    again = vp.capture(wrapped, squares(2), what="both")
    for found in (captured, again):
        for layer in expected.features:
            torch.testing.assert_close(found.features[layer], expected.features[layer])
        for layer in expected.attention:
            torch.testing.assert_close(found.attention[layer], expected.attention[layer])
    torch.compiler.reset()


def test_an_encoder_inside_a_larger_module_is_seen(model):
    whole = torch.nn.Sequential(model.module, torch.nn.Linear(WIDTH, 2))
    with vp.capturing(model, [-1], what="both") as captured:
        whole(squares(2))
    assert captured.attention[DEPTH - 1].shape == (2, HEADS, TOKENS, TOKENS)


def test_nothing_to_give_yet(model):
    with (
        pytest.raises(CaptureError, match="has given nothing in layer 2 yet; run it first"),
        vp.capturing(model) as captured,
    ):
        captured.features[2]


def test_a_model_that_did_not_run(model):
    with (
        pytest.raises(CaptureError, match="gave no features in layers 0, 1, 2, 3: it did not run"),
        vp.capturing(model),
    ):
        pass
    assert not hooks_of(model.module)


def test_layers_that_ran_unequally_often(model):
    def run():
        with vp.capturing(model):
            model.module(squares(2))
            model.module.blocks[0](torch.rand(2, TOKENS, WIDTH))

    with pytest.raises(CaptureError, match="unequal numbers of images, from 2 to 4"):
        run()


def test_attention_in_another_thread_is_not_seen_and_said_so(model):
    runner = threading.Thread(target=model.module, args=(squares(2),))

    def run():
        with vp.capturing(model, what="both"):
            runner.start()
            runner.join()

    with pytest.raises(CaptureError, match=r"no attention in layers 0, 1, 2: .* another thread"):
        run()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of much
def test_a_traced_block_is_not_seen_and_said_so(model):
    model.module.blocks[1] = torch.jit.trace(
        model.module.blocks[1], torch.rand(2, TOKENS, WIDTH), check_trace=False
    )
    with pytest.raises(CaptureError, match=r"no attention in layers 1; .* TorchScript"):
        vp.capture(model, squares(2), what="both")


def test_an_error_of_the_callers_own_passes_through(model):
    with pytest.raises(ZeroDivisionError), vp.capturing(model, what="both"):
        1 / 0  # noqa: B018
    assert not hooks_of(model.module)
