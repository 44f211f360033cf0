"""A measure of one's own: how alike the patches are that touch each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitprobe.measures import Info, TokenMeasure, register


# [function]
def neighbour_cosine(tokens: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity of patches that lie side by side or one above the other.

    Args:
        tokens: patch tokens (n, rows * columns, width), row-major, prefix tokens dropped.
        grid: (rows, columns).

    Returns:
        (n,), between -1 and 1; nan for a grid of one patch, or where a token is 0.
    """
    x = tokens.unflatten(1, grid).double()
    beside = F.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=-1, eps=0)
    above = F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1, eps=0)
    return torch.cat([beside.flatten(1), above.flatten(1)], dim=1).mean(1)


# [class]
@register
class NeighbourCosine(TokenMeasure):
    """Streaming `neighbour_cosine`."""

    info = Info(
        name="neighbour_cosine",
        title="Neighbour cosine",
        unit="cosine",
        range="-1 to 1",
        direction="higher: patches that touch each other are more alike",
        what="How alike neighbouring patches are: 1 when all of them point the same way.",
        formula="mean over patches i, j that share an edge of cos(x_i, x_j)",
        source="this page",
        invariances=("orthogonal transformation", "isotropic scaling", "order of images"),
        streams="exact",
        group="tokens",
        interval="Student's t over images",
        null="Token cosine similarity, for patches whose likeness does not depend on their place.",
        caveats="Read token cosine similarity beside it: it may be high for all patches alike.",
        elsewhere="Nothing known.",
        bounds=(-1, 1),
    )

    def images(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if grid is None:  # the order of patches is not known
            return tokens.new_full((len(tokens),), torch.nan)
        return neighbour_cosine(tokens, grid=grid)
