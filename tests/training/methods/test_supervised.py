"""The supervised loss against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig
from vitprobe.training.methods import supervised
from vitprobe.training.methods.base import Batch
from vitprobe.training.methods.supervised import Supervised, SupervisedConfig
from vitprobe.training.randomness import Draws

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=16, depth=2, heads=2,
    mean=(0.0,), std=(1.0,), positions="sincos",
)  # fmt: skip


def _method(**changes: Any) -> Supervised:
    torch.manual_seed(0)
    return Supervised(SupervisedConfig(name="supervised", **changes), ENCODER, classes=4)


def _batch(labels: list[int]) -> Batch:
    n = len(labels)
    images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch((images,), torch.tensor(labels), Draws(0, 0, torch.arange(n)))


def test_the_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _method(label_smoothing=0.2)
    logits = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 2.0]])
    monkeypatch.setattr(method.encoder, "forward_head", lambda tokens: logits)
    loss, terms = method.loss(_batch([0, 0]))
    # Targets: 0.8 + 0.2 / 4 on class 0, 0.05 on each other; -log p = log(sum exp) - logit.
    total = math.log(math.exp(2) + 3)
    expected = (total - 0.85 * 2 + total - 0.05 * 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert terms["accuracy"].item() == 0.5


def test_without_mixing_targets_are_torchs_label_smoothing() -> None:
    method, batch = _method(label_smoothing=0.3), _batch([3, 0, 1, 1, 2])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    images, targets = method.inputs(batch)
    assert torch.equal(images, batch.views[0])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.3)
    torch.testing.assert_close(method.loss_of(logits, targets), expected)


def test_the_encoder_sees_what_was_mixed_and_accuracy_counts_what_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, batch, seen = _method(label_smoothing=0.0, mixup=0.8, cutmix=1.0), _batch([0, 1]), []

    def mix(
        images: Tensor, targets: Tensor, draws: Draws, *, mixup: float, cutmix: float
    ) -> tuple[Tensor, Tensor]:
        assert (mixup, cutmix, draws) == (0.8, 1.0, batch.draws)
        return images.flip(0), 0.25 * targets + 0.75 * targets.flip(0)

    encode = method.encode
    logits = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    monkeypatch.setattr(supervised, "mix", mix)
    monkeypatch.setattr(method, "encode", lambda images: (seen.append(images), encode(images))[1])
    monkeypatch.setattr(method.encoder, "forward_head", lambda tokens: logits)
    loss, terms = method.loss(batch)
    assert len(seen) == 1
    assert torch.equal(seen[0], batch.views[0].flip(0))
    first, second = math.log(math.e + 3), math.log(math.exp(2) + 3)
    # Targets (1/4, 3/4, 0, 0) and (3/4, 1/4, 0, 0).
    assert loss.item() == pytest.approx((first - 0.25 * 1 + second - 0.25 * 2) / 2, rel=1e-6)
    assert terms["accuracy"].item() == 1


def test_logits_are_those_of_timms_model(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch, seen = _method(), _batch([0, 1, 2, 3]), []
    torch.nn.init.normal_(method.encoder.head.weight)
    monkeypatch.setattr(
        method, "loss_of", lambda logits, targets: (seen.append(logits), logits.sum())[1]
    )
    method.loss(batch)
    torch.testing.assert_close(seen[0], method.encoder(batch.views[0]))


def test_a_fresh_classifier_is_undecided() -> None:
    loss, _ = _method().loss(_batch([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


def test_everything_that_is_not_fixed_gets_a_gradient() -> None:
    method = _method()
    # A head of zeros would hold back the gradient of all that comes before it.
    torch.nn.init.normal_(method.encoder.head.weight)
    method.loss(_batch([0, 1]))[0].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed"}
    assert Supervised.needs_labels


def test_evaluation_counts_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    method = _method()
    monkeypatch.setattr(method.encoder, "forward", lambda x: torch.eye(4)[torch.arange(len(x)) % 4])
    labels = torch.arange(600) % 4
    labels[:60] = (labels[:60] + 1) % 4
    batches = zip(torch.rand(600, 1, 8, 8).split(256), labels.split(256), strict=True)
    assert method.evaluate(batches) == {"test_accuracy": 0.9}


def test_under_autocast_the_loss_is_single_precision() -> None:
    method, batch = _method(), _batch([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method.loss(batch)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("change", [{"label_smoothing": 1.0}, {"mixup": -0.1}, {"cutmix": -1.0}])
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=rf"method\.{next(iter(change))}"):
        _method(**change)
