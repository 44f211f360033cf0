from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from anatomies_for_tests import anatomy, channel_site, class_site, global_site, window_site
from safetensors.torch import load, save

from vitprobe.errors import ResultError
from vitprobe.models.anatomy import Anatomy, Site
from vitprobe.models.saved_anatomy import read_anatomy, save_anatomy

ALLOWED = torch.ones(4, 4, 4, dtype=torch.bool).tril()


def stored(given):
    """As JSON and safetensors give them back."""
    saved, tensors = save_anatomy(given)
    return json.loads(json.dumps(saved)), load(save(tensors))


def check_same(ours, theirs):
    for part in fields(Anatomy):
        if part.name != "sites":
            assert getattr(ours, part.name) == getattr(theirs, part.name), part.name
    for one, other in zip(ours.sites, theirs.sites, strict=True):
        for part in fields(Site):
            a, b = getattr(one, part.name), getattr(other, part.name)
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
            else:
                assert a == b, part.name


@pytest.mark.parametrize(
    "given",
    [
        anatomy(global_site(prefix=1), global_site(prefix=1), class_token=True, prefix=1),
        anatomy(window_site(allowed=ALLOWED), channel_site(), class_site()),
        anatomy(no_attention="it is convolutional"),
    ],
)
def test_there_and_back(given):
    check_same(read_anatomy(*stored(given)), given)


def test_places_of_another_shape_are_refused():
    saved, tensors = stored(anatomy(window_site()))
    for name, tensor in (
        ("0.query_xy", tensors["0.query_xy"][:, 1:]),
        ("0.key_xy", tensors["0.key_xy"].float()),
        ("0.query_order", torch.zeros(3, dtype=torch.int64)),
    ):
        with pytest.raises(ResultError, match=f"has '{name[2:]}' of another shape or kind"):
            read_anatomy(saved, {**tensors, name: tensor})
    with pytest.raises(ResultError, match="'key_xy' that is not finite"):
        read_anatomy(saved, {**tensors, "0.key_xy": tensors["0.key_xy"] * torch.nan})


def test_maps_that_fill_the_memory_are_refused():
    saved, tensors = stored(anatomy(channel_site()))
    saved["sites"][0] |= {"queries": 1 << 20, "keys": 1 << 20}
    with pytest.raises(ResultError, match=r"attention layer 0 .* map of 1048576 x 1048576"):
        read_anatomy(saved, tensors)


def test_orders_beyond_the_tokens_are_refused():
    saved, tensors = stored(anatomy(window_site()))
    with pytest.raises(ResultError, match="'key_order' that orders no tokens"):
        read_anatomy(saved, {**tensors, "0.key_order": torch.tensor([0, 1, 2, 9])})
