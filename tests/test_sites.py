from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from anatomies_for_tests import (
    anatomy,
    channel_site,
    class_site,
    global_site,
    model,
    pooled_site,
    window_site,
)

from vitprobe.measures.registry import ATTENTION
from vitprobe.sites import described, in_words, kind_of, refusal, refusals, remarks, uniform_level

DISTANCE, ENTROPY = ATTENTION["attention_distance"], ATTENTION["attention_entropy"]
IN_WINDOW = (0 + 8 + 8 + 8 * math.sqrt(2)) / 4


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        (global_site(1), "global"),
        (window_site(), "windows"),
        (pooled_site(), "pooled keys"),
        (class_site(), "class token"),
        (channel_site(), "channels"),
        (replace(global_site(), query_xy=None), "unknown places"),
    ],
)
def test_kinds(site, kind):
    assert kind_of(site) == kind


def test_uniform_levels_are_the_means_over_windows():
    assert uniform_level(DISTANCE, window_site()) == pytest.approx(IN_WINDOW)
    assert uniform_level(ENTROPY, window_site()) == pytest.approx(math.log(4))
    assert uniform_level(ENTROPY, pooled_site()) == pytest.approx(math.log(4))
    assert uniform_level(ENTROPY, channel_site(width=6)) == pytest.approx(math.log(6))
    # Of 17 keys the class token's own is no patch.
    assert uniform_level(ENTROPY, class_site()) == pytest.approx(math.log(16))
    of_class = uniform_level(ATTENTION["class_attention_entropy"], class_site())
    assert of_class == pytest.approx(math.log(16))
    raw = uniform_level(ATTENTION["attention_distance_raw"], global_site(4))
    assert raw == pytest.approx(0.8 * uniform_level(DISTANCE, global_site(4)))


def test_uniform_levels_respect_what_is_masked():
    allowed = torch.ones(4, 4, 4, dtype=torch.bool)
    allowed[0] = torch.eye(4, dtype=torch.bool)  # in the first window each patch sees itself alone
    allowed[1] = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    site = window_site(allowed=allowed)
    assert uniform_level(DISTANCE, site) == pytest.approx((0 + 4 + 2 * IN_WINDOW) / 4)
    entropy = (0 + math.log(2) + 2 * math.log(4)) / 4
    assert uniform_level(ENTROPY, site) == pytest.approx(entropy)


def test_measures_without_a_level_have_nan():
    assert math.isnan(uniform_level(ATTENTION["sink_mass"], global_site(1)))
    assert math.isnan(uniform_level(ATTENTION["class_attention_entropy"], window_site()))


def test_what_a_layer_cannot_give_is_refused_with_its_reason():
    mixed = anatomy(global_site(), window_site(), class_site(), channel_site())

    def reasons(name):
        return [refusal(ATTENTION[name], mixed, layer) for layer in range(4)]

    only = "its only query is the class token"
    channels = "it attends over channels, which lie nowhere in the image"
    assert reasons("attention_entropy") == ["", "", "", ""]
    assert reasons("attention_distance") == ["", "", only, channels]
    assert reasons("sink_mass") == ["", "", only, channels]
    assert reasons("attention_nmi")[:2] == ["", "it is not one map of all patches (windows)"]
    assert all(reasons("rollout_distance"))
    lost = anatomy(replace(global_site(), key_xy=None))
    assert "is not known" in refusal(DISTANCE, lost, 0)
    named = anatomy(replace(global_site(), no_distance="its keys are mixed"))
    assert refusal(DISTANCE, named, 0) == "its keys are mixed"


def test_a_plain_model_refuses_nothing():
    plain = anatomy(global_site(1), global_site(1), prefix=1, class_token=True)
    assert refusals(plain, list(ATTENTION)) == []
    assert remarks(plain) == []


def test_refusals_in_words_name_measures_layers_and_reasons():
    mixed = anatomy(global_site(), channel_site(), channel_site())
    assert in_words(refusals(mixed, ["attention_distance", "attention_entropy", "sink_mass"])) == (
        "no attention distance and sink mass in attention layers 1 to 2: it attends over channels, "
        "which lie nowhere in the image"
    )
    conv = anatomy(no_attention="it is convolutional: no softmax over tokens was seen")
    assert in_words(refusals(conv, ["attention_entropy"])) == (
        "no attention: it is convolutional: no softmax over tokens was seen"
    )
    assert refusals(conv, []) == []


def test_remarks_label_channels_class_tokens_and_notes():
    noted = replace(global_site(), note="Heads are mixed after the softmax.")
    assert remarks(anatomy(noted, noted, channel_site(), class_site())) == [
        "attention layers 0 to 1: heads are mixed after the softmax.",
        "attention layer 2: rows are over channels, so their entropy is no entropy over patches.",
        "attention layer 3: the only query is the class token, so entropy is of its one row.",
    ]


def test_described_layers_know_their_block_and_kind():
    outside = replace(global_site(), path="head.pool")
    inside = replace(window_site(), path="blocks.1.attn")
    found = described(model("m", outside, inside).anatomy)
    assert [(layer["block"], layer["kind"]) for layer in found] == [
        (None, "global"),
        (1, "windows"),
    ]
    assert found[1]["windows"] == 4
