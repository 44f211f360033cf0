from __future__ import annotations

import pytest
import torch

from vitprobe.errors import MeasureError
from vitprobe.measures import select_tokens

TOKENS = torch.arange(24.0).reshape(2, 4, 3)


def test_policies():
    assert torch.equal(select_tokens(TOKENS, 1), TOKENS[:, 1:])
    assert torch.equal(select_tokens(TOKENS, 0), TOKENS)
    assert torch.equal(select_tokens(TOKENS, 2, "cls"), TOKENS[:, 0])
    assert torch.equal(select_tokens(TOKENS, 1, "mean"), TOKENS[:, 1:].mean(1))
    assert torch.equal(select_tokens(TOKENS, 1, "all"), TOKENS)


def test_refusals():
    with pytest.raises(MeasureError, match="unknown tokens 'first': use one of patches, cls"):
        select_tokens(TOKENS, 1, "first")
    with pytest.raises(MeasureError, match="without a class token"):
        select_tokens(TOKENS, 0, "cls")
