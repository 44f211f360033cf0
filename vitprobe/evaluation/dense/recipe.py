"""Recipes of dense prediction: what is trained on top of a checkpoint, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vitprobe.errors import RecipeError
from vitprobe.evaluation.dense.backbone import BackboneConfig, encoder_config
from vitprobe.evaluation.dense.placing import JitterConfig
from vitprobe.models import Model
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods import MethodConfig
from vitprobe.training.optimizer import OptimizerConfig
from vitprobe.training.recipe import Written, read_recipe


@dataclass(frozen=True)
class DetectorConfig:
    """Mask R-CNN (He et al. 2017) on a simple feature pyramid; a recipe's table [detector].

    channels: of the pyramid and of the convolutions on it. convolutions: in the box and in the mask
    head. fully_connected: width of the box head's. anchor: side of the anchors of a map in its
    pixels. anchors_sampled, regions_sampled: of an image for the losses. proposals: regions kept of
    an image. masks: whether masks are learned.
    """

    channels: int = 256
    convolutions: int = 4
    fully_connected: int = 1024
    anchor: float = 8.0
    anchors_sampled: int = 256
    regions_sampled: int = 512
    proposals: int = 1000
    masks: bool = True

    def __post_init__(self) -> None:
        whole = ("channels", "convolutions", "fully_connected", "proposals")
        _at_least("detector", self, **dict.fromkeys(whole, 1), anchors_sampled=2, regions_sampled=4)
        if self.anchor <= 0:
            raise RecipeError(f"detector.anchor must be above 0, not {self.anchor}.")


@dataclass(frozen=True)
class SegmenterConfig:
    """What tells classes apart; a recipe's table [segmenter].

    head: "linear" is one linear map of the last block's tokens after the checkpoint's final norm
    (Strudel et al., "Segmenter", ICCV 2021); "multiscale" adds up the maps of a simple feature
    pyramid at its finest scale (after Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR
    2019) before that. channels: of the pyramid.
    """

    head: Literal["linear", "multiscale"] = "linear"
    channels: int = 256

    def __post_init__(self) -> None:
        _at_least("segmenter", self, channels=1)


def _at_least(table: str, config: Any, **least: int) -> None:
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise RecipeError(
                f"{table}.{name} must be at least {lowest}, not {getattr(config, name)}."
            )


_PLAIN, _STILL = BackboneConfig(), JitterConfig()


@dataclass(frozen=True)
class DenseRecipe(Written):
    """Everything that decides a run of dense prediction.

    epochs, batch_size, accumulate, precision, compile, recompute, threads, save_every,
        save_minutes, evaluate_every, seed: as in vitprobe.training.recipe.Recipe.
    image_size: side of the square that images are placed in, in pixels.
    backbone, jitter, optimizer: how the checkpoint, the images and the weights are treated.
    detector, segmenter: what is trained; one of the two.
    milestones: shares of the run after each of which the rate is a tenth of what it was; where
        none is named, it follows a cosine.
    model, sha256, encoder: of the checkpoint; known when it is.
    """

    epochs: int
    batch_size: int
    image_size: int
    optimizer: OptimizerConfig
    backbone: BackboneConfig = _PLAIN
    jitter: JitterConfig = _STILL
    detector: DetectorConfig | None = None
    segmenter: SegmenterConfig | None = None
    milestones: tuple[float, ...] = ()
    data: str = ""
    model: str = ""
    sha256: str = ""
    encoder: EncoderConfig | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "off", "blocks"] = "auto"
    recompute: bool = False
    threads: int = 0
    save_every: int = 1
    save_minutes: float = 15.0
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        least = {
            "epochs": 1, "batch_size": 1, "image_size": 1, "accumulate": 1, "save_every": 1,
            "evaluate_every": 0, "threads": 0,
        }  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise RecipeError(f"{name} must be at least {lowest}, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**63:
            raise RecipeError(f"seed must be at least 0 and below 2^63, not {self.seed}.")
        if self.save_minutes <= 0:
            raise RecipeError(f"save_minutes must be above 0, not {self.save_minutes}.")
        if (self.detector is None) == (self.segmenter is None):
            raise RecipeError("A recipe needs a table [detector] or a table [segmenter], not both.")
        if self.batch_size % self.accumulate:
            raise RecipeError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}."
            )
        if list(self.milestones) != sorted(set(self.milestones)) or not all(
            0 < share < 1 for share in self.milestones
        ):
            raise RecipeError(
                f"milestones must rise within (0, 1), not be {list(self.milestones)}."
            )

    @property
    def task(self) -> str:
        """ "detection" or "segmentation"."""
        return "segmentation" if self.detector is None else "detection"

    @property
    def method(self) -> MethodConfig:
        """Its name, for the loop."""
        return MethodConfig(self.task)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """None: what a run leaves is its scores."""
        return ()

    def for_model(self, model: Model, data: str) -> DenseRecipe:
        """The recipe for a model and a set; raises RecipeError for a model that does not fit."""
        encoder = encoder_config(model, self.image_size)
        if self.detector is not None and encoder.grid < 2:
            raise RecipeError(
                f"image_size {self.image_size} leaves one patch, too few to detect anything in."
            )
        return replace(
            self, model=model.spec, sha256=model.weights_sha256(), data=data, encoder=encoder
        )


def load_dense_recipe(
    recipe: str | Path | DenseRecipe, overrides: Mapping[str, Any] | None = None
) -> DenseRecipe:
    """The recipe of that bundled name or TOML file, changed by `overrides`.

    Raises RecipeError as vitprobe.training.recipe.load_recipe does.
    """
    bundle = resources.files("vitprobe.evaluation.dense") / "recipes"
    built: DenseRecipe = read_recipe(DenseRecipe, recipe, bundle, dict(overrides or {}))
    return built
