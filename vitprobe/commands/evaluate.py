"""What every protocol of `vitprobe evaluate` asks for on the command line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from vitprobe.commands.arguments import check_output, named, spec_of


@dataclass
class EvaluateCommand:
    """Base of the protocols' commands: a subclass names its protocol and adds its options, which
    have the names that `vitprobe.evaluate` takes."""

    protocol: ClassVar[str]

    spec: tyro.conf.Positional[str]
    """The checkpoint, such as mae.pth,heads=12 or MAE=run:DIR; as for vitprobe inspect."""
    data: str
    """Labelled images: digits, fashion-mnist, a folder, zip or tar with one folder a class (in
    train/ and val/ or test/), tar shards, idx files, CIFAR archives, hf:NAME, .npz, or
    train=…,test=… of these."""
    out: Path
    """Folder for scores.json."""
    batch_size: int = 128
    """Images in one forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 turns TF32 and autocast off."""
    workers: int = 2
    """Threads or processes that decode images ahead."""
    force: bool = False
    """Replace an earlier evaluation in OUT."""

    def run(self) -> str:
        name, spec = named(self.spec)
        spec_of(spec)
        # Of the processes that torchrun started, the first makes the folder that the others see.
        if not getattr(self, "resume", False) and os.environ.get("RANK", "0") == "0":
            check_output(self.out, self.force)

        from vitprobe.evaluation.evaluate import evaluate
        from vitprobe.scores import FILE

        scores = evaluate(self.protocol, spec, self.data, self.out, name=name, **self._options())
        print(scores.to_text(), file=sys.stderr)
        return str(self.out / FILE)

    def _options(self) -> dict[str, Any]:
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: own[key] for key in own if key not in ("spec", "data", "out")}


@dataclass
class LearningCommand(EvaluateCommand):
    """Base of the commands of protocols that learn from labelled training images."""

    labels: float = 1.0
    """Share of the labelled training images to use, such as 0.01; at least one a class."""
    seed: int = 0
    """Of all draws, such as that of the labelled images."""
