"""MoCo v3's loss against values worked out by hand, and what may and may not be trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, encode
from vitprobe.training.methods.base import Batch, Moment
from vitprobe.training.methods.moco_v3 import MoCoV3, MoCoV3Config, contrast, perceptron
from vitprobe.training.randomness import Draws

ENCODER: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "channels": 3, "width": 16, "depth": 2, "heads": 2,
    "mean": (0.0,) * 3, "std": (1.0,) * 3, "positions": "sincos",
}  # fmt: skip
HEADS: dict[str, Any] = {"projection_width": 8, "hidden_width": 12}


def _method(encoder: dict[str, Any] | None = None, **changes: Any) -> MoCoV3:
    torch.manual_seed(0)
    config = MoCoV3Config(name="moco_v3", **HEADS | changes)
    return MoCoV3(config, EncoderConfig(**ENCODER | (encoder or {})), classes=0)


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _batch(n: int = 6) -> Batch:
    views = _numbers(n, 3, 8, 8, seed=1), _numbers(n, 3, 8, 8, seed=2)
    return Batch(views, torch.zeros(n, dtype=torch.int64), Draws(0, 0, torch.arange(n)))


def test_the_loss_of_two_images_by_hand() -> None:
    # Lengths do not count: the cosines are 1 on the diagonal and 0 off it.
    queries = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    keys = torch.tensor([[0.5, 0.0], [0.0, 7.0]])
    loss, hits = contrast(queries, keys, temperature=0.5)
    # Logits 1 / 0.5 and 0: -log(e^2 / (e^2 + 1)) = log(1 + e^-2), times 2 x 0.5.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert hits.item() == 1
    loss, hits = contrast(queries, keys.flip(0), temperature=0.2)
    assert loss.item() == pytest.approx(0.4 * math.log(1 + math.exp(5)), rel=1e-6)
    assert hits.item() == 0


def test_keys_that_are_all_alike_leave_the_logarithm_of_their_number() -> None:
    loss, _ = contrast(_numbers(7, 4), torch.ones(7, 4), temperature=0.3)
    assert loss.item() == pytest.approx(2 * 0.3 * math.log(7), rel=1e-6)


def test_perfect_alignment_of_orthogonal_images() -> None:
    n, temperature = 5, 0.1
    loss, hits = contrast(torch.eye(n), torch.eye(n), temperature)
    expected = 2 * temperature * math.log(1 + (n - 1) * math.exp(-1 / temperature))
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert hits.item() == 1


def test_the_loss_against_plain_loops() -> None:
    q, k = _numbers(5, 4).numpy().astype(float), _numbers(5, 4, seed=1).numpy().astype(float)
    total = 0.0
    for i in range(5):
        similar = [q[i] @ x / np.linalg.norm(q[i]) / np.linalg.norm(x) / 0.2 for x in k]
        total -= similar[i] - math.log(sum(math.exp(s) for s in similar))
    loss, _ = contrast(torch.tensor(q), torch.tensor(k), temperature=0.2)
    assert loss.item() == pytest.approx(0.4 * total / 5, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of whatever lightly imports
def test_the_loss_against_lightly() -> None:
    pytest.importorskip("lightly")
    from lightly.loss import NTXentLoss

    q, k = _numbers(6, 4), _numbers(6, 4, seed=1)
    theirs = []
    for i in range(6):
        # lightly knows no loss of MoCo v3; its loss of MoCo agrees, given the other keys as queue.
        others = torch.cat([k[:i], k[i + 1 :]])
        info_nce = NTXentLoss(temperature=0.2, memory_bank_size=(5, 4))
        info_nce.memory_bank.bank = torch.nn.functional.normalize(others, dim=1)
        theirs.append(info_nce(q[i : i + 1], k[i : i + 1]))
    loss, _ = contrast(q, k, temperature=0.2)
    torch.testing.assert_close(loss, 0.4 * torch.stack(theirs).mean())


def test_each_view_predicts_the_other() -> None:
    method, batch = _method(), _batch()
    loss, terms = method.loss(batch)
    views = [encode(method.encoder, view)[:, 0] for view in batch.views]
    q1, q2 = (method.predictor(method.projector(view)) for view in views)
    # The momentum copies have not moved yet.
    k1, k2 = (method.momentum_projector(view) for view in views)
    (first, hits_1), (second, hits_2) = contrast(q1, k2, 0.2), contrast(q2, k1, 0.2)
    torch.testing.assert_close(loss, first + second)
    torch.testing.assert_close(terms["accuracy"], (hits_1 + hits_2) / 2)
    swapped, _ = method.loss(Batch(batch.views[::-1], batch.labels, batch.draws))
    torch.testing.assert_close(swapped, loss)


def test_everything_runs_once_a_view() -> None:
    method, calls = _method(), []
    for name in ("encoder.blocks", "projector", "predictor", "momentum_projector"):
        method.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: calls.append((name, len(args[0])))
        )
    method.loss(_batch(6))
    assert sorted(calls) == [
        *[("encoder.blocks", 6)] * 2,
        *[("momentum_projector", 6)] * 2,
        *[("predictor", 6)] * 2,
        *[("projector", 6)] * 2,
    ]


def test_heads_end_in_batch_norm_without_scale() -> None:
    head = perceptron(16, 12, 12, 8)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "GlobalBatchNorm", "ReLU"] * 2 + ["Linear", "GlobalBatchNorm"]
    names = {name for name, _ in head.named_parameters()}
    assert names == {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"}
    out = head(_numbers(50, 16))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=0, unbiased=False), torch.ones(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("freeze", [True, False])
def test_what_gets_a_gradient(freeze: bool) -> None:
    method = _method(freeze_patch=freeze)
    method.loss(_batch())[0].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    patch = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    fixed = {"encoder.pos_embed"} | (patch if freeze else set())
    momentum = {name for name, _ in method.named_parameters() if name.startswith("momentum_")}
    assert without == fixed | momentum
    assert not any(method.get_parameter(name).requires_grad for name in without)


def test_the_patch_projection_is_drawn_as_a_linear_layer_on_patches() -> None:
    projection = _method({"width": 128, "heads": 4}).encoder.patch_embed.proj
    bound = math.sqrt(6 / (3 * 2 * 2 + 128))
    assert projection.weight.abs().max() <= bound
    # A uniform distribution's deviation is its bound over the root of 3; 1,536 weights.
    assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not projection.bias.any()


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.9), (50, 0.95), (100, 1.0)])
def test_momentum_follows_its_formula(step: int, momentum: float) -> None:
    method = _method(momentum=0.9)
    pairs = [
        (method.momentum_encoder, method.encoder),
        (method.momentum_projector, method.projector),
    ]
    before = [[p.clone() for p in copy.parameters()] for copy, _ in pairs]
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    method.after_step(Moment(step, 100, 10))
    for (copy, model), old in zip(pairs, before, strict=True):
        for p, q, o in zip(copy.parameters(), model.parameters(), old, strict=True):
            torch.testing.assert_close(p, momentum * o + (1 - momentum) * q)


def test_the_momentum_encoder_drops_no_paths() -> None:
    method = _method({"drop_path": 0.9})
    batch, images = _batch(), _batch().views[0]
    method(batch)
    copies = [encode(method.momentum_encoder, images) for _ in range(2)]
    assert torch.equal(*copies)
    assert not torch.equal(copies[0], encode(method.encoder, images))
    assert torch.equal(copies[0], encode(method.encoder.eval(), images))


def test_the_state_is_parameters_and_buffers() -> None:
    batch, one, other = _batch(), _method(), _method()
    for step in range(2):
        loss, _ = one.loss(batch)
        loss.backward()
        with torch.no_grad():
            for p in one.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        one.zero_grad()
        one.after_step(Moment(step, 4, 2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.loss(batch)[0], other.loss(batch)[0])


def test_under_autocast_the_loss_is_single_precision() -> None:
    method, batch = _method(), _batch()
    exact, _ = method.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method.loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_one_image_is_no_batch() -> None:
    with pytest.raises(RecipeError, match=r"at least 2, not 1; raise batch_size"):
        _method().loss(_batch(1))


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [8, 4], [4, 4]])
def test_other_than_two_whole_views_are_refused(sizes: list[int]) -> None:
    encoder = EncoderConfig(**ENCODER)
    MoCoV3.check_views([8, 8], encoder)
    with pytest.raises(RecipeError, match=r"two views .* mend views"):
        MoCoV3.check_views(sizes, encoder)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.0}, {"momentum": 1.5}, {"projection_width": 0}, {"hidden_width": 0}],
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=rf"method\.{next(iter(change))}"):
        _method(**change)
