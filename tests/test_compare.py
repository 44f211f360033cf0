from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe.errors import CaptureError, DataError, MeasureError, VitprobeError
from vitprobe.measures import attention_distance, attention_entropy, cka

QUIET = {"progress": False, "device": "cpu"}


def layers_of(model, images):
    """Features and attention by other means: the blocks called by hand, softmax unfused."""
    module, x = model.module, model.normalize(images)
    features, maps = [], []
    with torch.inference_mode():
        tokens = module._pos_embed(module.patch_embed(x))
        for block in module.blocks:
            normed = block.norm1(tokens)
            features.append(normed)
            attn = block.attn
            n, t, _ = normed.shape
            q, k, _ = attn.qkv(normed).reshape(n, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            maps.append((q.double() @ k.double().mT * attn.scale).softmax(-1))
            tokens = block(tokens)
        features.append(module.norm(tokens))
    return [f[:, model.anatomy.prefix_tokens :].double() for f in features], maps


@pytest.fixture(scope="module")
def pair():
    return tiny("a"), tiny("b", size=48, patch=8, width=36, depth=2, heads=2, seed=1)


@pytest.fixture(scope="module")
def result(pair):
    return vp.compare(pair, squares(), progress=False, device="cpu")


def test_equals_the_definitions_computed_by_hand(pair, result):
    order = np.random.default_rng(0).permutation(40)
    images = squares()[order]
    views = [images, torch.stack([vp_resize(image, 48) for image in images])]
    features, maps = zip(*(layers_of(m, x) for m, x in zip(pair, views, strict=True)), strict=True)
    value = result.cka("a", "b")
    for i, x in enumerate(features[0]):
        for j, y in enumerate(features[1]):
            assert float(value[i, j]) == pytest.approx(cka(x, y), abs=1e-5)
    for model, attention in zip(pair, maps, strict=True):
        grid = model.anatomy.grid
        for layer, rows in enumerate(attention):
            distance = attention_distance(rows, grid=grid, patch_size=8, prefix_tokens=1).mean(0)
            entropy = attention_entropy(rows, prefix_tokens=1).mean(0)
            sink = rows[:, :, 1:, 0].mean((0, 2))
            for name, expected in (
                ("attention_distance", distance),
                ("attention_entropy", entropy),
                ("sink_mass", sink),
            ):
                found = result.attention(name, model.name)[layer]
                np.testing.assert_allclose(found, expected, rtol=1e-4)


def vp_resize(image, size):
    from vitprobe.data.images import View, resize

    return resize(image, View(3, size, size))


def test_shapes_units_and_relatives(result):
    assert result.models == ("a", "b")
    assert result.measures == ("cka", "attention_distance", "attention_entropy", "sink_mass")
    assert result.cka("a", "b").shape == (4, 3)
    assert np.array_equal(result.cka("b", "a").values, result.cka("a", "b").values.T)
    assert (np.diag(result.cka("a", "a")) == 1).all()
    assert result.attention_distance("b").shape == (2, 2)
    assert result.attention_distance("b").attrs["units"] == "px"
    assert (result.grid("b"), result.patch_size("b")) == ((6, 6), (8, 8))
    relative = result.attention_entropy("b", relative=True)
    np.testing.assert_allclose(relative, result.attention_entropy("b") / math.log(36))
    assert relative.attrs["units"] == "relative to uniform"
    low, high = result.interval("cka", "a", "b")
    assert ((low < result.cka("a", "b")) & (result.cka("a", "b") < high)).all()
    assert result.first_direction_share("a").shape == (4,)
    assert result.per_image("attention_distance", "a").shape == (40, 3, 3)


def test_samples_are_the_maps_of_the_first_images(pair, result):
    order = np.random.default_rng(0).permutation(40)[:8]
    _, maps = layers_of(pair[0], squares()[order])
    samples = result.samples("a")
    assert samples["attention"].dtype == np.float16
    assert samples["attention"].shape == (8, 9, 17, 17)
    expected = torch.cat(maps, dim=1).numpy()
    np.testing.assert_allclose(samples["attention"], expected, atol=1e-3)
    assert result.thumbnails().shape == (8, 96, 96, 3)


def test_large_sample_maps_keep_fewer_rows(monkeypatch, pair):
    monkeypatch.setattr("vitprobe.samples.SAMPLE_BYTES", 2 * 8 * 9 * 17 * 6)
    small = vp.compare(pair[:1], squares(8), ["attention_entropy"], **QUIET)
    samples = small.samples("a")
    assert samples["query"].values.tolist() == [0, 6, 8, 14, 16]
    whole = vp.compare(pair[:1], squares(8), ["attention_entropy"], **QUIET)
    assert samples["attention"].equals(whole.samples("a")["attention"])


@pytest.mark.parametrize("batch_size", [7, 40, 1000])
def test_the_forward_batch_changes_nothing(pair, result, batch_size):
    other = vp.compare(pair, squares(), batch_size=batch_size, **QUIET)
    np.testing.assert_allclose(other.cka("a", "b"), result.cka("a", "b"), atol=1e-5)
    for name in ("a", "b"):
        np.testing.assert_allclose(
            other.attention_distance(name), result.attention_distance(name), rtol=1e-5
        )


def test_twice_the_same_and_alone_as_in_company(pair, result):
    again = vp.compare(pair, squares(), **QUIET)
    for group in ("similarity", "attention", "tokens"):
        assert again.tree[group].equals(result.tree[group])
    alone = vp.compare(pair[1:], squares(), **QUIET)
    np.testing.assert_allclose(alone.cka("b", "b"), result.cka("b", "b"), atol=1e-12)


def test_every_image_goes_through_every_model_once(pair):
    seen = []
    handle = pair[0].module.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    vp.compare(pair, squares(100), block=32, **QUIET)
    handle.remove()
    assert sum(seen) == 100
    assert seen == [32, 32, 36]


def test_token_policies_and_conventions(pair):
    x = squares()
    patches, mean = (vp.compare(pair, x, ["cka"], tokens=t, **QUIET) for t in ("patches", "mean"))
    assert not np.allclose(patches.cka("a", "b"), mean.cka("a", "b"))
    assert patches.measures == ("cka",)
    residual = vp.compare(pair, x, ["cka"], layers="residual", **QUIET)
    assert residual.provenance["layers"] == "residual"
    assert not np.allclose(residual.cka("a", "b"), patches.cka("a", "b"))


def test_a_constant_layer_is_noted(pair):
    found = vp.compare(pair, squares(), ["cka"], tokens="cls", layers="residual", **QUIET)
    assert found.cka("a", "b")[0].isnull().all()
    assert not found.cka("a", "b")[1:, 1:].isnull().any()
    assert any("a, layer 0: constant over the images under tokens 'cls'" in n for n in found.notes)


def test_biased_over_blocks_is_noted(pair):
    notes = vp.compare(pair, squares(64), ["cka"], estimator="biased", block=32, **QUIET).notes
    assert any("Biased CKA was summed over 2 blocks" in note for note in notes)


def test_bf16_is_recorded_and_close(pair, result):
    low = vp.compare(pair, squares(), precision="bf16", **QUIET)
    assert low.provenance["precision"] == "bf16"
    np.testing.assert_allclose(low.cka("a", "b"), result.cka("a", "b"), atol=0.1)
    assert not np.array_equal(low.cka("a", "b"), result.cka("a", "b"))


def test_the_gram_stays_in_single_precision_under_bf16(pair, monkeypatch):
    seen = []
    update = vp.measures.CKA.update_grams
    monkeypatch.setattr(
        vp.measures.CKA, "update_grams", lambda self, g: (seen.append(g.dtype), update(self, g))
    )
    for batch_size in (None, 16):
        vp.compare(pair, squares(), ["cka"], precision="bf16", batch_size=batch_size, **QUIET)
    assert seen == [torch.float32] * 2


def test_the_global_random_state_and_the_module_are_left_alone(pair):
    model = tiny("trained", proj_drop_rate=0.5)
    model.module.train()
    model.module.blocks[1].eval()
    before = torch.get_rng_state()
    first, second = (vp.compare([model], squares(8), ["cka"], **QUIET) for _ in range(2))
    vp.compare([model], torch.utils.data.DataLoader(squares(8), batch_size=4), ["cka"], **QUIET)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tree["similarity"].equals(second.tree["similarity"])  # no dropout
    assert model.module.training
    assert not model.module.blocks[1].training
    assert model.module.blocks[2].attn.proj_drop.training


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_torch_precision_settings_are_restored(pair, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        vp.compare(pair[:1], squares(8), ["cka"], **QUIET)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_order_and_limit_recorded_are_those_used(pair):
    x = squares(20)
    pictures = vp.images(x, limit=12, seed=3)
    found = vp.compare(pair[:1], pictures, ["cka"], **QUIET).provenance
    assert (found["seed"], found["images"]["limit"], found["images"]["count"]) == (3, 12, 12)
    for option in ({"limit": 5}, {"seed": 1}):
        with pytest.raises(DataError, match="have their limit and seed already"):
            vp.compare(pair[:1], pictures, ["cka"], **option, **QUIET)
    loader = torch.utils.data.DataLoader(x, batch_size=4)
    found = vp.compare(pair[:1], loader, ["cka"], **QUIET)
    assert (found.provenance["seed"], found.provenance["images"]["order"]) == (None, "as given")
    assert any("in the order their source gives" in note for note in found.notes)


def test_a_half_precision_module_is_run_as_it_is_and_noted():
    model = tiny("half")
    model.module.bfloat16()
    found = vp.compare([model], squares(8), **QUIET)
    assert any("half: its weights are torch.bfloat16" in note for note in found.notes)
    assert next(model.module.parameters()).dtype == torch.bfloat16


def test_repeated_measures_count_once(pair):
    found = vp.compare(pair[:1], squares(8), ["cka", "sink_mass", "cka"], **QUIET)
    assert found.measures == ("cka", "sink_mass")


def test_a_model_without_a_final_norm_is_noted():
    model = tiny("bare", final_norm=False)
    found = vp.compare([model], squares(8), ["cka"], **QUIET)
    assert any("bare: no final norm, so its layer 3" in note for note in found.notes)


def poisoned(where):
    model = tiny("bad")
    with torch.no_grad():
        dict(model.module.named_parameters())[where][0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("where", "measures", "message"),
    [
        (
            "blocks.1.attn.qkv.weight",
            None,
            "'bad', block 0 of .*: attention is NaN in layer 1",
        ),
        ("blocks.1.attn.qkv.weight", ["cka"], "'bad' gives NaN or infinite features in layer 2"),
        ("norm.weight", None, "'bad' gives NaN or infinite features in layer 3, block 0"),
    ],
)
def test_nan_weights_name_model_layer_and_block(where, measures, message):
    options = {} if measures is None else {"measures": measures}
    with pytest.raises(MeasureError, match=message):
        vp.compare([tiny(), poisoned(where)], squares(), **options, **QUIET)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"models": []}, VitprobeError, "no models to compare"),
        ({"models": [tiny("x"), tiny("x")]}, VitprobeError, "two models are named 'x'"),
        ({"images": squares(3)}, DataError, "too few images .*, 3: unbiased CKA needs at least 4"),
        ({"measures": ["ckaa"]}, MeasureError, "unknown measure 'ckaa'. Did you mean 'cka'"),
        ({"measures": []}, MeasureError, "no measure asked for"),
        ({"measures": "cka"}, MeasureError, r"give \['cka'\]"),
        ({"models": tiny("x")}, VitprobeError, "models are a list"),
        ({"models": ["mae.pth"]}, VitprobeError, "cannot compare str: make a model of it"),
        ({"seed": -1}, DataError, "a seed of -1"),
        ({"block": 3}, MeasureError, "a block of 3 images is too small"),
        ({"batch_size": 0}, DataError, "a batch size of 0"),
        ({"layers": "outputs"}, CaptureError, "unknown layers 'outputs'"),
        ({"layers": "x", "measures": ["sink_mass"]}, CaptureError, "unknown layers 'x'"),
        ({"tokens": "first"}, MeasureError, "unknown tokens 'first'"),
        ({"estimator": "mle"}, MeasureError, "unknown CKA estimator 'mle'"),
        ({"precision": "fp16"}, VitprobeError, "unknown precision 'fp16'"),
        ({"device": "warp"}, VitprobeError, "device 'warp' is not to be had"),
        ({"device": "meta"}, VitprobeError, "device 'meta' is not to be had"),
        ({"workers": 0}, DataError, "a number of workers of 0"),
        ({"models": [tiny("x" * 101)]}, VitprobeError, "1 to 100 printable characters"),
        ({"models": [tiny("a\0b")]}, VitprobeError, "a model cannot be named"),
        (
            {"models": [tiny("x", class_token=False, global_pool="avg")], "tokens": "cls"},
            MeasureError,
            "model 'x' has no class token",
        ),
    ],
)
def test_refusals(change, kind, message):
    arguments = {"models": [tiny()], "images": squares(), **QUIET, **change}
    with pytest.raises(kind, match=message):
        vp.compare(**arguments)
