"""Encoders and images that come with vitprobe."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import vitprobe as vp
from vitprobe.bundled import FOLDER, SAMPLE, bundled_encoder, bundled_names
from vitprobe.errors import SourceError

STUDENTS = ("fashion_dino", "fashion_dmae", "fashion_mae", "fashion_mocov3", "fashion_supervised")


def test_every_encoder_has_its_line_in_the_card():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert bundled_names() == STUDENTS
    for name in STUDENTS:
        digest = hashlib.sha256(bundled_encoder(name).read_bytes()).hexdigest()
        assert f"`{digest}`" in card
    assert "MIT License" in card


@pytest.mark.parametrize("name", STUDENTS)
def test_an_encoder_loads_whole_and_says_how_it_was_trained(name):
    model = vp.load(f"bundled:{name}")
    assert model.name == name
    assert model.report.loaded_fraction == 1
    assert not model.report.missing
    assert model.input_size == (1, 28, 28)
    assert model.training["recipe"]["seed"] == 0
    assert model.training["schedule"]


def test_the_twin_of_an_encoder_is_drawn_anew():
    twin = vp.load("init:bundled:fashion_mae")
    own = vp.load("bundled:fashion_mae")
    name = "blocks.3.mlp.fc1.weight"
    assert not np.allclose(twin.module.get_parameter(name), own.module.get_parameter(name))


def test_the_sample_is_as_fashion_mnist_has_it():
    with np.load(SAMPLE) as sample:
        assert sample["images"].shape == (512, 28, 28)
        assert sample["images"].dtype == np.uint8
        # The first test image is an ankle boot, class 9; all classes are there.
        assert sample["labels"][0] == 9
        assert set(sample["labels"]) == set(range(10))


def test_another_name_is_refused_with_the_nearest():
    with pytest.raises(
        SourceError, match=r"does not come with vitprobe.*Did you mean 'fashion_mae'"
    ):
        vp.load("bundled:fashion_mea")
