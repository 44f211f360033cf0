"""Maps at several scales from the last map of a plain backbone (ViTDet, Li et al. 2022, fig. 2)."""

from __future__ import annotations

from typing import Final

from timm.layers import LayerNorm2d
from torch import Tensor, nn

LEVELS: Final = 4
"""Maps of a pyramid, at 1/4, 1/2, 1 and 2 times the backbone's stride."""


class SimpleFeaturePyramid(nn.Module):
    """(b, width, g, g) → `LEVELS` maps (b, channels, s, s) with s = 4 g, 2 g, g and g // 2.

    Two deconvolutions, one, nothing and a max-pooling, each then through a 1x1 and a 3x3
    convolution with layer norms: a map of each scale from the last one alone, without lateral or
    top-down paths.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        scaled: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(width, half, 2, 2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(width, half, 2, 2)], half),
            ([], width),
            ([nn.MaxPool2d(2, 2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *first,
                nn.Conv2d(entering, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for first, entering in scaled
        )

    def forward(self, last: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        return [level(last) for level in self.levels]
