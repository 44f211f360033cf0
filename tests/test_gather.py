from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from anatomies_for_tests import (
    channel_site,
    class_site,
    global_site,
    model,
    pooled_site,
    uniform_maps,
    window_site,
)
from models_for_tests import squares, tiny

from vitprobe.errors import MeasureError
from vitprobe.forward import Forward
from vitprobe.gather import Attention, Gathered, Tokens, kept_numbers
from vitprobe.measures.attention import AttentionChunk
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.models.anatomy import Layout
from vitprobe.settings import Settings

IMAGES = ["a.png", "b.png", "c.png"]
IN_WINDOW = (0 + 8 + 8 + 8 * math.sqrt(2)) / 4


def feed(block, layer, site):
    """Uniform attention of a site, window by window, as capture hands it on."""
    for window in range(site.windows):
        places = [None if xy is None else xy[window] for xy in (site.query_xy, site.key_xy)]
        chunk = AttentionChunk(
            logits=uniform_maps(site).log(),
            query_prefix=site.query_prefix,
            key_prefix=site.key_prefix,
            query_xy=places[0],
            key_xy=places[1],
            layer=layer,
            first_query=window * site.queries,
            queries=site.windows * site.queries,
            whole=site.whole,
        )
        block.add_attention(chunk)


def gathered(models, measures, asked=()):
    attention = Attention(models, measures, asked)
    settings = Settings([*measures], layers="residual")
    parts = {}
    for each in models:
        wanted = Wanted.of(each, settings)
        asked_for = {name: on for name, on in wanted.attention.items() if name in measures}
        parts[each.name] = ModelBlock(replace(wanted, attention=asked_for), 0, 3)
        for layer, site in enumerate(each.anatomy.sites):
            feed(parts[each.name], layer, site)
    attention.add(parts)
    notes: list[str] = []
    dataset = attention.dataset(IMAGES, notes)
    attention.note(notes)
    return dataset, notes


def test_windows_and_pooled_keys_have_the_values_of_their_geometry():
    dataset, notes = gathered(
        [model("m", window_site(), pooled_site())], ["attention_distance", "attention_entropy"]
    )
    assert dataset["attention_distance"].shape == (3, 4)
    np.testing.assert_allclose(dataset["attention_distance"][:, :2], IN_WINDOW, rtol=1e-6)
    np.testing.assert_allclose(dataset["attention_entropy"], math.log(4), rtol=1e-6)
    relative = dataset["attention_distance"] / dataset["attention_distance_uniform"]
    np.testing.assert_allclose(relative, 1, rtol=1e-6)
    assert not notes


def test_layers_that_cannot_give_a_measure_are_nan_and_noted_once():
    mixed = model("mixed", global_site(), channel_site(), class_site())
    dataset, notes = gathered([mixed], ["attention_distance", "attention_entropy", "sink_mass"])
    distance = dataset["attention_distance"].values
    assert np.isfinite(distance[:, :2]).all()
    assert np.isnan(distance[:, 2:]).all()
    assert np.isfinite(dataset["attention_entropy"].values).all()
    assert np.isnan(dataset["attention_distance_uniform"].values[2:]).all()
    assert (dataset["attention_distance_undefined_rows"] == 0).all()
    refused = [note for note in notes if note.startswith("mixed: no ")]
    assert len(refused) == 1
    assert "attention layer 1: it attends over channels" in refused[0]
    assert "attention layer 2: its only query is the class token" in refused[0]
    assert any("attention layer 1: rows are over channels" in note for note in notes)


def test_the_class_tokens_own_attention_counts_as_that_of_the_class_token():
    dataset, _ = gathered([model("c", class_site())], ["class_attention_entropy"])
    np.testing.assert_allclose(dataset["class_attention_entropy"], math.log(16), rtol=1e-6)
    np.testing.assert_allclose(dataset["class_attention_entropy_uniform"], math.log(16))


def test_models_without_attention_have_no_units_and_are_noted():
    conv = model("conv", no_attention="it is convolutional")
    dataset, notes = gathered([conv, model("vit", global_site())], ["attention_entropy"])
    assert set(dataset["model"].values) == {"vit"}
    assert notes == ["conv: no attention: it is convolutional."]


def test_heads_may_differ_between_layers():
    dataset, _ = gathered(
        [model("m", global_site(heads=1), global_site(heads=3))], ["attention_entropy"]
    )
    assert dataset["layer"].values.tolist() == [0, 1, 1, 1]
    assert dataset["head"].values.tolist() == [0, 0, 1, 2]


def test_rollout_follows_whole_maps_of_every_block_only():
    plain = model("plain", global_site(), replace(global_site(), path="blocks.1"))
    mixed = model("mixed", global_site(), window_site())
    dataset, notes = gathered([plain, mixed], ["rollout_distance"])
    values = dataset["rollout_distance"].values
    own = dataset["block_model"].values == "plain"
    assert np.isfinite(values[:, own]).all()
    assert np.isnan(values[:, ~own]).all()
    assert any(note.startswith("mixed: no rollout distance") for note in notes)


def test_what_no_model_can_give_is_refused_where_it_was_asked_for():
    models = [
        model("conv", no_attention="it is convolutional"),
        model("xcit", channel_site(), class_site()),
    ]
    with pytest.raises(MeasureError) as error:
        Attention(models, ["attention_distance", "sink_mass"], ["attention_distance"])
    text = str(error.value)
    assert "no model here can give 'attention_distance'" in text
    assert "conv has no attention: it is convolutional" in text
    assert "xcit has no attention distance" in text
    assert "its only query" in text
    assert Attention(models, ["attention_distance", "attention_entropy"], []).measures == [
        "attention_entropy"
    ]


def layout(grid, width=4, prefix=0):
    patches = 6 if grid is None else grid[0] * grid[1]
    return Layout("tokens", width, prefix, patches, grid, None if grid is None else (8.0, 8.0))


def test_layers_may_differ_in_tokens_and_width():
    layouts = {"m": (layout((6, 6)), layout((4, 4), 8, prefix=1), layout(None))}
    names = ["token_cosine", "fourier_amplitude", "rankme"]
    subject = model("m")
    subject.anatomy = replace(subject.anatomy, residual=layouts["m"])
    tokens = Tokens(layouts, names)
    block = ModelBlock(Wanted.of(subject, Settings(names, layers="residual")), 0, 12)
    for layer, each in enumerate(layouts["m"]):
        x = torch.randn(12, each.prefix_tokens + each.patches, each.width)
        block.add_features(layer, 0, x)
    block.finish()
    tokens.add({"m": block})
    notes: list[str] = []
    dataset = tokens.dataset([f"{i}" for i in range(12)], None, notes)
    assert np.isfinite(dataset["token_cosine"].values).all()
    amplitude = dataset["fourier_amplitude"].values
    assert np.isfinite(amplitude[:, :2]).all()
    assert np.isnan(amplitude[:, 2]).all()
    assert notes == [
        "m: Relative log-amplitude is undefined for layer 2 in 12 of 12 images: where its patches "
        "lie in the image is not known."
    ]
    sizes = [kept_numbers(each, "all") for each in layouts["m"]]
    assert sizes == [36 * 4, 17 * 8, 6 * 4]
    assert [kept_numbers(each, "mean") for each in layouts["m"]] == [4, 8, 4]


CPU = torch.device("cpu")
MIXED = [
    *("cka", "cka_rbf", "svcca", "rankme", "token_cosine", "fourier_amplitude"),
    *("attention_distance", "rollout_distance"),
]


def parts_of(models, settings, blocks):
    """What the models give for blocks of images, by their first image."""
    forwards = [Forward(each, settings, CPU) for each in models]
    return {
        first: {each.model.name: each.block(first, squares(64)[first:last]) for each in forwards}
        for first, last in blocks
    }


def numbers_of(gathered):
    """Every dataset of what was gathered."""
    names = [f"{i}" for i in range(64)]
    return {
        "similarity": gathered.similarities.dataset(64, []),
        "tokens": gathered.tokens.dataset(names, gathered.similarities.first_direction, []),
        "attention": gathered.attention.dataset(names, []),
        **gathered.samples.groups(names),
    }


@pytest.mark.parametrize("tokens", ["patches", "mean"])
@pytest.mark.parametrize("split", [[[0], [4, 20, 36]], [[4, 36], [0, 20]], [[36], [20], [4], [0]]])
def test_parts_of_a_run_merge_to_the_whole(tokens, split):
    models = [tiny("a", depth=2), tiny("b", depth=2, width=36, seed=1)]
    # The first samples lie in two blocks.
    settings = Settings(MIXED, tokens=tokens, max_images=30, block=16)
    blocks = [(0, 4), (4, 20), (20, 36), (36, 64)]
    whole = Gathered(models, settings, CPU)
    for first, found in parts_of(models, settings, blocks).items():
        whole.add(first, found)
    parts = [Gathered(models, settings, CPU) for _ in split]
    given = parts_of(models, settings, blocks)
    for part, firsts in zip(parts, split, strict=True):
        part.similarities.rbf.variances = whole.similarities.rbf.variances
        for first in firsts:
            part.add(first, given[first])
    merged = pickle.loads(pickle.dumps(parts[0]))
    for part in parts[1:]:
        merged.merge(part)
    expected, found = numbers_of(whole), numbers_of(merged)
    assert expected.keys() == found.keys()
    for group, dataset in expected.items():
        xr.testing.assert_allclose(found[group], dataset, rtol=1e-10, atol=1e-12)
        if group != "similarity" and group != "tokens":
            assert found[group].identical(dataset)


def test_an_image_in_two_parts_is_refused():
    models = [tiny("a", depth=1)]
    settings = Settings(["attention_entropy", "svcca"], block=8)
    one, other = (Gathered(models, settings, CPU) for _ in range(2))
    one.add(0, parts_of(models, settings, [(0, 8)])[0])
    other.add(4, parts_of(models, settings, [(4, 12)])[4])
    with pytest.raises(MeasureError, match="image 4"):
        one.merge(other)


def test_what_is_gathered_holds_no_model():
    models = [tiny("a", depth=2)]
    size = len(pickle.dumps(Gathered(models, Settings(["attention_entropy"]), CPU)))
    assert size < 20_000 < 4 * sum(p.numel() for p in models[0].module.parameters())


def test_halved_passes_merge_to_the_widest_range():
    models = [tiny("a", depth=1)]
    settings = Settings(["attention_entropy"], block=8)
    parts = parts_of(models, settings, [(0, 8), (8, 16)])
    parts[0]["a"].halved, parts[8]["a"].halved = (64, 32), (32, 8)
    one, other = (Gathered(models, settings, CPU) for _ in range(2))
    one.add(0, parts[0])
    other.add(8, parts[8])
    one.merge(other)
    assert one.halved == {"a": (64, 8)}
