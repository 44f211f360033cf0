"""Protocols that train the model: fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitprobe.commands.arguments import override
from vitprobe.commands.evaluate import LearningCommand


@dataclass
class TrainingCommand(LearningCommand):
    """Base of the commands of protocols that fine-tune."""

    recipe: str = "finetune_improved"
    """Bundled recipe or TOML file that fine-tunes, such as fashion_finetune."""
    set: tuple[str, ...] = ()
    """Overrides of recipe keys, such as epochs=20 or optimizer.layer_decay=0.75."""
    updates: int | None = None
    """Train for so many updates, in whole epochs, rather than for the recipe's epochs; without, the
    epochs are raised where few labels would give fewer than 500."""
    batch_size: int = 128
    """Images in one forward pass over the test images; --set batch_size is that of training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the pass over the test images; --set precision is that of training."""
    keep_state: bool = False
    """Leave the state of training in OUT when all is done."""
    resume: bool = False
    """Go on with what was cut short in OUT."""

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        options["overrides"] = dict(override(text) for text in options.pop("set"))
        return options


@dataclass
class EvaluateFinetune(TrainingCommand):
    """Fine-tune the checkpoint on labelled images and score it on the test images; what was
    fine-tuned stays in OUT, as run:OUT."""

    protocol: ClassVar[str] = "finetune"

    kept: int | None = None
    """Keep so many pre-trained blocks, from the first, and draw the others anew; all by default."""


@dataclass
class EvaluateTransfer(TrainingCommand):
    """Fine-tune the checkpoint on another data set, as Wang et al. 2023 do: cifar10:PATH,
    cifar100:, flowers102:, pets:, aircraft:, cars: or inat18: (with the folder that torchvision
    keeps it in), or any labelled images."""

    protocol: ClassVar[str] = "transfer"

    recipe: str = "transfer"
    """Bundled recipe or TOML file that fine-tunes."""
    kept: int | None = None
    """Keep so many pre-trained blocks, from the first, and draw the others anew; all by default."""
    download: bool = False
    """Have torchvision download the data into PATH, where it can."""


@dataclass
class EvaluateLayers(TrainingCommand):
    """Which layers matter: fine-tune with the first k pre-trained blocks kept and the others drawn
    anew, for several k; OUT/kept_03 and so on hold the runs."""

    protocol: ClassVar[str] = "layers"

    keep: tuple[int, ...] = ()
    """Numbers of blocks to keep; none, all, and the quarters between unless given."""
