"""Mixup and CutMix: shares, areas, pairs, and the distribution of what is drawn."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.mixing import beta, mix
from vitprobe.training.randomness import Draws


def _batch(n: int, size: int = 16) -> tuple[Tensor, Tensor, Draws]:
    """Image i is i everywhere and of class i."""
    images = torch.arange(n).float()[:, None, None, None].expand(n, 3, size, size).clone()
    return images, torch.eye(n), Draws(0, 0, torch.arange(n))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    uniform = Draws(0, 0, torch.arange(20_000)).uniform("share", 1)[:, 0]
    samples = beta(uniform, alpha)
    assert samples.min() >= 0
    assert samples.max() <= 1
    # The lower half, and the upper by symmetry: single precision is too coarse just below 1.
    cdf = stats.beta(alpha, alpha).cdf
    for values in (samples, beta(1 - uniform - 2.0**-24, alpha)):
        lower = values[values < 0.5].double().numpy()
        assert stats.kstest(lower, lambda x: 2 * cdf(x)).pvalue > 0.001
    assert samples.mean() == pytest.approx(0.5, abs=0.012)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_pixels_shares(mixup: float, cutmix: float) -> None:
    images, targets, draws = _batch(64)
    mixed, soft = mix(images, targets, draws, mixup=mixup, cutmix=cutmix)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(64))
    # An image that is its class everywhere: its mean is the expected class of its target.
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(64).float())
    # Only partners meet, and what one loses the other gains.
    partner = torch.arange(64) ^ 1
    assert (soft.diagonal() + soft[torch.arange(64), partner] == 1).all()
    torch.testing.assert_close(mixed[0::2] + mixed[1::2], images[0::2] + images[1::2])


def test_mixup_blends_and_cutmix_pastes_one_box() -> None:
    images, targets, draws = _batch(200)
    blended, _ = mix(images, targets, draws, mixup=0.8, cutmix=0.0)
    assert (blended.amax(dim=(1, 2, 3)) == blended.amin(dim=(1, 2, 3))).all()
    pasted, soft = mix(images, targets, draws, mixup=0.0, cutmix=1.0)
    foreign = pasted[:, 0] != images[:, 0]
    assert ((pasted == images) | (pasted == images[torch.arange(200) ^ 1])).all()
    rows, columns = foreign.any(dim=2), foreign.any(dim=1)
    assert torch.equal(foreign, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert (side.int().diff(dim=1).abs().sum(dim=1) <= 2).all()  # contiguous
    torch.testing.assert_close(1 - foreign.float().mean(dim=(1, 2)), soft.diagonal())


def test_with_both_each_is_taken_half_the_time() -> None:
    images, targets, draws = _batch(2000, size=8)
    mixed, _ = mix(images, targets, draws, mixup=1.0, cutmix=1.0)
    whole = (mixed == images) | (mixed == images[torch.arange(2000) ^ 1])
    pasted = whole.flatten(1).all(dim=1).float().mean()
    assert pasted == pytest.approx(0.5, abs=0.06)


def test_even_shares_of_a_batch_mix_as_the_whole() -> None:
    images, targets, draws = _batch(12)
    whole = mix(images, targets, draws, mixup=0.8, cutmix=1.0)
    for part in (slice(0, 4), slice(4, 12)):
        own = mix(
            images[part], targets[part], Draws(0, 0, draws.index[part]), mixup=0.8, cutmix=1.0
        )
        torch.testing.assert_close(own, (whole[0][part], whole[1][part]))


@pytest.mark.parametrize("n", [1, 5])
def test_the_last_of_an_odd_batch_stays(n: int) -> None:
    images, targets, draws = _batch(n)
    mixed, soft = mix(images, targets, draws, mixup=0.8, cutmix=1.0)
    assert torch.equal(mixed[-1], images[-1])
    assert torch.equal(soft[-1], targets[-1])
    assert mixed.shape == images.shape


def test_nothing_is_mixed_without_an_alpha_and_a_negative_one_is_refused() -> None:
    images, targets, draws = _batch(4)
    assert mix(images, targets, draws, mixup=0, cutmix=0) == (images, targets)
    with pytest.raises(RecipeError, match="cutmix must be 0 or a positive alpha, not -1"):
        mix(images, targets, draws, mixup=0.8, cutmix=-1)
