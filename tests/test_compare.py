from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from models_for_tests import squares, tiny

import vitprobe as vp
from vitprobe import measures
from vitprobe.compare import subset_bytes
from vitprobe.errors import CaptureError, DataError, MeasureError, ResultError, VitprobeError
from vitprobe.measures import MEASURES, attention_distance, attention_entropy, cka
from vitprobe.measures.attention import grid_positions, uniform_distance
from vitprobe.measures.gram import centered_gram
from vitprobe.measures.registry import PER_BLOCK, SUBSET
from vitprobe.settings import Settings, known

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
    from vitprobe.data.blocks import View, resize

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


def test_the_first_direction_share_has_its_interval(pair, result):
    low, high = result.interval("first_direction_share", "a")
    share = result.first_direction_share("a")
    assert ((low < share) & (share < high)).all()
    measure = measures.FirstDirectionShare(4)
    order = np.random.default_rng(0).permutation(40)
    features, _ = layers_of(pair[0], squares()[order])
    measure.update_grams(torch.stack([centered_gram(x) for x in features]))
    error = result.standard_error("first_direction_share", "a")
    np.testing.assert_allclose(error, measure.standard_error(), rtol=1e-4)
    assert share.attrs["degrees"] == 40 / 7
    sums = result.tree["tokens"]["first_direction_squares"].values[:4]
    np.testing.assert_allclose(sums, measure.squares, rtol=1e-4)


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
    assert any(
        re.search("a, layer 0: .* under tokens 'cls', so its CKA is undefined", note)
        for note in found.notes
    )


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
        vp.measures.CKA,
        "update_grams",
        lambda self, grams, first: (seen.append(grams.dtype), update(self, grams, first)),
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


@pytest.fixture(scope="module")
def everything(pair):
    return vp.compare(pair, squares(), ["all"], tokens="mean", max_images=30, **QUIET)


def test_all_is_everything_there_is(everything):
    assert sorted(everything.measures) == sorted(known())
    assert set(known()) | {"first_direction_share"} == set(MEASURES)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_reached_by_compare(everything, name):
    depth, heads = {"a": 3, "b": 2}, {"a": 3, "b": 2}
    group = MEASURES[name].group
    assert everything.group_of(name) == group
    if group == "similarity":
        value = everything.similarity(name, "a", "b")
        assert value.shape == everything.floor(name, "a", "b").shape == (4, 3)
        low, high = everything.interval(name, "a", "b")
        streams = MEASURES[name].streams
        assert value.attrs["images"] == (30 if streams == "subset" else 40)
        inside = (low <= value) & (value <= high)
        assert (inside | value.isnull()).all()
    elif group == "attention":
        for model in ("a", "b"):
            value = everything.attention(name, model)
            assert value.shape == (depth[model], 1 if name in PER_BLOCK else heads[model])
            assert everything.per_image(name, model).shape == (40, *value.shape)
            assert not value.isnull().any()
    else:
        for model in ("a", "b"):
            value = everything.tokens(name, model)
            assert value.shape == (depth[model] + 1,)
            assert not value.isnull().any()
    assert value.attrs["long_name"] == MEASURES[name].title
    assert len(everything.to_dataframe(name)) > 0


def test_subset_measures_are_the_functions_of_the_first_images(pair, everything):
    order = np.random.default_rng(0).permutation(40)[:30]
    x, _ = layers_of(pair[0], squares()[order])
    for name in SUBSET:
        function, _, correlation = name.partition("rsa_")
        function = getattr(measures, function or "rsa")
        options = {"correlation": correlation} if correlation else {}
        found = everything.similarity(name, "a", "a")
        for i, j in ((1, 2), (3, 1)):
            if math.isnan(found[i, j]):
                with pytest.raises(MeasureError):
                    function(x[i].mean(1), x[j].mean(1), **options)
            else:
                expected = function(x[i].mean(1), x[j].mean(1), **options)
                assert float(found[i, j]) == pytest.approx(expected, abs=1e-3), name


def test_token_measures_are_the_functions_of_each_image(pair, everything):
    order = np.random.default_rng(0).permutation(40)
    x, _ = layers_of(pair[0], squares()[order])
    for name in ("token_cosine", "effective_rank", "feature_variance", "norm_outliers"):
        expected = torch.stack([getattr(measures, name)(layer) for layer in x], dim=1)
        found = everything.per_image(name, "a")
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    for layer, value in enumerate(everything.tokens("rankme", "a")):
        assert float(value) == pytest.approx(measures.rankme(x[layer].mean(1)), rel=1e-4)
    frequency, curves = measures.fourier_log_amplitude(x[1], grid=(4, 4))
    found = everything.fourier_curves("a")
    np.testing.assert_allclose(found["value"][1, : len(frequency)], curves.mean(0), atol=1e-4)
    np.testing.assert_allclose(found["frequency"][1, : len(frequency)], frequency)
    np.testing.assert_allclose(
        everything.per_image("fourier_amplitude", "a")[:, 1], curves[:, -1], atol=1e-4
    )


def test_the_forward_batch_changes_no_measure(pair, everything):
    options = {"tokens": "mean", "max_images": 30, "batch_size": 7}
    other = vp.compare(pair, squares(), ["all"], **options, **QUIET)
    for name in everything.measures:
        table, again = (found.to_dataframe(name)[name] for found in (everything, other))
        np.testing.assert_allclose(again, table, rtol=2e-3, atol=1e-4, err_msg=name)


def test_cka_of_pooled_tokens_is_exact_over_all_blocks(pair):
    options = {"block": 32, "tokens": "mean", **QUIET}
    found = vp.compare(pair, squares(100), ["cka"], **options)
    order = np.random.default_rng(0).permutation(100)
    x, _ = layers_of(pair[0], squares(100)[order])
    expected = cka(x[1].mean(1), x[3].mean(1))
    assert found.provenance["blocks"] == 3
    assert found.provenance["cka_value"] == "exact"
    assert float(found.cka("a", "a")[1, 3]) == pytest.approx(expected, abs=1e-5)
    biased = vp.compare(pair, squares(100), ["cka"], estimator="biased", **options)
    expected = cka(x[1].mean(1), x[3].mean(1), estimator="biased")
    assert float(biased.cka("a", "a")[1, 3]) == pytest.approx(expected, abs=1e-5)
    assert not any("depends on the block size" in note for note in biased.notes)
    patches = vp.compare(pair, squares(32), ["cka"], **(options | {"tokens": "patches"}))
    assert patches.provenance["cka_value"] == "blocked"


def test_large_sums_fall_back_to_blocks_and_say_so(pair, monkeypatch):
    monkeypatch.setattr("vitprobe.gather.EXACT_BYTES", 1000)
    found = vp.compare(pair, squares(), ["cka"], tokens="mean", **QUIET)
    assert found.provenance["cka_value"] == "blocked"
    assert any("CKA is the estimate over blocks" in note for note in found.notes)


def test_the_floor_lies_below_what_is_alike(pair):
    found = vp.compare(pair, squares(100), ["cka", "rsa_spearman"], **QUIET)
    for name in ("cka", "rsa_spearman"):
        value, floor = found.similarity(name, "a", "a"), found.floor(name, "a", "a")
        assert (floor.values.diagonal() < 0.5).all()
        assert (value.values.diagonal() > floor.values.diagonal()).all()


def test_what_is_not_asked_for_is_not_done(pair, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("not asked for")

    for what in ("CKA", "CKARBF", "Subset", "RankMe", "FirstDirectionShare"):
        monkeypatch.setattr(f"vitprobe.gather.{what}", never)
    monkeypatch.setattr("vitprobe.model_block.select_tokens", never)
    monkeypatch.setattr("vitprobe.model_block.centered_gram", never)
    found = vp.compare(pair[:1], squares(8), ["token_cosine"], **QUIET)
    assert found.measures == ("token_cosine",)
    found = vp.compare(pair[:1], squares(8), ["sink_mass"], **QUIET)
    assert set(found.tree.children) == {"attention", "samples"}


def test_undefined_subset_measures_say_why(pair):
    found = vp.compare(pair[:1], squares(20), ["linear_regression"], **QUIET)
    assert found.similarity("linear_regression", "a", "a").isnull().all()
    (note,) = (note for note in found.notes if "Linear regression" in note or "R²" in note)
    assert re.search("a: .* is undefined in pairs of layers 0 to 3; layer 0 .* images", note)


def test_a_grid_without_a_diagonal_is_noted():
    module = type(tiny().module)(
        img_size=(16, 32), patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0
    )
    wide = vp.wrap(module, name="wide", input_size=(3, 16, 32), mean=0.5, std=0.5)
    found = vp.compare([tiny(), wide], squares(8), ["fourier_amplitude"], **QUIET)
    assert found.tokens("fourier_amplitude", "wide").isnull().all()
    assert not found.tokens("fourier_amplitude", "tiny").isnull().any()
    assert found.fourier_curves("wide")["value"].isnull().all()
    assert any(
        re.search(r"wide: .* undefined for layers 0 to 1 in 8 of 8 images: .*2 x 4", note)
        for note in found.notes
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(3):
        torch.save({"model": tiny(seed=i).module.state_dict()}, folder / f"{i}.pth")
    return [
        vp.load(folder / f"{i}.pth", name=f"S {i}", heads=3, mean=0.5, std=0.5) for i in range(3)
    ]


def test_untrained_twins(files, pair):
    start = vp.load(f"init:{files[0].spec}", name="Start", heads=3, mean=0.5, std=0.5)
    models = [*files[:2], pair[1], start]
    found = vp.compare(models, squares(), ["cka"], random_reference=True, **QUIET)
    assert found.models == ("S 0", "S 1", "b", "Start", "Untrained twin")
    # Models that differ in weights alone share a twin, and an untrained one needs none.
    assert found.references == {"S 0": "Untrained twin", "S 1": "Untrained twin"}
    assert found.describe("Untrained twin")["spec"].startswith("init:")
    assert any("b has no untrained twin: 'b' is a wrapped module" in note for note in found.notes)
    assert found.cka("S 0", "Untrained twin").shape == (4, 4)
    twin, start = (found.cka(name, "S 0").values for name in ("Untrained twin", "Start"))
    np.testing.assert_allclose(twin, start, atol=1e-12)  # both drawn from seed 0
    assert not vp.compare(models, squares(8), ["cka"], **QUIET).references


def test_a_twin_has_the_architecture_and_input_of_its_model(tmp_path):
    from vitprobe.models.untrained import same_architecture, untrained

    torch.save({"model": tiny(size=48).module.state_dict()}, tmp_path / "a,b.pth")
    options = {"heads": 2, "eps": 1e-5, "size": 32, "mean": 0.1, "std": 0.2}
    model = vp.load(tmp_path / "a,b.pth", **options)
    twin = untrained(model, "twin")
    assert (twin.name, twin.input_size, twin.mean) == ("twin", (3, 32, 32), (0.1,) * 3)
    assert same_architecture(model, twin)
    assert not same_architecture(model, vp.load(tmp_path / "a,b.pth", **options | {"heads": 3}))
    weights = [m.module.blocks[0].attn.qkv.weight for m in (model, twin)]
    assert not torch.equal(*weights)
    timm = vp.load("init:vit_tiny_patch16_224", seed=3, size=64)
    assert untrained(timm, "twin").input_size == (3, 64, 64)


def test_a_twin_of_a_model_with_the_longest_name_has_a_name(files):
    model = vp.load(files[0].spec, name="m" * 100, heads=3)
    found = vp.compare([model], squares(8), ["cka"], random_reference=True, **QUIET)
    assert found.references == {"m" * 100: "m" * 88 + " (untrained)"}


def test_a_twin_of_a_file_that_is_gone_is_noted(tmp_path):
    torch.save({"model": tiny().module.state_dict()}, tmp_path / "a.pth")
    model = vp.load(tmp_path / "a.pth", name="A", heads=3)
    (tmp_path / "a.pth").unlink()
    found = vp.compare([model], squares(8), ["cka"], random_reference=True, **QUIET)
    assert f"A has no untrained twin: its file '{tmp_path / 'a.pth'}' is gone." in found.notes


def test_registers_alone_are_no_class_token():
    model = vp.load("init:vit_medium_patch16_reg4_gap_256", size=32, name="R")
    with pytest.raises(MeasureError, match="model 'R' has no class token"):
        vp.compare([model], squares(8), ["cka"], tokens="cls", **QUIET)
    found = vp.compare([model], squares(8), ["class_attention_entropy"], **QUIET)
    assert found.attention("class_attention_entropy", "R").isnull().all()
    assert any("Class-token attention entropy is undefined" in note for note in found.notes)


def test_one_run_is_no_two_seeds(files):
    again = vp.load(files[0].spec, name="Again", heads=3)
    groups = {"G": ["S 0", "Again"]}
    with pytest.raises(VitprobeError, match="'S 0' and 'Again' of group 'G' have the same weights"):
        vp.compare([*files, again], squares(8), ["sink_mass"], groups=groups, **QUIET)


def test_a_group_and_a_model_do_not_share_a_name(files):
    with pytest.raises(VitprobeError, match="a model and a group are both named 'S 0'"):
        vp.compare(files, squares(8), ["sink_mass"], groups={"S 0": ["S 1"]}, **QUIET)


def test_groups_of_seeds(files):
    groups = {"G": ["S 0", "S 1"], "H": ["S 2"]}
    found = vp.compare(files, squares(), ["sink_mass", "cka"], groups=groups, **QUIET)
    assert found.groups == {"G": ("S 0", "S 1"), "H": ("S 2",)}
    assert any("Group H has one seed" in note for note in found.notes)
    means = found.group_means(["sink_mass"]).set_index("group")
    seeds = [float(found.sink_mass(name).mean()) for name in groups["G"]]
    assert means.loc["G", "mean"] == pytest.approx(np.mean(seeds))
    assert list(found.group_similarity("cka").pairs) == [1, 2, 0]


def test_memory_of_the_subset(pair):
    # Layers of a: 4 of 16 patches x 24; of b: 3 of 36 patches x 36.
    numbers = 4 * 16 * 24 + 3 * 36 * 36
    assert subset_bytes(pair, Settings(["cka"]), 1000) == 0
    assert subset_bytes(pair, Settings(["all"]), 1000) == 4 * 256 * numbers
    assert subset_bytes(pair, Settings(["svcca"], tokens="mean"), 9) == 4 * 9 * (4 * 24 + 3 * 36)


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
        ("blocks.1.attn.qkv.weight", ["cka"], "'bad', block 0 of .*: layer 2 gives NaN"),
        ("norm.weight", None, "'bad', block 0 of .*: layer 3 gives NaN or infinite features"),
        ("norm.weight", ["procrustes"], "'bad', block 0 of .*: layer 3 gives NaN"),
        ("norm.weight", ["cka", "procrustes"], "'bad', block 0 of .*: layer 3 gives NaN"),
        ("norm.weight", ["effective_rank"], "'bad', block 0 of .*: layer 3 gives NaN"),
        ("norm.weight", ["rankme"], "'bad', block 0 of .*: layer 3 gives NaN"),
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
        ({"max_images": 3}, MeasureError, "max_images of 3 is too few"),
        ({"groups": {"G": []}}, VitprobeError, "group 'G' has no models"),
        ({"groups": {"G": ["tini"]}}, VitprobeError, "'tini', .* Did you mean 'tiny'"),
        ({"groups": {"G": ["tiny"], "H": ["tiny"]}}, VitprobeError, "is in group 'G' already"),
        ({"groups": {"G": ["tiny", "tiny"]}}, VitprobeError, "a seed counts once"),
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


def convolutional(name="conv", seed=5):
    """Three blocks, on 8 x 8 and 4 x 4 places."""

    class Block(torch.nn.Module):
        def __init__(self, inside, outside):
            super().__init__()
            stride = 1 if inside == outside else 2
            self.conv = torch.nn.Conv2d(inside, outside, 3, stride, padding=1)
            self.act = torch.nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 12, 4, 4)
            self.blocks = torch.nn.Sequential(Block(12, 12), Block(12, 24), Block(24, 24))

        def forward(self, x):
            return self.blocks(self.stem(x)).mean((-2, -1))

    torch.manual_seed(seed)
    return vp.wrap(
        Network().eval(),
        name=name,
        input_size=(3, 32, 32),
        mean=0.5,
        std=0.5,
        blocks=[f"blocks.{i}" for i in range(3)],
    )


def windowed(name="swin", seed=3):
    """A Swin Transformer of two stages: windows of 4 x 4, shifted in the second block."""
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(seed)
    module = SwinTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=12,
        depths=(2, 1),
        num_heads=(2, 4),
        window_size=4,
        num_classes=0,
    )
    return vp.wrap(module.eval(), name=name, input_size=(3, 32, 32), mean=0.5, std=0.5)


@pytest.fixture(scope="module")
def families(pair):
    return vp.compare([pair[0], windowed(), convolutional()], squares(12), **QUIET)


def test_models_of_any_family_compare_as_far_as_they_can(families):
    assert families.cka("swin", "conv").notnull().all()
    layers = [families.cka(name, name).sizes["layer_a"] for name in families.models]
    assert layers == [4, 4, 4]
    assert families.attention_distance("a").shape == (3, 3)
    assert families.attention_distance("swin").shape == (3, 4)
    assert any(note.startswith("conv: no attention: ") for note in families.notes)
    assert families.attention_layers("conv") == []
    kinds = [layer["kind"] for layer in families.attention_layers("swin")]
    assert kinds == ["windows", "windows", "global"]
    assert [layer["block"] for layer in families.attention_layers("swin")] == [0, 1, 2]
    with pytest.raises(ResultError, match="'conv' has no attention: "):
        families.attention_distance("conv")
    assert families.measured("attention_distance") == ("a", "swin")
    assert families.grid("swin") == (8, 8)
    assert families.describe("swin")["layouts"][-1]["grid"] == [4, 4]


def test_distance_in_windows_is_relative_to_the_window(families):
    in_window = grid_positions((4, 4), 4)
    level = uniform_distance(in_window)
    levels = families.uniform("attention_distance", "swin").values
    # Attention is masked to fewer patches in shifted windows; stage two is one window of 8 px.
    assert levels[0] == pytest.approx(level)
    assert levels[1] < level
    assert levels[2] == pytest.approx(2 * level)
    near_uniform = families.attention_distance("swin", relative=True)
    np.testing.assert_allclose(near_uniform.mean("head"), 1, atol=0.05)
    assert families.needs_relative("attention_distance", ("a", "swin"))
    assert not families.needs_relative("attention_distance", ("swin",))


def test_no_attention_at_all_is_refused_only_where_it_was_asked_for():
    conv = convolutional()
    alone = vp.compare([conv], squares(8), **QUIET)
    assert alone.measures == ("cka",)
    assert any("conv: no attention" in note for note in alone.notes)
    with pytest.raises(MeasureError, match="no model here can give 'attention_entropy': conv has"):
        vp.compare([conv], squares(8), ["cka", "attention_entropy"], **QUIET)
    assert "attention_entropy" not in vp.compare([conv], squares(8), ["all"], **QUIET).measures


def test_class_tokens_are_refused_of_models_without_them():
    with pytest.raises(MeasureError, match="model 'swin' has no class token; use tokens"):
        vp.compare([windowed()], squares(8), ["cka"], tokens="cls", **QUIET)


def test_families_survive_saving_and_have_tables(families, tmp_path):
    opened = vp.open_result(families.save(tmp_path / "run.nc"))
    assert opened.attention_layers("swin") == families.attention_layers("swin")
    table = opened.to_dataframe("attention_distance")
    assert set(table["model"]) == {"a", "swin"}
    # Two heads in the first stage, four in the second.
    assert (table["model"] == "swin").sum() == 2 + 2 + 4
    assert set(opened.differences(["attention_entropy"])["model_b"]) == {"swin"}
