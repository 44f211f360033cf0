"""Recipes of dense prediction: what is bundled and what is refused."""

from __future__ import annotations

from importlib import resources

import pytest

from vitprobe.errors import RecipeError
from vitprobe.evaluation.dense.recipe import DenseRecipe, load_dense_recipe
from vitprobe.training.recipe import bundled_recipes

BUNDLE = resources.files("vitprobe.evaluation.dense") / "recipes"


@pytest.mark.parametrize("name", bundled_recipes(BUNDLE))
def test_bundled_recipes_say_where_they_are_from_and_read_back(name, tmp_path):
    recipe = load_dense_recipe(name)
    head = (BUNDLE / f"{name}.toml").read_text().split("\n\n")[0]
    assert all(f"# {word}:" in head for word in ("Source", "Command", "Expected"))
    path = tmp_path / "again.toml"
    path.write_text(recipe.to_toml())
    assert load_dense_recipe(path) == recipe
    assert load_dense_recipe(recipe) == recipe


def test_the_papers_numbers():
    recipe = load_dense_recipe("coco_vitdet_tiny")
    assert (recipe.image_size, recipe.epochs, recipe.batch_size) == (640, 100, 64)
    assert recipe.task == "detection"
    assert recipe.optimizer.lr * recipe.batch_size / 256 == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"milestones": [0.9, 0.5]}, "milestones must rise"),
        ({"segmenter.head": "linear"}, "not both"),
        ({"accumulate": 3}, "must be a multiple of accumulate"),
        ({"detector.anchors": 4}, "unknown key 'detector.anchors'. Did you mean"),
        ({"detector.regions_sampled": 1}, "detector.regions_sampled must be at least 4"),
        ({"detector.anchor": 0.0}, "detector.anchor must be above 0"),
        ({"save_minutes": 0.0}, "save_minutes"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_recipes_that_cannot_be_followed(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_dense_recipe("shapes_vitdet", overrides)


def test_unknown_names_are_answered_with_those_of_this_kind():
    with pytest.raises(RecipeError, match=r"coco_vitdet_tiny.*Did you mean 'shapes_vitdet'"):
        load_dense_recipe("shapes_vit")
    assert isinstance(load_dense_recipe("segmentation_multiscale"), DenseRecipe)
