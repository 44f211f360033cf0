"""Distillation against formulas written out by hand, and what its gradients may reach."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vitprobe as vp
from vitprobe.errors import CaptureError, RecipeError
from vitprobe.models import Model
from vitprobe.training.encoder import EncoderConfig, build_encoder, encode, save_encoder
from vitprobe.training.methods import distill
from vitprobe.training.methods.base import Batch, Method, MethodConfig, Moment
from vitprobe.training.methods.distill import DistillConfig, Distilled, load_teacher
from vitprobe.training.methods.mae import MAE, MAEConfig
from vitprobe.training.methods.supervised import Supervised, SupervisedConfig
from vitprobe.training.randomness import Draws

SETTINGS: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "channels": 1, "width": 16, "depth": 3, "heads": 2,
    "mean": (0.3,), "std": (0.4,),
}  # fmt: skip
ENCODER = EncoderConfig(**SETTINGS)


def config(**options: Any) -> DistillConfig:
    return DistillConfig(teacher="init:somewhere", **options)


def mae() -> MAE:
    torch.manual_seed(0)
    settings = MAEConfig(name="mae", decoder_width=8, decoder_depth=1, decoder_heads=2)
    method = MAE(settings, ENCODER, classes=0)
    stir(method.encoder)
    return method


def supervised(classes: int = 3) -> Supervised:
    torch.manual_seed(0)
    settings = SupervisedConfig(name="supervised", label_smoothing=0.0)
    method = Supervised(settings, ENCODER, classes)
    stir(method.encoder)
    return method


def stir(module: torch.nn.Module, seed: int = 7) -> None:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


def described(encoder: VisionTransformer, settings: EncoderConfig = ENCODER) -> Model:
    size = (settings.channels, settings.image_size, settings.image_size)
    return vp.wrap(encoder, name="teacher", input_size=size, mean=settings.mean, std=settings.std)


def twin(method: Method) -> Model:
    """A teacher of the student's own weights."""
    return described(copy.deepcopy(method.encoder))


def teacher(seed: int = 1, classes: int = 0, **changes: Any) -> Model:
    settings = EncoderConfig(**{**SETTINGS, **changes})
    encoder = build_encoder(settings, classes)
    stir(encoder, seed)
    return described(encoder, settings)


def batch(n: int = 4) -> Batch:
    images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch((images,), torch.arange(n) % 3, Draws(0, 0, torch.arange(n)))


def logits_of(encoder: VisionTransformer, images: Tensor, visible: Tensor, block: int) -> Tensor:
    """Scaled QK^T of one block, through none of the code under test but `encode`."""
    kept: list[Tensor] = []
    attention = encoder.blocks[block].attn
    handle = attention.qkv.register_forward_hook(lambda *call: kept.append(call[2]))
    encode(encoder, images, visible)
    handle.remove()
    b, n, width = kept[0].shape
    q, k, _ = kept[0].view(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(width / 3 / attention.num_heads)


# What is compared


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("term", ["attention", "hidden"])
def test_a_teacher_of_the_same_weights_leaves_nothing_to_learn(term: str, adapter: bool) -> None:
    inner = mae()
    method = Distilled(config(**{term: 2.0}, adapter=adapter), inner, ENCODER, twin(inner))
    loss, terms = method.loss(batch())
    assert terms[f"distill_{term}"].item() == 0
    assert loss.item() == mae().loss(batch())[0].item()


@pytest.mark.parametrize("fused", [True, False])
def test_the_attention_loss_by_hand(fused: bool) -> None:
    inner, taught = mae(), teacher(width=24, heads=3, depth=6)
    for block in inner.encoder.blocks:
        block.attn.fused_attn = fused
    method = Distilled(
        config(attention=0.7, student_layers=(0, 2), teacher_layers=(4, 1)), inner, ENCODER, taught
    )
    stir(method.attention_adapters, seed=3)
    given = batch()
    loss, terms = method.loss(given)
    visible = inner.order(given.draws)[:, : inner.visible]
    images, errors = given.views[0], []
    for adapter, own, theirs in zip(method.attention_adapters, (0, 2), (4, 1), strict=True):
        student = logits_of(inner.encoder, images, visible, own)
        expected = logits_of(taught.module, images, visible, theirs)
        # Class token and 4 visible patches, rows and columns alike.
        assert student.shape == (4, 2, 5, 5)
        assert expected.shape == (4, 3, 5, 5)
        mixed = torch.einsum("ts,bsqk->btqk", adapter.weight[:, :, 0, 0], student)
        errors.append((mixed - expected).square().mean())
    expected = sum(errors) / 2
    torch.testing.assert_close(terms["distill_attention"], expected)
    torch.testing.assert_close(loss, mae().loss(given)[0] + 0.7 * expected)


def test_the_hidden_loss_by_hand() -> None:
    inner, taught = mae(), teacher(width=24, heads=3, depth=6)
    method = Distilled(config(hidden=0.5, hidden_layers=(0, 2, 3)), inner, ENCODER, taught)
    stir(method.hidden_adapters, seed=3)
    given = batch()
    loss, terms = method.loss(given)
    visible = inner.order(given.draws)[:, : inner.visible]
    streams = []
    for encoder in (inner.encoder, taught.module):
        kept: list[Tensor] = []
        handles = [encoder.blocks[0].register_forward_pre_hook(lambda _, a, k=kept: k.append(a[0]))]
        handles += [
            block.register_forward_hook(lambda *call, k=kept: k.append(call[2]))
            for block in encoder.blocks
        ]
        encode(encoder, given.views[0], visible)
        for handle in handles:
            handle.remove()
        streams.append(kept)
    student, expected = streams
    errors = [
        (F.linear(student[own], adapter.weight, adapter.bias) - expected[theirs]).square().mean()
        for adapter, own, theirs in zip(method.hidden_adapters, (0, 2, 3), (0, 4, 6), strict=True)
    ]
    torch.testing.assert_close(terms["distill_hidden"], sum(errors) / 3)
    torch.testing.assert_close(loss, mae().loss(given)[0] + 0.5 * sum(errors) / 3)


def test_hard_logits_by_hand() -> None:
    inner, taught = supervised(), teacher(seed=5, classes=3)
    method = Distilled(config(logits=0.25), inner, ENCODER, taught)
    given = batch()
    loss, terms = method.loss(given)
    student = inner.encoder(given.views[0]).log_softmax(dim=1)
    said = taught.module(given.views[0]).argmax(dim=1)
    assert len(set(said.tolist())) > 1
    word = -student[torch.arange(4), said].mean()
    own = -student[torch.arange(4), given.labels].mean()
    torch.testing.assert_close(terms["distill_logits"], word)
    torch.testing.assert_close(loss, 0.75 * own + 0.25 * word)
    assert set(terms) == {"accuracy", "distill_logits"}


def test_soft_logits_by_hand() -> None:
    inner, taught = supervised(), teacher(classes=3)
    settings = config(logits=0.25, logits_kind="soft", temperature=3.0)
    method = Distilled(settings, inner, ENCODER, taught)
    given = batch()
    loss, terms = method.loss(given)
    student = inner.encoder(given.views[0])
    p = (taught.module(given.views[0]) / 3).softmax(dim=1)
    q = (student / 3).softmax(dim=1)
    divergence = 9 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(terms["distill_logits"], divergence)
    own = F.cross_entropy(student, given.labels)
    torch.testing.assert_close(loss, 0.75 * own + 0.25 * divergence)


def test_a_teacher_that_agrees_has_no_soft_word_left() -> None:
    inner = supervised()
    settings = config(logits=0.5, logits_kind="soft", temperature=2.0)
    _, terms = Distilled(settings, inner, ENCODER, twin(inner)).loss(batch())
    assert terms["distill_logits"].item() == pytest.approx(0, abs=1e-7)


def test_the_teacher_sees_the_same_patches() -> None:
    inner = mae()
    method = Distilled(config(attention=1.0), inner, ENCODER, teacher())
    given = batch()
    before = method.loss(given)[1]["distill_attention"]
    order = inner.order(given.draws)
    for patch, seen in ((order[0, 0].item(), True), (order[0, -1].item(), False)):
        images = given.views[0].clone()
        row, column = divmod(patch, 4)
        images[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
        changed = Batch((images,), given.labels, given.draws)
        after = method.loss(changed)[1]["distill_attention"]
        assert torch.equal(before, after) is not seen
    # Neither has tokens beyond the class token and the visible patches.
    lengths: list[int] = []
    for encoder in (inner.encoder, method.teacher.module):
        encoder.blocks.register_forward_pre_hook(lambda _, a: lengths.append(a[0].shape[1]))
    method.loss(given)
    assert lengths == [5, 5]


def test_layers_are_compared_in_single_precision_under_autocast() -> None:
    inner = mae()
    method = Distilled(config(attention=1.0, hidden=1.0), inner, ENCODER, teacher())
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = method.loss(batch())
    exact, _ = method.loss(batch())
    assert loss.dtype == terms["distill_attention"].dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


# What the gradient reaches


def gradients(method: Distilled) -> dict[str, Tensor]:
    """Of the distillation alone, where not zero, by the name of the student's parameter."""
    inner = method.inner.loss

    def muted(given: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = inner(given)
        return loss.detach(), terms

    method.inner.loss = muted
    loss, _ = method.loss(batch())
    loss.backward()
    return {
        name: parameter.grad
        for name, parameter in method.encoder.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.parametrize("fused", [True, False])
def test_attention_gradients_stay_in_queries_and_keys_of_the_chosen_block(fused: bool) -> None:
    inner = mae()
    for block in inner.encoder.blocks:
        block.attn.fused_attn = fused
    method = Distilled(config(attention=1.0, student_layers=(1,)), inner, ENCODER, teacher())
    reached = gradients(method)
    # Of the chosen block what makes queries and keys; of those before it all that makes the
    # stream; of those after it nothing.
    own = {name for name in reached if name.startswith("blocks.1.")}
    assert own == {f"blocks.1.{part}" for part in (
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"
    )}  # fmt: skip
    q, k, v = reached["blocks.1.attn.qkv.weight"].chunk(3)
    assert q.any()
    assert k.any()
    assert not v.any()
    before = {n for n, _ in inner.encoder.named_parameters() if n.startswith("blocks.0.")}
    assert before <= set(reached)
    assert {"cls_token", "patch_embed.proj.weight"} <= set(reached)
    assert not {name for name in reached if name.startswith(("blocks.2.", "norm."))}
    assert all(p.grad is None for p in inner.encoder.blocks[2].parameters())
    assert all(p.grad is None for p in inner.encoder.blocks[1].mlp.parameters())
    assert all(p.grad is None for p in inner.encoder.blocks[1].attn.proj.parameters())


def test_hidden_gradients_end_at_the_last_chosen_layer() -> None:
    inner = mae()
    method = Distilled(config(hidden=1.0, hidden_layers=(0, 1)), inner, ENCODER, teacher())
    reached = {name.split(".")[1] for name in gradients(method) if "blocks" in name}
    assert reached == {"0"}


def test_the_attention_gradient_is_that_of_the_formula() -> None:
    inner, taught = mae(), teacher(width=24, heads=3)
    method = Distilled(config(attention=1.0), inner, ENCODER, taught)
    stir(method.attention_adapters, seed=3)
    found = gradients(method)
    given = batch()
    visible = inner.order(given.draws)[:, : inner.visible]
    inner.zero_grad()
    student = logits_of(inner.encoder, given.views[0], visible, 2)
    weight = method.attention_adapters[0].weight[:, :, 0, 0]
    mixed = torch.einsum("ts,bsqk->btqk", weight, student)
    (mixed - logits_of(taught.module, given.views[0], visible, 2)).square().mean().backward()
    expected = {n: p.grad for n, p in inner.encoder.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_adapters_learn_and_the_teacher_does_not() -> None:
    inner = supervised()
    taught = teacher(width=24, heads=3, classes=3)
    taught.module.requires_grad_(True).train()
    method = Distilled(config(attention=1.0, hidden=1.0, logits=0.5), inner, ENCODER, taught)
    method.train()
    assert not taught.module.training
    method.loss(batch())[0].backward()
    assert all(parameter.grad is None for parameter in taught.module.parameters())
    adapters = [*method.attention_adapters.parameters(), *method.hidden_adapters.parameters()]
    assert len(adapters) == 1 + 4
    assert all(parameter.grad is not None for parameter in adapters)


# How the method around it is left alone


def test_the_methods_own_output_is_bit_identical() -> None:
    alone = mae()
    loss, _ = alone.loss(batch())
    loss.backward()
    inner = mae()
    method = Distilled(config(attention=1.0, hidden=1.0), inner, ENCODER, teacher())
    kept: list[Tensor] = []
    own = inner.loss
    inner.loss = lambda given: kept.append(own(given)[0]) or (kept[0], {})
    method.loss(batch())
    assert torch.equal(kept[0], loss)
    kept[0].backward()
    for (name, p), (_, q) in zip(alone.named_parameters(), inner.named_parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
    images = batch().views[0]
    assert torch.equal(method.encode(images), alone.encode(images))
    assert torch.equal(method.features(images), alone.features(images))
    for title, row in alone.pictures(images).items():
        assert torch.equal(method.pictures(images)[title], row)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in method.modules())


class Several(Method):
    """Encodes views as they come, one of them without a gradient."""

    needs_labels = True
    accumulation_changes = "it says so"

    def __init__(self) -> None:
        super().__init__(MethodConfig("several"), ENCODER, classes=0)
        torch.manual_seed(0)
        self.encoder = build_encoder(ENCODER)
        stir(self.encoder)
        self.seen: list[object] = []

    def encode(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        if images.shape[-1] == ENCODER.image_size:
            return super().encode(images, visible)
        return self.encoder.blocks(self.encoder.patch_embed.proj(images).flatten(2).mT)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            self.encode(batch.views[0])
        return sum(self.encode(view).sum() for view in batch.views), {"own": torch.ones(())}

    def before_step(self, moment: Moment) -> None:
        self.seen.append(moment)

    after_gradient = after_step = before_step

    def evaluate(self, batches: Any) -> dict[str, float]:
        return {"score": float(len(list(batches)))}

    @classmethod
    def check_views(cls, sizes: Any, encoder: EncoderConfig) -> None:
        raise RecipeError(f"views {sizes}")


def test_losses_are_averaged_over_the_calls_that_are_heard() -> None:
    first, second = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    small = torch.randn(4, 1, 4, 4)
    draws = Draws(0, 0, torch.arange(4))

    def of(*views: Tensor) -> float:
        method = Distilled(config(attention=1.0), Several(), ENCODER, teacher())
        _, terms = method.loss(Batch(views, torch.zeros(4, dtype=torch.long), draws))
        assert set(terms) == {"own", "distill_attention"}
        return terms["distill_attention"].item()

    assert of(first) != of(second)
    assert of(first, second) == pytest.approx((of(first) + of(second)) / 2, rel=1e-6)
    assert of(first, small) == of(first)


def test_a_loss_that_encodes_nothing_whole_is_refused() -> None:
    method = Distilled(config(attention=1.0), Several(), ENCODER, teacher())
    draws = Draws(0, 0, torch.arange(4))
    method.inner.loss = lambda given: (method.inner.encode(given.views[0]).sum(), {})
    small = Batch((torch.randn(4, 1, 4, 4),), torch.zeros(4), draws)
    with pytest.raises(CaptureError, match="'several' encoded no image of 8 pixels"):
        method.loss(small)


def test_the_rest_is_the_methods_own() -> None:
    inner = Several()
    method = Distilled(config(attention=1.0), inner, ENCODER, teacher())
    moment = Moment(0, 10, 5)
    method.before_step(moment)
    method.after_gradient(moment)
    method.after_step(moment)
    assert inner.seen == [moment] * 3
    assert method.evaluate([]) == {"score": 0.0}
    assert method.encoder is inner.encoder
    assert method.config is inner.config
    assert method.final_encoder is inner.final_encoder
    assert method.pictures(batch().views[0]) == {}


def test_nothing_is_heard_outside_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Distilled(config(attention=1.0), mae(), ENCODER, teacher())
    monkeypatch.setattr(distill, "listen", None)
    method.encode(batch().views[0])
    method.pictures(batch().views[0])
    with torch.no_grad():
        method.features(batch().views[0])


def test_distilled_attention_and_blocks_beside_distilled_states_count_as_heard() -> None:
    inner = mae()
    settings = config(attention=1.0, student_layers=(0, 2))
    method = Distilled(settings, inner, ENCODER, teacher())
    assert method.heard_modules() == {inner.encoder.blocks[i].attn for i in (0, 2)}
    settings, inner = config(hidden=1.0, hidden_layers=(0, 2)), mae()
    method = Distilled(settings, inner, ENCODER, teacher())
    assert method.heard_modules() == {inner.encoder.blocks[i] for i in (0, 1)}


def test_a_block_that_cannot_be_heard_fails_loudly() -> None:
    inner = mae()
    method = Distilled(config(attention=1.0), inner, ENCODER, teacher())
    inner.encoder.blocks[2].attn.forward = lambda x, **_: x
    with pytest.raises(CaptureError, match="'student' gave no attention in layers 2"):
        method.loss(batch())
    assert method._losses is None


# The state


def test_the_state_holds_the_method_and_the_adapters_only() -> None:
    inner = mae()
    method = Distilled(config(attention=1.0, hidden=1.0), inner, ENCODER, teacher(width=24))
    own = {f"inner.{name}" for name in mae().state_dict()}
    adapters = {"attention_adapters.0.weight"} | {f"hidden_adapters.{i}.weight" for i in range(4)}
    assert set(method.state_dict()) == own | adapters
    assert {name for name, _ in method.named_parameters()} == own | adapters
    assert not any("teacher" in name or "student" in name for name, _ in method.named_modules())
    again = Distilled(config(attention=1.0, hidden=1.0), mae(), ENCODER, teacher(width=24))
    stir(again, seed=5)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.loss(batch())[0], method.loss(batch())[0])


def test_the_teacher_moves_with_the_method() -> None:
    taught = teacher()
    method = Distilled(config(attention=1.0), mae(), ENCODER, taught)
    assert method.to("meta") is method
    tensors = [*taught.module.parameters(), *method.parameters(), *method.buffers()]
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_the_students_mode_is_left_alone() -> None:
    inner = mae()
    for training in (True, False):
        inner.encoder.train(training)
        Distilled(config(attention=1.0), inner, ENCODER, teacher())
        assert inner.encoder.training is training


@pytest.mark.parametrize(("own", "theirs"), [(2, 2), (2, 4), (4, 2)])
def test_adapters_start_as_isometries(own: int, theirs: int) -> None:
    settings = EncoderConfig(**{**SETTINGS, "heads": own})
    inner = Several()
    inner.encoder = build_encoder(settings)
    taught = teacher(heads=theirs, width=8 * theirs)
    method = Distilled(config(attention=1.0, hidden=1.0), inner, settings, taught)
    for adapter in (method.attention_adapters[0], method.hidden_adapters[0]):
        weight = adapter.weight.flatten(1)
        small = min(weight.shape)
        product = weight.mT @ weight if len(weight) > small else weight @ weight.mT
        torch.testing.assert_close(product, torch.eye(small))
        if len(weight) == weight.shape[1] == own:
            assert torch.equal(weight, torch.eye(own))


# The teacher's view


def test_a_teacher_of_another_patch_size_on_the_same_grid() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    taught = teacher(image_size=16, patch_size=4, channels=3, mean=mean, std=std)
    inner = mae()
    method = Distilled(config(attention=1.0), inner, ENCODER, taught)
    given = batch()
    pixels = torch.rand(4, 1, 8, 8)
    given = Batch(((pixels - 0.3) / 0.4,), given.labels, given.draws)
    _, terms = method.loss(given)
    large = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    theirs = (large - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    visible = inner.order(given.draws)[:, : inner.visible]
    student = logits_of(inner.encoder, given.views[0], visible, 2)
    expected = logits_of(taught.module, theirs, visible, 2)
    torch.testing.assert_close(terms["distill_attention"], F.mse_loss(student, expected))


def test_colour_becomes_luminance_for_a_grey_teacher() -> None:
    settings = EncoderConfig(**{**SETTINGS, "channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3})
    view = distill._View(settings, teacher(mean=(0.4,), std=(0.1,)))
    pixels = torch.rand(2, 3, 8, 8)
    grey = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
    torch.testing.assert_close(view((pixels - 0.5) / 0.2), (grey - 0.4) / 0.1)


def test_images_that_already_fit_are_not_touched() -> None:
    images = batch().views[0]
    assert distill._View(ENCODER, teacher())(images) is images


# Which layers


@pytest.mark.parametrize(
    ("student", "teachers", "pairs"),
    [
        (12, 12, [(i, i) for i in range(12)]),
        (12, 24, [(i, 2 * i + 1) for i in range(12)]),
        (4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        (12, 4, [(0, 0), (1, 0), (2, 0), (5, 1), (8, 2), (11, 3)]),
    ],
)
def test_blocks_are_matched_at_the_same_relative_depth(
    student: int, teachers: int, pairs: list[tuple[int, int]]
) -> None:
    layers = tuple(own for own, _ in pairs)
    assert config(attention=1.0, student_layers=layers).blocks(student, teachers) == tuple(pairs)
    assert config(attention=1.0).blocks(student, teachers) == ((student - 1, teachers - 1),)
    assert config(hidden=1.0).blocks(student, teachers) == ()


def test_states_are_matched_at_the_same_relative_depth() -> None:
    assert config(hidden=1.0).states(3, 6) == ((0, 0), (1, 2), (2, 4), (3, 6))
    assert config(hidden=1.0).states(4, 2) == ((0, 0), (1, 0), (2, 1), (3, 2), (4, 2))
    assert config(hidden=1.0, hidden_layers=(4,)).states(4, 12) == ((4, 12),)
    assert config(attention=1.0).states(3, 6) == ()


def test_a_teachers_layer_may_serve_several_of_the_student() -> None:
    method = Distilled(config(hidden=1.0), mae(), ENCODER, teacher(depth=1))
    assert method.loss(batch())[1]["distill_hidden"] > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention": -1.0}, r"distill\.attention"),
        ({"attention": math.inf}, r"distill\.attention"),
        ({"hidden": math.nan}, r"distill\.hidden"),
        ({"logits": 1.5}, r"distill\.logits"),
        ({}, r"distill\.attention, distill\.hidden and distill\.logits"),
        ({"logits": 1.0, "logits_kind": "warm"}, r"distill\.logits_kind"),
        ({"logits": 1.0, "temperature": 0.0}, r"distill\.temperature"),
        ({"attention": 1.0, "student_layers": (-1,)}, r"distill\.student_layers.*not -1"),
        ({"attention": 1.0, "teacher_layers": (-1,)}, r"distill\.teacher_layers.*not -1"),
        ({"hidden": 1.0, "hidden_layers": (-2,)}, r"distill\.hidden_layers.*not -2"),
        ({"attention": 1.0, "student_layers": (1, 1)}, r"distill\.student_layers names a layer tw"),
        ({"attention": 1.0, "teacher_layers": (1, 2)}, r"distill\.teacher_layers names 2"),
        ({"attention": 1.0, "teacher": ""}, r"distill\.teacher"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        DistillConfig(**{"teacher": "x", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": 1.0, "student_layers": (3,)},
            "student_layers names 3, but the student",
        ),
        (
            {"attention": 1.0, "teacher_layers": (5,)},
            "teacher_layers names 5, but the teacher",
        ),
        ({"hidden": 1.0, "hidden_layers": (4,)}, "hidden_layers names 4, but .* are 0 to 3"),
        ({"attention": 1.0, "adapter": False}, "the student has 2 heads and the teacher 3"),
        ({"hidden": 1.0, "adapter": False}, "the student has 16 channels and the teacher 24"),
        ({"logits": 1.0}, "a method that classifies"),
    ],
)
def test_what_does_not_fit_the_models_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distilled(config(**options), mae(), ENCODER, teacher(width=24, heads=3))


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match="the student's 3 classes, not of 5"):
        Distilled(config(logits=1.0), supervised(3), ENCODER, teacher(classes=5))


def test_a_checkpoint_as_teacher(tmp_path: Path) -> None:
    settings = EncoderConfig(**{**SETTINGS, "width": 24, "heads": 3})
    encoder = build_encoder(settings)
    path = tmp_path / "encoder.safetensors"
    about = {"architecture": settings.architecture(0), "mean": [0.3], "std": [0.4]}
    save_encoder(encoder.state_dict(), path, about)
    spec = DistillConfig(teacher=str(path), attention=1.0)
    loaded = load_teacher(spec, ENCODER)
    method = Distilled(spec, mae(), ENCODER, loaded)
    assert method.teacher_sha256 == loaded.sha256
    assert len(str(loaded.sha256)) == 64
    assert method.loss(batch())[1]["distill_attention"] > 0


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another grid": ({"patch_size": 4}, "its grid is 2x2 patches, the student's 4x4"),
    "registers": ({"reg_tokens": 2}, "it has 3 tokens before the patches"),
    "no class token": (
        {"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, "a class token alone",
    ),
    "no positions": ({"pos_embed": "none"}, "no absolute position embedding"),
    "two channels": ({"in_chans": 2}, "images of 2 channels, the student's have 1"),
}  # fmt: skip


def test_a_teacher_of_damaged_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    with torch.no_grad():
        module.norm.bias[3] = torch.nan
    model = vp.wrap(module, name="x", mean=0.5, std=0.5)
    monkeypatch.setattr(distill, "load", lambda spec: model)
    with pytest.raises(RecipeError, match=r"its weights 'norm\.bias' are not all finite"):
        load_teacher(config(attention=1.0), ENCODER)


@pytest.mark.parametrize("kind", UNFIT)
def test_other_models_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    changes, message = UNFIT[kind]
    options = {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2,
        "num_classes": 0, **changes,
    }  # fmt: skip
    model = vp.wrap(VisionTransformer(**options), name="x", mean=0.5, std=0.5)
    monkeypatch.setattr(distill, "load", lambda spec: model)
    with pytest.raises(RecipeError, match=f"'init:somewhere' cannot teach: .*{message}"):
        load_teacher(config(attention=1.0), ENCODER)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("init:deit_tiny_distilled_patch16_224", "a VisionTransformerDistilled, not timm's plain"),
        ("init:vit_tiny_r_s16_p8_224", "its patches pass through a HybridEmbed"),
    ],
)
def test_relatives_of_the_plain_transformer_are_refused(spec: str, message: str) -> None:
    settings = EncoderConfig(**{**SETTINGS, "image_size": 28})
    with pytest.raises(RecipeError, match=message):
        load_teacher(DistillConfig(teacher=spec, attention=1.0), settings)
