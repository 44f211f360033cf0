"""iBOT (Zhou et al. 2022), https://github.com/bytedance/ibot.

As DINO, whose code it grew from; the student has a `masked_embed`, and its arguments speak of
masked image modelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitprobe.models.formats.base import Branch, Settings
from vitprobe.models.formats.dino import DINO


def _recognise(branches: Sequence[Branch], settings: Settings) -> bool:
    return DINO.recognise(branches, settings) and (
        "use_masked_im_modeling" in settings
        or any("masked_embed" in branch.keys for branch in branches)
    )


IBOT = replace(
    DINO,
    name="ibot",
    recognise=_recognise,
    heads={"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16},
)
