"""Protocols of dense prediction, and the made shapes that they can be tried on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vitprobe.commands.arguments import check_output, named, override, spec_of
from vitprobe.commands.evaluate import EvaluateCommand


@dataclass
class DenseCommand(EvaluateCommand):
    """Base of the commands of detection and segmentation."""

    data: str
    """Annotated images, or shapes (shapes:SEED) to have some made."""
    recipe: str = ""
    """Bundled recipe or TOML file."""
    set: tuple[str, ...] = ()
    """Overrides of recipe keys, such as epochs=3 or optimizer.lr=1e-3."""
    batch_size: int = 16
    """Images in one forward pass over the test images; --set batch_size is that of training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the pass over the test images; --set precision is that of training."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these."""
    resume: bool = False
    """Go on with what was cut short in OUT."""
    dry_run: bool = False
    """Print the resolved recipe, parameters, FLOPs and steps, and stop."""

    def run(self) -> str:
        if self.dry_run:
            name, spec = named(self.spec)
            spec_of(spec)

            from vitprobe.evaluation.dense.plan import plan

            options = self._options()
            return plan(
                self.protocol, spec, self.data, options["recipe"], options["overrides"], name=name
            ).to_text()
        # The parser's own import is light, and this one would not be.
        from vitprobe.training.loop import Terminated

        try:
            return super().run()
        except Terminated as stop:
            print(f"vitprobe: {stop}", file=sys.stderr)
            raise

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        del options["dry_run"]
        options["overrides"] = dict(override(text) for text in options.pop("set"))
        return options


@dataclass
class EvaluateDetection(DenseCommand):
    """Box and mask AP of a Mask R-CNN trained on the checkpoint, as ViTDet has it; data are in
    COCO's format: a folder, or train=FILE.json,test=FILE.json."""

    protocol: ClassVar[str] = "detection"

    recipe: str = "coco_vitdet_tiny"
    """Bundled recipe (coco_vitdet_tiny, shapes_vitdet) or TOML file."""


@dataclass
class EvaluateSegmentation(DenseCommand):
    """mIoU of a head for classes of pixels on the checkpoint; data are a folder in VOC's or ADE's
    layout."""

    protocol: ClassVar[str] = "segmentation"

    recipe: str = "segmentation_linear"
    """Bundled recipe (segmentation_linear, segmentation_multiscale, shapes_segmentation) or TOML
    file."""


@dataclass
class MakeShapes:
    """Make pictures of shapes with masks: OUT/coco for detection, OUT/voc for segmentation."""

    out: Path
    """Folder to make."""
    seed: int = 0
    """Of all pictures."""
    train: int = 800
    """Pictures to train on."""
    val: int = 200
    """Pictures to test on."""
    size: int = 64
    """Side of a picture in pixels."""
    cue: Literal["hue", "texture", "none"] = "hue"
    """What tells a class from the others besides its outline."""

    def run(self) -> str:
        check_output(self.out, False)

        from vitprobe.data.shapes import Shapes, write_shapes

        made = Shapes(seed=self.seed, train=self.train, val=self.val, size=self.size, cue=self.cue)
        return str(write_shapes(self.out, made))
