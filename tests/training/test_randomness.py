"""Keyed random numbers: the published sequence, uniformity, independence of partition and order."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vitprobe.training.randomness import Draws, epoch_order, sequence

WORD = 2**64


def _splitmix64(state: int, n: int) -> list[int]:
    """SplitMix64 in Python's exact integers."""
    outputs = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        outputs.append(z ^ (z >> 31))
    return outputs


def test_sequence_is_splitmix64() -> None:
    # The published first outputs for the seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _splitmix64(1234567, 3) == published
    ours = sequence(torch.tensor([1234567]), 3)[0]
    assert [word % WORD for word in ours.tolist()] == published


@given(state=st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_sequence_wraps_like_unsigned_words(state: int) -> None:
    ours = sequence(torch.tensor([state]), 4)[0]
    assert [word % WORD for word in ours.tolist()] == _splitmix64(state % WORD, 4)


def test_the_numbers_of_a_key_never_change() -> None:
    # Runs are resumed, and results repeated, by versions to come.
    first = Draws(0, 0, torch.tensor([0, 1])).bits("crop", 2)
    assert first.tolist() == [
        [34945933877688952, 6118072097760454229],
        [5932695855644490731, 7398340544286071568],
    ]
    second = Draws(7, 3, torch.tensor([5])).bits("mask", 2)
    assert second.tolist() == [[-6289042420112705702, 557490559035593236]]


@pytest.mark.parametrize("seed", [-1, 0, 2**62, 2**63 - 1])
def test_any_seed_and_index_make_a_key(seed: int) -> None:
    # The key in exact integers, as the module's docstring describes it.
    key = 0
    for part in (seed, 2, zlib.crc32(b"crop")):
        key = _splitmix64((key + part) % WORD, 1)[0]
    for index in (0, 5, 2**62, -1):
        state = _splitmix64((index + key - 0x9E3779B97F4A7C15) % WORD, 1)[0]
        ours = Draws(seed, 2, torch.tensor([index])).bits("crop", 3)[0]
        assert [word % WORD for word in ours.tolist()] == _splitmix64(state, 3)


@given(cut=st.integers(1, 31), order=st.permutations(range(32)))
@settings(max_examples=20, deadline=None)
def test_a_sample_draws_the_same_whatever_batch_it_is_in(cut: int, order: list[int]) -> None:
    samples = torch.arange(32)
    whole = Draws(3, 5, samples).bits("crop", 7)
    shuffled = torch.tensor(order)
    parts = [Draws(3, 5, part).bits("crop", 7) for part in (shuffled[:cut], shuffled[cut:])]
    assert torch.equal(torch.cat(parts), whole[shuffled])


def test_seed_epoch_index_stream_and_position_all_matter() -> None:
    index = torch.arange(1000)
    draws = [
        Draws(seed, epoch, index).bits(stream, 4)
        for seed in (0, 1)
        for epoch in (0, 1)
        for stream in ("crop", "mask")
    ]
    words = torch.stack(draws).flatten()
    assert len(words.unique()) == len(words)


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = Draws(0, 0, torch.arange(20_000)).uniform("crop", 8)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 0.1 % of the distribution with 19 degrees of freedom
    correlation = torch.corrcoef(numbers.T) - torch.eye(8)
    assert correlation.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))
    assert abs(neighbours[0, 1]) < 0.03


@pytest.mark.parametrize("n", [1, 7])
def test_normal_numbers_are_normal_and_uncorrelated(n: int) -> None:
    numbers = Draws(0, 0, torch.arange(20_000)).normal("noise", n)
    assert numbers.shape == (20_000, n)
    assert numbers.dtype == torch.float32
    for column in numbers.double().T.numpy():
        assert stats.kstest(column, "norm").pvalue > 0.001
    if n > 1:
        for values in (numbers, numbers.square()):
            assert (torch.corrcoef(values.T) - torch.eye(n)).abs().max() < 0.03


def test_permutations_are_permutations_and_uniform() -> None:
    orders = Draws(0, 0, torch.arange(24_000)).permutation("mask", 4)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(24_000, 4))
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = codes.unique(return_counts=True)[1].float()
    assert len(counts) == 24
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 49.7  # 0.1 % at 23 degrees of freedom


def test_each_epoch_visits_every_sample_in_an_order_of_its_own() -> None:
    cpu = torch.device("cpu")
    first, again, second = (epoch_order(0, epoch, 100, cpu) for epoch in (0, 0, 1))
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    index = torch.arange(512)
    on_cpu, on_gpu = Draws(1, 2, index), Draws(1, 2, index.cuda())
    assert torch.equal(on_cpu.uniform("crop", 9), on_gpu.uniform("crop", 9).cpu())
    torch.testing.assert_close(on_cpu.normal("noise", 9), on_gpu.normal("noise", 9).cpu())
    assert torch.equal(on_cpu.permutation("mask", 36), on_gpu.permutation("mask", 36).cpu())
