"""DINO's loss and centre against values worked out by hand, and what moves when."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprobe.errors import RecipeError
from vitprobe.training.encoder import EncoderConfig, build_encoder, encode
from vitprobe.training.methods.base import Batch, Moment
from vitprobe.training.methods.dino import (
    DINO,
    DINOConfig,
    Prototypes,
    cross_entropy,
    encode_resampled,
)
from vitprobe.training.randomness import Draws

ENCODER: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "channels": 1, "width": 16, "depth": 2, "heads": 2,
    "mean": (0.0,), "std": (1.0,),
}  # fmt: skip
HEAD: dict[str, Any] = {"prototypes": 20, "hidden_width": 12, "bottleneck_width": 6}
START = Moment(0, 100, 10)


def _method(encoder: dict[str, Any] | None = None, **changes: Any) -> DINO:
    torch.manual_seed(0)
    config = DINOConfig(name="dino", **HEAD | changes)
    return DINO(config, EncoderConfig(**ENCODER | (encoder or {})), classes=0)


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _batch(n: int = 4, sizes: tuple[int, ...] = (8, 8, 4, 4, 4)) -> Batch:
    views = tuple(_numbers(n, 1, size, size, seed=i) for i, size in enumerate(sizes))
    return Batch(views, torch.zeros(n, dtype=torch.int64), Draws(0, 0, torch.arange(n)))


def _part(batch: Batch, chosen: slice) -> Batch:
    index = batch.draws.index[chosen]
    views = tuple(view[chosen] for view in batch.views)
    return Batch(views, batch.labels[chosen], Draws(0, 0, index))


def test_the_cross_entropy_of_one_image_by_hand() -> None:
    teacher = [torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])]
    student = [torch.tensor(p).log() for p in ([[0.5, 0.5]], [[0.2, 0.8]], [[0.1, 0.9]])]
    pairs = [
        0.5 * math.log(0.5) + 0.5 * math.log(0.5),  # the second view's teacher, the first view
        0.75 * math.log(0.2) + 0.25 * math.log(0.8),  # the first view's teacher, the second view
        0.75 * math.log(0.1) + 0.25 * math.log(0.9),  # both teachers, the third view
        0.5 * math.log(0.1) + 0.5 * math.log(0.9),
    ]
    assert cross_entropy(teacher, student).item() == pytest.approx(-sum(pairs) / 4, rel=1e-6)


class _Outputs(nn.Module):
    """Stands for a head: the rows it was given, whatever comes in."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        assert len(tokens) == len(self.rows)
        return self.rows


def _with_outputs(teacher: Tensor, student: Tensor, **changes: Any) -> DINO:
    method = _method(**changes)
    method.teacher_head, method.head = _Outputs(teacher), _Outputs(student)
    return method


def test_the_loss_against_plain_loops() -> None:
    n, views, k = 3, 4, 20
    t, s, c = (
        _numbers(2, n, k).numpy(),
        _numbers(views, n, k, seed=1).numpy(),
        np.linspace(-1, 1, k),
    )
    method = _with_outputs(torch.tensor(t).flatten(0, 1), torch.tensor(s).flatten(0, 1))
    method.centre.copy_(torch.tensor(c))
    loss, terms = method.loss(_batch(n, (8, 8, 4, 6)))
    losses, entropies = [], []
    for b in range(n):
        for i in range(2):
            p = np.exp((t[i, b] - c) / 0.04)
            p /= p.sum()
            entropies.append(-(p * np.log(p)).sum())
            for v in range(views):
                if v != i:
                    q = np.exp(s[v, b] / 0.1)
                    losses.append(-(p * np.log(q / q.sum())).sum())
    assert len(losses) == n * 6
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert terms["teacher_entropy"].item() == pytest.approx(np.mean(entropies), rel=1e-4)
    assert terms["kl"].item() == pytest.approx(np.mean(losses) - np.mean(entropies), rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of whatever lightly imports
def test_the_loss_and_the_centre_against_lightly() -> None:
    pytest.importorskip("lightly")
    from lightly.loss import DINOLoss

    t, s = _numbers(2, 3, 20), _numbers(4, 3, 20, seed=1)
    method = _with_outputs(t.flatten(0, 1), s.flatten(0, 1))
    theirs = DINOLoss(output_dim=20, warmup_teacher_temp=0.04, teacher_temp=0.07)
    for step in range(3):
        method.before_step(Moment(step, 100, 10))
        loss, _ = method.loss(_batch(3, (8, 8, 4, 4)))
        expected = theirs(list(t), list(s), teacher_temp=method.teacher_temperature)
        torch.testing.assert_close(loss, expected)
        method.after_step(Moment(step, 100, 10))
        torch.testing.assert_close(method.centre, theirs.center.flatten())


def test_a_student_without_opinion_costs_the_logarithm_of_the_prototypes() -> None:
    method = _with_outputs(_numbers(6, 20), torch.ones(9, 20))
    loss, _ = method.loss(_batch(3, (8, 8, 4)))
    assert loss.item() == pytest.approx(math.log(20), rel=1e-6)


def test_a_student_that_agrees_costs_the_teachers_entropy() -> None:
    # One view twice, equal temperatures, and a teacher that still equals the student.
    method = _method(student_temperature=0.07, first_teacher_temperature=0.07)
    view = _numbers(4, 1, 8, 8)
    batch = _batch()
    loss, terms = method.loss(Batch((view, view), batch.labels, batch.draws))
    assert terms["kl"].abs() < 1e-5
    torch.testing.assert_close(loss.detach(), terms["teacher_entropy"])


def test_collapse_shows_in_the_terms() -> None:
    alike = _with_outputs(torch.ones(6, 20), torch.ones(9, 20))
    _, terms = alike.loss(_batch(3, (8, 8, 4)))
    assert terms["teacher_entropy"].item() == pytest.approx(math.log(20), rel=1e-6)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-5)
    one = 10 * F.one_hot(torch.tensor(3), 20).float()
    _, terms = _with_outputs(one.expand(6, 20), one.expand(9, 20)).loss(_batch(3, (8, 8, 4)))
    assert terms["teacher_entropy"].item() == pytest.approx(0, abs=1e-5)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-5)


def test_the_centre_by_hand() -> None:
    teacher = torch.tensor([[1.0, 3.0], [3.0, 5.0], [5.0, 7.0], [7.0, 9.0]])
    method = _with_outputs(teacher, torch.zeros(6, 2), prototypes=2, centre_momentum=0.75)
    method.centre.copy_(torch.tensor([8.0, 0.0]))
    method.before_step(START)
    method.loss(_batch(2, (8, 8, 4)))
    # Parts of a batch must all be judged by the same centre, so it waits for the update's end.
    assert method.centre.tolist() == [8, 0]
    method.after_step(START)
    assert method.centre.tolist() == [0.75 * 8 + 0.25 * 4, 0.25 * 6]


def test_an_update_moves_teacher_and_centre_by_their_formulas() -> None:
    method, batch = _method(momentum=0.8, centre_momentum=0.7), _batch()
    method.centre.copy_(_numbers(20))
    centre = method.centre.clone()
    with torch.no_grad():
        tokens = encode(method.teacher_encoder, torch.cat(batch.views[:2]))[:, 0]
        average = method.teacher_head(tokens).mean(dim=0)
    method.loss(batch)  # of another update: it leaves no trace
    method.before_step(START)
    method.loss(batch)
    assert torch.equal(method.centre, centre)
    pairs = [(method.teacher_encoder, method.encoder), (method.teacher_head, method.head)]
    before = [[p.clone() for p in copy.parameters()] for copy, _ in pairs]
    with torch.no_grad():
        for p in [*method.encoder.parameters(), *method.head.parameters()]:
            p.add_(torch.randn_like(p))
    method.after_step(Moment(50, 100, 10))
    torch.testing.assert_close(method.centre, 0.7 * centre + 0.3 * average)
    for (copy, model), old in zip(pairs, before, strict=True):
        for p, q, o in zip(copy.parameters(), model.parameters(), old, strict=True):
            # Half-way through the run the cosine stands half-way from 0.8 to 1.
            torch.testing.assert_close(p, 0.9 * o + 0.1 * q)


def test_parts_of_a_batch_add_up() -> None:
    whole, parts, batch = _method(), _method(), _batch(6)
    for method, slices in (
        (whole, [slice(0, 6)]),
        (parts, [slice(0, 2), slice(2, 4), slice(4, 6)]),
    ):
        method.before_step(START)
        for chosen in slices:
            (method.loss(_part(batch, chosen))[0] / len(slices)).backward()
        method.after_step(START)
    torch.testing.assert_close(parts.centre, whole.centre)
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert not DINO.accumulation_changes


@pytest.mark.parametrize(("step", "temperature"), [(0, 0.04), (15, 0.055), (30, 0.07), (99, 0.07)])
def test_the_teachers_temperature_warms_up(step: int, temperature: float) -> None:
    method = _method(warmup_teacher_epochs=3)
    method.before_step(Moment(step, 100, 10))
    assert method.teacher_temperature == pytest.approx(temperature)


def test_without_warm_up_the_teacher_has_its_temperature_at_once() -> None:
    method = _method(warmup_teacher_epochs=0)
    method.before_step(START)
    assert method.teacher_temperature == 0.07


def test_what_gets_a_gradient() -> None:
    method = _method({"positions": "sincos"})
    method.loss(_batch())[0].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    teacher = {name for name, _ in method.named_parameters() if name.startswith("teacher_")}
    assert without == {"encoder.pos_embed"} | teacher
    assert not any(method.get_parameter(name).requires_grad for name in without)


def test_prototypes_do_not_move_in_the_first_epoch() -> None:
    method, batch = _method(), _batch()
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.1)
    direction = method.head.prototypes.direction
    start = direction.clone()
    for step in (0, 9, 10):
        assert torch.equal(direction, start)
        method.loss(batch)[0].backward()
        method.after_gradient(Moment(step, 100, 10))
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(direction, start)


def test_prototypes_are_torchs_weight_normalised_layer() -> None:
    x = _numbers(5, 6)
    ours = Prototypes(6, 20, unit=False)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 20, bias=False))
    with torch.no_grad():
        ours.length.copy_(_numbers(20, 1))
        theirs.parametrizations.weight.original0.copy_(ours.length)
        theirs.parametrizations.weight.original1.copy_(ours.direction)
    torch.testing.assert_close(ours(x), theirs(x))
    assert {name for name, _ in Prototypes(6, 20, unit=True).named_parameters()} == {"direction"}


def test_the_head_gives_cosines() -> None:
    head = _method().head
    tokens = _numbers(50, 16)
    outputs = head(tokens)
    assert outputs.abs().max() <= 1
    expected = F.cosine_similarity(
        head.perceptron(tokens)[:, None], head.prototypes.direction[None], dim=2
    )
    torch.testing.assert_close(outputs, expected)


def test_views_of_one_size_run_together_and_the_teacher_sees_the_first_two() -> None:
    method, calls = _method(), []
    for name in ("encoder", "teacher_encoder"):
        method.get_submodule(f"{name}.blocks").register_forward_hook(
            lambda _, args, __, name=name: calls.append((name, *args[0].shape[:2]))
        )
    method.loss(_batch(3))
    assert calls == [("teacher_encoder", 6, 17), ("encoder", 6, 17), ("encoder", 9, 5)]


def test_views_of_another_size_use_interpolated_positions() -> None:
    torch.manual_seed(0)
    encoder, small = (
        build_encoder(EncoderConfig(**ENCODER | {"image_size": size})) for size in (8, 6)
    )
    nn.init.normal_(encoder.pos_embed)
    positions = encoder.pos_embed.detach()
    grid = positions[:, 1:].mT.unflatten(2, (4, 4))
    grid = F.interpolate(grid, size=(3, 3), mode="bicubic").flatten(2).mT
    state = {**encoder.state_dict(), "pos_embed": torch.cat([positions[:, :1], grid], dim=1)}
    small.load_state_dict(state)
    images = _numbers(2, 1, 6, 6)
    torch.testing.assert_close(encode_resampled(encoder, images), small.forward_features(images))
    whole = _numbers(2, 1, 8, 8)
    torch.testing.assert_close(encode_resampled(encoder, whole), encoder.forward_features(whole))


def test_the_teacher_drops_no_paths() -> None:
    method = _method({"drop_path": 0.9})
    batch, images = _batch(), _batch().views[0]
    plain = method.encode(images)
    method(batch)
    assert torch.equal(*(encode(method.teacher_encoder, images) for _ in range(2)))
    assert not torch.equal(method.encode(images), plain)


def test_the_state_is_parameters_and_buffers() -> None:
    batch, one, other = _batch(), _method(), _method()
    optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        one.before_step(Moment(step, 4, 2))
        if step == 2:
            break
        one.loss(batch)[0].backward()
        optimizer.step()
        one.after_step(Moment(step, 4, 2))
    other.load_state_dict(one.state_dict())
    other.before_step(Moment(2, 4, 2))
    assert torch.equal(one.loss(batch)[0], other.loss(batch)[0])


def test_under_autocast_the_loss_is_single_precision() -> None:
    method, batch = _method(), _batch()
    exact, _ = method.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = method.loss(batch)
    assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [([8], "first two views"), ([8, 4], "first two views"), ([8, 8, 4, 5], "size 5 of view 3")],
)
def test_impossible_views_are_refused(sizes: list[int], named: str) -> None:
    encoder = EncoderConfig(**ENCODER)
    DINO.check_views([8, 8, 4, 6], encoder)
    DINO.check_views([8, 8], encoder)
    with pytest.raises(RecipeError, match=rf"{named}.*mend views"):
        DINO.check_views(sizes, encoder)


@pytest.mark.parametrize(
    "change",
    [
        {"prototypes": 1},
        {"hidden_width": 0},
        {"student_temperature": 0.0},
        {"warmup_teacher_epochs": -1.0},
        {"momentum": 1.5},
        {"centre_momentum": -0.1},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=rf"method\.{next(iter(change))}"):
        _method(**change)
