"""What a recipe would take, against counts by hand."""

from __future__ import annotations

import pytest

from vitprobe.errors import RecipeError
from vitprobe.training import load_recipe, plan

SMALL = {
    "encoder.image_size": 8, "encoder.width": 32, "encoder.depth": 3, "encoder.heads": 2,
    "batch_size": 64,
}  # fmt: skip


def test_flops_and_parameters_of_a_classifier_by_hand() -> None:
    found = plan("digits_supervised", overrides=SMALL)
    width, depth, patches, pixels, classes = 32, 3, 16, 4, 10
    tokens = patches + 1
    block = 12 * width**2 + 13 * width
    trained = depth * block + (pixels + 1) * width + width + 2 * width + (width + 1) * classes
    assert found.trained_parameters == trained
    assert found.encoder_parameters == trained + tokens * width  # sine-cosines are not trained
    forward = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * width * classes
    embedding = 2 * patches * pixels * width
    # Backward costs twice the forward, but for the images, which want no gradient.
    assert found.flops == pytest.approx(3 * forward + 2 * embedding, rel=1e-6)


def test_momentum_copies_and_teachers_count_as_frozen() -> None:
    moco = plan("digits_mocov3", overrides=SMALL)
    assert moco.frozen_parameters > moco.encoder_parameters
    assert plan("digits_mae", overrides=SMALL).frozen_parameters < 2000  # positions
    alone = plan("digits_dmae", overrides=SMALL)
    assert "is not a finished run" in alone.notes[0]


def test_activations_grow_with_depth_and_memory_with_the_batch() -> None:
    shallow, deep = (plan("digits_mae", overrides=SMALL | {"encoder.depth": d}) for d in (2, 4))
    assert 1.2 * shallow.activations < deep.activations < 2.5 * shallow.activations
    larger = plan("digits_mae", overrides=SMALL | {"batch_size": 128})
    more = larger.memory - plan("digits_mae", overrides=SMALL).memory
    assert more == pytest.approx(64 * larger.activations, rel=0.01)


def test_missing_data_leave_the_steps_unknown() -> None:
    found = plan("mae_tiny", overrides={"encoder.depth": 2})
    assert found.images is None
    assert "# steps: unknown: no labelled images 'imagenet'" in found.to_text()


def test_the_text_is_a_recipe_again(tmp_path) -> None:
    text = plan("digits_mocov3", overrides=SMALL).to_text()
    (tmp_path / "again.toml").write_text(text)
    assert load_recipe(tmp_path / "again.toml") == load_recipe("digits_mocov3", overrides=SMALL)


def test_labels_are_missed_before_anything_is_built(tmp_path) -> None:
    with pytest.raises(RecipeError, match="supervised needs labels"):
        plan("digits_supervised", data=_flat(tmp_path))


def test_what_a_run_would_refuse_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch_size 5000 is more than the 1437 training images"):
        plan("digits_mae", overrides={"batch_size": 5000})


def test_a_warm_up_that_outlasts_the_run_is_told() -> None:
    overrides = SMALL | {"epochs": 3, "optimizer.warmup_epochs": 3}
    text = plan("digits_mae", overrides=overrides).to_text()
    assert "# note 1: the warm-up of 3 epochs is as long as the run of 3 or longer" in text
    for shorter in ({"optimizer.warmup_epochs": 2}, {"epochs": 0, "snapshots": []}):
        assert "warm-up" not in plan("digits_mae", overrides=overrides | shorter).to_text()


def _flat(folder) -> str:
    from PIL import Image

    for i in range(3):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    return str(folder)
