"""Which tokens of a layer stand for an image."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from vitprobe.errors import MeasureError

TokenPolicy = Literal["patches", "cls", "mean", "all"]


def select_tokens(tokens: Tensor, prefix_tokens: int, policy: TokenPolicy = "patches") -> Tensor:
    """Reduce a layer's tokens to one representation per image.

    Args:
        tokens: (n, tokens, width), prefix tokens first.
        prefix_tokens: leading tokens that are no patches.
        policy: `patches` (patch tokens), `cls` (the first prefix token), `mean` (mean of patch
            tokens) or `all`.

    Returns:
        (n, kept tokens, width), or (n, width) for `cls` and `mean`.

    Raises:
        MeasureError: unknown policy, or `cls` where there is no prefix token.
    """
    if policy not in get_args(TokenPolicy):
        raise MeasureError(
            f"unknown tokens '{policy}': use one of {', '.join(get_args(TokenPolicy))}"
        )
    if policy == "cls":
        if prefix_tokens == 0:
            raise MeasureError("tokens 'cls' asked of a model without a class token; use 'mean'")
        return tokens[:, 0]
    if policy == "all":
        return tokens
    patches = tokens[:, prefix_tokens:]
    return patches.mean(1) if policy == "mean" else patches
