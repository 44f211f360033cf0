"""Fine-tuning: which weights are kept, what is classified, relative positions, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import create_model
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor

import vitprobe as vp
from vitprobe.errors import RecipeError
from vitprobe.models import load
from vitprobe.training.encoder import EncoderConfig, build_encoder, save_encoder
from vitprobe.training.methods.base import Batch
from vitprobe.training.methods.distill import DistillConfig, Distilled, load_teacher
from vitprobe.training.methods.finetune import (
    Finetune,
    FinetuneConfig,
    describe,
    load_plain,
)
from vitprobe.training.optimizer import OptimizerConfig, build_optimizer
from vitprobe.training.randomness import Draws
from vitprobe.training.recipe import load_recipe

ENCODER = EncoderConfig(
    image_size=8, patch_size=2, channels=1, width=16, depth=4, heads=2,
    mean=(0.3,), std=(0.4,), positions="sincos",
)  # fmt: skip
DEPTH, CLASSES = ENCODER.depth, 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder none of whose tensors is as it would be drawn."""
    torch.manual_seed(0)
    encoder = build_encoder(ENCODER)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("init") / "encoder.safetensors"
    about = {"architecture": ENCODER.architecture(0), "mean": [0.3], "std": [0.4]}
    save_encoder(encoder.state_dict(), path, about)
    return str(path)


def _method(checkpoint: str, **changes: Any) -> Finetune:
    torch.manual_seed(1)
    config = FinetuneConfig(name="finetune", init=checkpoint, **changes)
    return Finetune(config, ENCODER, CLASSES)


def _images(n: int = 6) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def _batch(n: int = 6) -> Batch:
    return Batch((_images(n),), torch.arange(n) % CLASSES, Draws(0, 0, torch.arange(n)))


def _same(method: Finetune, checkpoint: str) -> dict[str, bool]:
    """Whether each tensor that both have is the checkpoint's."""
    own, old = method.encoder.state_dict(), load(checkpoint).module.state_dict()
    return {name: torch.equal(own[name], old[name]) for name in own if name in old}


@pytest.mark.parametrize("kept", [0, 1, DEPTH])
def test_kept_blocks_stay_and_the_others_are_drawn_anew(checkpoint: str, kept: int) -> None:
    same = _same(_method(checkpoint, kept=kept), checkpoint)
    for name, is_same in same.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        assert is_same == (block < kept), name
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= same.keys()


def test_all_is_kept_but_the_norm_that_pooling_replaces(checkpoint: str) -> None:
    method = _method(checkpoint)
    assert all(_same(method, checkpoint).values())
    norm = method.encoder.fc_norm
    assert torch.equal(norm.weight, torch.ones(16))
    assert norm.eps == load(checkpoint).module.norm.eps


def test_blocks_are_drawn_as_in_a_new_encoder(checkpoint: str) -> None:
    drawn, new = _method(checkpoint, kept=0).encoder, build_encoder(ENCODER)
    for (name, ours), (_, theirs) in zip(
        drawn.blocks.named_parameters(), new.blocks.named_parameters(), strict=True
    ):
        if ours.std() > 1e-3:
            # Uniform with one bound: 256 or more draws come within a tenth of it.
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.1)
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0), name


def test_the_class_token_keeps_the_norm_unless_blocks_are_drawn(checkpoint: str) -> None:
    assert all(_same(_method(checkpoint, pool="token"), checkpoint).values())
    assert not _same(_method(checkpoint, pool="token", kept=DEPTH), checkpoint)["norm.weight"]


def test_the_mean_of_the_patch_tokens_is_classified(checkpoint: str) -> None:
    method = _method(checkpoint)
    torch.nn.init.normal_(method.encoder.head.weight)
    old: Any = load(checkpoint).module
    old.norm = torch.nn.Identity()
    with torch.no_grad():
        tokens = old.forward_features(_images())
        pooled = torch.nn.functional.layer_norm(tokens[:, 1:].mean(dim=1), (16,), eps=1e-6)
        expected = pooled @ method.encoder.head.weight.T
        torch.testing.assert_close(method.encoder(_images()), expected)
        torch.testing.assert_close(method.features(_images()), pooled)


def test_the_class_token_is_classified_where_asked(checkpoint: str) -> None:
    method = _method(checkpoint, pool="token")
    torch.nn.init.normal_(method.encoder.head.weight)
    with torch.no_grad():
        token = load(checkpoint).module.forward_features(_images())[:, 0]
        expected = token @ method.encoder.head.weight.T
        torch.testing.assert_close(method.encoder(_images()), expected)


def test_everything_is_trained_also_fixed_positions(checkpoint: str) -> None:
    method = _method(checkpoint, relative_positions=True)
    torch.nn.init.normal_(method.encoder.head.weight)
    loss, terms = method.loss(_batch())
    loss.backward()
    assert all(p.grad is not None and p.requires_grad for p in method.parameters())
    assert "accuracy" in terms


def test_a_new_head_is_undecided(checkpoint: str) -> None:
    assert _method(checkpoint).loss(_batch())[0].item() == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize("fused", [False, True])
def test_relative_positions_start_as_nothing_and_then_move_attention(
    checkpoint: str, fused: bool
) -> None:
    plain, method = _method(checkpoint), _method(checkpoint, relative_positions=True)
    for block in method.encoder.blocks:
        block.attn.fused_attn = fused
    with torch.no_grad():
        expected = plain.features(_images())
        torch.testing.assert_close(method.features(_images()), expected)
        # A bias that is the same for every key cancels in the softmax; one for itself does not.
        table = method.encoder.blocks[0].attn.relative_position_bias_table
        assert table.shape == (7 * 7 + 3, 2)
        table[: 7 * 7] += 100
        table[7 * 7 :] += 100
        torch.testing.assert_close(method.features(_images()), expected)
        table[24] += 100  # the middle of 7 x 7 offsets: no offset at all
    described = vp.wrap(method.encoder, name="tuned", input_size=(1, 8, 8), mean=0.3, std=0.4)
    seen = vp.capture(described, torch.rand(4, 1, 8, 8), what="attention").attention[0]
    weights = torch.as_tensor(seen)[..., 1:, 1:].flatten(0, -3)
    eye = torch.eye(16).expand_as(weights)
    torch.testing.assert_close(weights.float(), eye, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"relative_positions": True}, {"pool": "token"}])
def test_what_is_saved_loads_as_what_was_trained(
    checkpoint: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    method = _method(checkpoint, **changes)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    path = tmp_path / "encoder.safetensors"
    about = {"architecture": method.architecture(ENCODER), "mean": [0.3], "std": [0.4]}
    save_encoder(method.encoder.state_dict(), path, about)
    with torch.no_grad():
        torch.testing.assert_close(load(path).module(_images()), method.encoder(_images()))


def test_what_tensors_do_not_show_of_a_foreign_checkpoint_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=0,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-2), act_layer=torch.nn.ReLU,
        reg_tokens=2, no_embed_class=True, init_values=0.5,
    )  # fmt: skip
    torch.nn.init.normal_(other.get_parameter("reg_token"))
    first = tmp_path / "first.pth"
    torch.save(other.state_dict(), first)
    spec = f"{first},heads=2,eps=0.01,activation=relu,mean=0.5,std=0.5"
    encoder = EncoderConfig(**{**describe(load(spec)), "mean": (0.5,), "std": (0.5,)})
    method = Finetune(FinetuneConfig("finetune", init=spec, kept=1), encoder, CLASSES)
    assert torch.equal(method.encoder.blocks[1].ls1.gamma, torch.ones(16))
    torch.nn.init.normal_(method.encoder.head.weight)
    path = tmp_path / "encoder.safetensors"
    about = {"architecture": method.architecture(encoder), "mean": [0.5], "std": [0.5]}
    save_encoder(method.encoder.state_dict(), path, about)
    with torch.no_grad():
        torch.testing.assert_close(load(path).module(_images()), method.encoder(_images()))


def test_the_recipe_takes_its_encoder_from_the_checkpoint(checkpoint: str) -> None:
    recipe = load_recipe(
        "digits_finetune", overrides={"method.init": checkpoint, "encoder.drop_path": 0.2}
    )
    own = recipe.encoder
    assert (own.width, own.depth, own.heads, own.mean) == (16, DEPTH, 2, (0.3,))
    assert own.drop_path == 0.2
    assert load_recipe(recipe) == recipe
    torch.manual_seed(0)
    blocks = Finetune(recipe.method, own, CLASSES).encoder.blocks  # type: ignore[arg-type]
    assert blocks[DEPTH - 1].drop_path1.rate == pytest.approx(0.2)


def test_another_size_resizes_positions(checkpoint: str) -> None:
    recipe = load_recipe(
        "digits_finetune", overrides={"method.init": checkpoint, "encoder.image_size": 12}
    )
    assert recipe.encoder.grid == 6
    torch.manual_seed(0)
    method = Finetune(recipe.method, recipe.encoder, CLASSES)  # type: ignore[arg-type]
    assert method.encoder.pos_embed.shape == (1, 37, 16)
    assert load_plain(f"{checkpoint},size=12", 8).input_size == (1, 12, 12)


def test_a_fine_tuned_encoder_can_be_fine_tuned_again(checkpoint: str, tmp_path: Path) -> None:
    method = _method(checkpoint)
    path = tmp_path / "encoder.safetensors"
    about = {"architecture": method.architecture(ENCODER), "mean": [0.3], "std": [0.4]}
    save_encoder(method.encoder.state_dict(), path, about)
    for pool in ("mean", "token"):
        again = _method(str(path), pool=pool).encoder
        assert again(_images()).shape == (6, CLASSES)
        assert isinstance(again.norm, torch.nn.LayerNorm) == (pool == "token")


def test_layer_decay_groups_are_timms(checkpoint: str) -> None:
    method = _method(checkpoint, relative_positions=True)
    settings = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "warmup_epochs": 1.0}
    config = OptimizerConfig(**settings, layer_decay=0.85)  # type: ignore[arg-type]
    ours = build_optimizer(method, config, DEPTH).param_groups
    beit = create_model(
        "beit_base_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=DEPTH,
        num_heads=2, num_classes=CLASSES, use_abs_pos_emb=True, init_values=None,
    )  # fmt: skip
    theirs = param_groups_layer_decay(beit, 0.05, beit.no_weight_decay(), layer_decay=0.85)
    own = dict(method.encoder.named_parameters())
    scale = {id(p): (g["scale"], g["weight_decay"]) for g in ours for p in g["params"]}
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    compared = 0
    for name, parameter in beit.named_parameters():
        # BEiT has the biases of queries and values apart; its final norm counts as we have it.
        if name in own and not name.startswith("fc_norm"):
            assert scale[id(own[name])] == pytest.approx(expected[id(parameter)]), name
            compared += 1
    assert compared >= 12 * DEPTH
    assert scale[id(own["fc_norm.weight"])] == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teachers_logits_by_hand(checkpoint: str, tmp_path: Path, kind: Any) -> None:
    teacher = _method(checkpoint, pool="token").encoder
    torch.nn.init.normal_(teacher.head.weight, std=0.3)
    path = tmp_path / "teacher.safetensors"
    about = {"architecture": ENCODER.architecture(CLASSES), "mean": [0.3], "std": [0.4]}
    save_encoder(teacher.state_dict(), path, about)
    config = DistillConfig(str(path), logits=0.5, logits_kind=kind, temperature=2.0)
    method = Distilled(config, _method(checkpoint), ENCODER, load_teacher(config, ENCODER))
    torch.nn.init.normal_(method.encoder.head.weight, std=0.3)
    loss, terms = method.loss(_batch())
    with torch.no_grad():
        own, theirs = method.encoder(_images()), teacher(_images())
        labels = torch.nn.functional.cross_entropy(own, _batch().labels)
        if kind == "hard":
            said = torch.nn.functional.cross_entropy(own, theirs.argmax(dim=1))
        else:
            p, q = (theirs / 2).softmax(dim=1), (own / 2).softmax(dim=1)
            said = 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert terms["distill_logits"].item() == pytest.approx(said.item(), rel=1e-4)
    assert loss.item() == pytest.approx(0.5 * (labels + said).item(), rel=1e-4)
    assert method.init_sha256 == load(checkpoint).sha256
    assert method.architecture(ENCODER)["global_pool"] == "avg"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ""}, "method.init must name the checkpoint"),
        ({"kept": -1}, "method.kept must be at least 0"),
        ({"kept": DEPTH + 1}, f"method.kept is {DEPTH + 1}, but '.*' has {DEPTH} blocks"),
        ({"mixup": -1.0}, "method.mixup"),
    ],
)
def test_what_cannot_be_followed_is_named(
    checkpoint: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Finetune(FinetuneConfig(**{"name": "finetune", "init": checkpoint} | changes), ENCODER, 5)


def test_a_recipe_without_a_checkpoint_says_what_to_do() -> None:
    with pytest.raises(RecipeError, match="vitprobe evaluate finetune SPEC does"):
        load_recipe("finetune_improved")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("init:deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("init:vit_tiny_r_s16_p8_224", "its patches pass through a HybridEmbed first"),
        ("init:vit_tiny_patch16_224,size=32x64", "32x64 in patches of 16x16, not squares"),
    ],
)
def test_other_models_are_refused_with_the_reason(spec: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot be fine-tuned: .*{reason}"):
        load_plain(spec)


def test_an_encoder_other_than_the_checkpoints_is_refused(checkpoint: str) -> None:
    with pytest.raises(RecipeError, match=r"encoder.heads is 4, but that of '.*' is 2"):
        Finetune(FinetuneConfig("finetune", init=checkpoint), replace(ENCODER, heads=4), CLASSES)
