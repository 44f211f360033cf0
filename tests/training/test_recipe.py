"""Recipes: bundled ones load, keys are strict, overrides and inheritance work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vitprobe.errors import RecipeError
from vitprobe.training.methods.mae import MAEConfig
from vitprobe.training.recipe import (
    Recipe,
    bundled_recipes,
    filled,
    load_recipe,
    method_of,
)


def test_bundled_recipes_load_and_leave_out_what_is_only_inherited() -> None:
    assert {"digits_mae", "digits_supervised"} <= set(bundled_recipes())
    assert not any(name.startswith("_") for name in bundled_recipes())
    for name in bundled_recipes():
        if method_of(name) == "finetune":
            with pytest.raises(RecipeError, match=r"fine-tunes a checkpoint, which method.init"):
                load_recipe(name)
        else:
            assert isinstance(load_recipe(name), Recipe)


def test_what_an_earlier_version_saved_is_filled_with_defaults() -> None:
    saved = load_recipe("digits_mae").to_dict()
    del saved["optimizer"]["momentum"], saved["optimizer"]["name"]
    assert filled(saved) == load_recipe("digits_mae").to_dict()


def test_the_two_digit_recipes_train_the_same_encoder_on_the_same_data() -> None:
    mae, supervised = load_recipe("digits_mae"), load_recipe("digits_supervised")
    assert mae.encoder == supervised.encoder
    assert mae.encoder.depth >= 6
    assert (mae.data, mae.augment) == (supervised.data, supervised.augment)


@pytest.mark.parametrize("name", ["digits_mae", "digits_supervised"])
def test_the_resolved_file_loads_as_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, overrides={"optimizer.lr": 1e-5, "seed": 7})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert load_recipe(recipe) == recipe


def test_overrides_reach_every_table_and_data_has_its_own_argument() -> None:
    recipe = load_recipe(
        "digits_mae",
        data="elsewhere",
        overrides={"epochs": 3, "optimizer.lr": 1, "method.mask_ratio": 0.5},
    )
    assert (recipe.epochs, recipe.optimizer.lr, recipe.data) == (3, 1.0, "elsewhere")
    assert isinstance(recipe.method, MAEConfig)
    assert recipe.method.mask_ratio == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, r"unknown key 'epoch'. Did you mean 'epochs'\?"),
        ({"optimizer.lrr": 3}, r"unknown key 'optimizer.lrr'. Did you mean 'lr'\?"),
        ({"optimiser.lr": 3}, r"unknown key 'optimiser'. Did you mean 'optimizer'\?"),
        ({"method.label_smoothing": 0.1}, "unknown key 'method.label_smoothing'"),
        ({"epochs.x": 3}, "'epochs' is not a table"),
        ({"epochs": 2.5}, "epochs must be a whole number, not 2.5"),
        ({"epochs": True}, "epochs must be a whole number, not True"),
        ({"epochs": -1}, "epochs must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"optimizer.lr": "fast"}, "optimizer.lr must be a finite number, not 'fast'"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr must be a finite number"),
        ({"optimizer.betas": [0.9]}, "optimizer.betas must be a list of 2 values"),
        ({"encoder.mean": 0.5}, "encoder.mean must be a list of values"),
        ({"encoder.positions": "sin"}, "encoder.positions must be 'learned' or 'sincos'"),
        ({"method.normalize_targets": 1}, "method.normalize_targets must be true or false"),
        (
            {"method.name": "mea"},
            r"supervised, finetune, not 'mea'. Did you mean 'mae'\?",
        ),
        ({"encoder": 5}, "encoder must be a table, not 5"),
    ],
)
def test_what_cannot_be_followed_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits_mae", overrides=overrides)


def test_an_unknown_recipe_lists_the_known_and_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"digits_supervised.* Did you mean 'digits_mae'\?"):
        load_recipe("digit_mae")


def test_a_file_inherits_relative_to_itself_and_its_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'inherits = "digits_mae"\nepochs = 5\n[optimizer]\nlr = 0.5'
    )
    (tmp_path / "child.toml").write_text('inherits = "base.toml"\nepochs = 6\n')
    child, plain = load_recipe(tmp_path / "child.toml"), load_recipe("digits_mae")
    assert (child.epochs, child.optimizer.lr) == (6, 0.5)
    assert child.optimizer.weight_decay == plain.optimizer.weight_decay


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", "not valid TOML"),
        ('inherits = "self.toml"', "inherits itself"),
        ("inherits = 3", "inherits must be a string"),
        ('inherits = "nowhere.toml"', "No recipe file"),
        ("epochs = 3", "the key 'method' is missing"),
        ('inherits = "digits_mae"\noptimizer = 3', "optimizer must be a table"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "self.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "self.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"No recipe file .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_another_method_takes_nothing_of_the_one_before() -> None:
    recipe = load_recipe("digits_mae", overrides={"epochs": 1, "method.name": "supervised"})
    assert recipe.method.name == "supervised"
    with pytest.raises(RecipeError, match=r"unknown key 'method\.mask_ratio'"):
        load_recipe("digits_mae", overrides={"method.name": "supervised", "method.mask_ratio": 0.5})
    kept = load_recipe("digits_mae", overrides={"method.name": "mae"})
    assert kept == load_recipe("digits_mae")
