"""Two processes with half of the samples each against one process with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes_for_tests import together
from torch import Tensor, nn

from vitprobe.distributed import GlobalBatchNorm, gather, mean, rank, world_size
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods.base import Batch, Method, Moment
from vitprobe.training.methods.dino import DINO, DINOConfig
from vitprobe.training.methods.moco_v3 import MoCoV3, MoCoV3Config
from vitprobe.training.methods.supervised import Supervised, SupervisedConfig
from vitprobe.training.randomness import Draws

Tensors = dict[str, Tensor]
ENCODER = EncoderConfig(
    image_size=8, patch_size=4, channels=1, width=16, depth=2, heads=2, mean=(0.0,), std=(1.0,)
)
METHODS: dict[str, tuple[type[Method], Any, tuple[int, ...]]] = {
    "moco_v3": (
        MoCoV3,
        MoCoV3Config(name="moco_v3", projection_width=8, hidden_width=12, momentum=0.5),
        (8, 8),
    ),
    "dino": (
        DINO,
        DINOConfig(
            name="dino", prototypes=20, hidden_width=12, bottleneck_width=6, momentum=0.5,
            freeze_last_layer_epochs=0.5,
        ),
        (8, 8, 4, 4),
    ),
    "supervised": (Supervised, SupervisedConfig(name="supervised", mixup=0.8, cutmix=1.0), (8,)),
}  # fmt: skip


def _numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _share(tensor: Tensor) -> Tensor:
    return tensor.chunk(world_size())[rank()]


def _normalise(norm: nn.BatchNorm1d) -> Tensors:
    """Batch norm of this process's share of 6 samples, and gradients of a loss that is a mean."""
    with torch.no_grad():
        norm.weight.copy_(_numbers((3,), 1))
    x = _share(5 + 2 * _numbers((6, 3), 0)).clone().requires_grad_()
    y = norm(x)
    # Not a function of each output by itself: normalised outputs have a constant sum of squares.
    (y.pow(3) * _share(_numbers((6, 3), 2))).mean().backward()
    norm.eval()
    return {
        "output": y.detach(),
        # The loss of the whole batch is the mean over the processes.
        "input gradient": x.grad / world_size(),
        "weight gradient": mean(norm.weight.grad),
        "running mean": norm.running_mean,
        "running variance": norm.running_var,
        "evaluation": norm(torch.ones(1, 3)).detach(),
    }


def _train(name: str) -> dict[str, Any]:
    """Three updates on this process's share of 8 images: losses, gradients and the end."""
    kind, config, sizes = METHODS[name]
    torch.manual_seed(0)
    method = kind(config, ENCODER, classes=5)
    optimizer = torch.optim.SGD((p for p in method.parameters() if p.requires_grad), lr=0.1)
    losses, gradients = [], []
    for step in range(3):
        views = tuple(_share(_numbers((8, 1, s, s), 100 * step + i)) for i, s in enumerate(sizes))
        index = _share(torch.arange(8))
        moment = Moment(step, 4, 2)
        method.before_step(moment)
        loss, terms = method.loss(Batch(views, index % 5, Draws(0, step, index)))
        loss.backward()
        for p in method.parameters():
            p.grad = p.grad if p.grad is None else mean(p.grad)
        losses += [mean(value.detach()) for value in (loss, *terms.values())]
        gradients += [p.grad.clone() for p in method.parameters() if p.grad is not None]
        method.after_gradient(moment)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(moment)
    return {"losses": losses, "gradients": gradients, "end": list(method.state_dict().values())}


def in_each_process() -> dict[str, Any]:
    x = (torch.arange(4.0).view(2, 2) + 10 * rank()).requires_grad_()
    average = mean(x)
    (average * _numbers((2, 2), 3 + rank())).sum().backward()
    half = GlobalBatchNorm(3)(_share(_numbers((6, 3), 0)).bfloat16())
    return {
        "place": (rank(), world_size()),
        "mean": average.detach(),
        "mean gradient": x.grad,
        "gather": gather(x),
        "dtype": half.dtype,
        "norm": _normalise(GlobalBatchNorm(3)),
        **{name: _train(name) for name in METHODS},
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(in_each_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
def test_processes_know_their_place(processes: list[dict[str, Any]]) -> None:
    assert [process["place"] for process in processes] == [(0, 2), (1, 2)]


@pytest.mark.slow
def test_the_mean_and_its_gradient_cross_processes(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        assert torch.equal(process["mean"], torch.arange(4.0).view(2, 2) + 5)
        # Each input moves both means by one half, and each mean has a loss of its own.
        expected = (_numbers((2, 2), 3) + _numbers((2, 2), 4)) / 2
        torch.testing.assert_close(process["mean gradient"], expected)


@pytest.mark.slow
def test_gathering_keeps_the_order_of_ranks(processes: list[dict[str, Any]]) -> None:
    x = torch.arange(4.0).view(2, 2)
    for process in processes:
        assert torch.equal(process["gather"], torch.cat([x, x + 10]))
        assert not process["gather"].requires_grad


@pytest.mark.slow
def test_global_batch_norm_is_batch_norm_of_the_whole_batch(
    processes: list[dict[str, Any]],
) -> None:
    whole = _normalise(nn.BatchNorm1d(3))
    first, second = (process["norm"] for process in processes)
    for name, expected in whole.items():
        if name in ("output", "input gradient"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), expected)
        else:
            torch.testing.assert_close(first[name], expected)
            assert torch.equal(first[name], second[name])


@pytest.mark.slow
def test_global_batch_norm_keeps_the_type(processes: list[dict[str, Any]]) -> None:
    assert all(process["dtype"] == torch.bfloat16 for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(processes: list[dict[str, Any]], name: str) -> None:
    alone = _train(name)
    for process in processes:
        for kind, expected in alone.items():
            torch.testing.assert_close(process[name][kind], expected, atol=1e-3, rtol=1e-3)
    for first, second in zip(*(process[name]["end"] for process in processes), strict=True):
        assert torch.equal(first, second)


def test_alone_everything_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert mean(x) is x
    assert torch.equal(gather(x), x)
    assert not gather(x).requires_grad
    ours, torchs = _normalise(GlobalBatchNorm(3)), _normalise(nn.BatchNorm1d(3))
    assert all(torch.equal(ours[name], torchs[name]) for name in torchs)
