"""What comes with vitprobe: encoders trained on Fashion-MNIST, and some of its test images.

`README.md` beside this file is their model card. They are made by `analyses.fashion.bundle` from
the runs of the study.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vitprobe.errors import SourceError, suggest

FOLDER: Final = Path(__file__).parent
SAMPLE: Final = FOLDER / "fashion_mnist_test_512.npz"
"""`images` (512, 28, 28) uint8 and `labels` (512,)."""


def bundled_names() -> tuple[str, ...]:
    """Names that `bundled:NAME` takes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def bundled_encoder(name: str) -> Path:
    """Path of the checkpoint of that name.

    Raises SourceError where none has it.
    """
    known = bundled_names()
    if name not in known:
        raise SourceError(
            f"'bundled:{name}' does not come with vitprobe; there are {', '.join(known)}."
            f"{suggest(name, known)}"
        )
    return FOLDER / f"{name}.safetensors"
