"""Protocols that train the model: fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitprobe.commands.arguments import override
from vitprobe.commands.evaluate import LearningCommand


@dataclass
class EvaluateFinetune(LearningCommand):
    """Fine-tune the checkpoint on labelled images and score it on the test images; what was
    fine-tuned stays in OUT, as run:OUT."""

    protocol: ClassVar[str] = "finetune"

    recipe: str = "finetune_improved"
    """Bundled recipe or TOML file that fine-tunes, such as fashion_finetune."""
    set: tuple[str, ...] = ()
    """Overrides of recipe keys, such as epochs=20 or optimizer.layer_decay=0.75."""
    kept: int | None = None
    """Keep so many pre-trained blocks, from the first, and draw the others anew; all by default."""
    updates: int | None = None
    """Train for so many updates at least, raising the epochs; 500, unless --set gives epochs."""
    batch_size: int = 128
    """Images in one forward pass over the test images; --set batch_size is that of training."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the pass over the test images; --set precision is that of training."""
    keep_state: bool = False
    """Leave the state of training in OUT when all is done."""
    resume: bool = False
    """Go on with a run in OUT that was cut short."""

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        options["overrides"] = dict(override(text) for text in options.pop("set"))
        return options
