from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError
from vitprobe.models import Anatomy, wrap
from vitprobe.models.discovery import find_anatomy
from vitprobe.models.survey import survey


class Block(nn.Module):
    """A pre-norm block of attention written out, without a fused kernel."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.to_qkv(self.before(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        rows = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        tokens = tokens + self.out((rows @ value).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.between(tokens))


class Encoder(nn.Module):
    """Somebody's own encoder: 32 x 48 pixels, patches of 8 and the class token *last*."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.position = nn.Parameter(torch.randn(1, 25, 24))
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.last = nn.LayerNorm(24)

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        return torch.cat([patches, self.cls.expand(len(images), -1, -1)], 1) + self.position

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.last(tokens)[:, -1]


SIZE = (3, 32, 48)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def test_ones_own_encoder() -> None:
    anatomy = wrap(seeded(Encoder), name="mine", input_size=SIZE).anatomy
    assert anatomy.blocks == ("layers.0", "layers.1", "layers.2")
    assert anatomy.norms == ("layers.0.before", "layers.1.before", "layers.2.before")
    assert anatomy.final_norm == "last"
    assert not anatomy.final_norm_pooled
    assert anatomy.class_token
    assert set(anatomy.residual) == set(anatomy.normed)
    (layout,) = set(anatomy.residual)
    assert (layout.prefix_tokens, layout.grid, layout.patch_size) == (1, (4, 6), (8.0, 8.0))
    assert layout.order == (24, *range(24))
    assert anatomy.attentions == anatomy.blocks
    assert anatomy.heads == (3, 3, 3)
    assert [site.queries for site in anatomy.sites] == [25] * 3


def test_a_survey_leaves_nothing_behind() -> None:
    module = seeded(Encoder)
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        before = module(images)
    survey(module, SIZE)
    with torch.no_grad():
        assert torch.equal(module(images), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_survey_agrees_with_the_quick_way() -> None:
    module = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3).eval()
    quick, slow = find_anatomy(module, (3, 64, 64)), survey(module, (3, 64, 64))
    for name in ("blocks", "norms", "final_norm", "residual", "normed", "class_token", "heads"):
        assert getattr(quick, name) == getattr(slow, name), name
    for one, other in zip(quick.sites, slow.sites, strict=True):
        assert (one.path, one.queries, one.key_prefix) == (other.path, other.queries, 2)
        assert torch.equal(one.query_xy, other.query_xy)
        assert torch.equal(one.key_xy, other.key_xy)


def test_blocks_may_come_with_the_tokens_first() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 24, 8, 8)
            layer = nn.TransformerEncoderLayer(24, 3, 48, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.encoder(self.embed(images).flatten(2).permute(2, 0, 1)).mean(0)

    anatomy = wrap(seeded(Sequence), name="mine", input_size=SIZE).anatomy
    assert anatomy.blocks == ("encoder.layers.0", "encoder.layers.1")
    assert anatomy.norms == ("encoder.layers.0.norm1", "encoder.layers.1.norm1")
    assert {layout.form for layout in anatomy.residual} == {"sequence"}
    assert {layout.grid for layout in anatomy.normed} == {(4, 6)}
    assert anatomy.attentions == ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")


def test_branches_that_the_parent_adds() -> None:
    """Attention and MLP in one list a layer, as in lucidrains' vit-pytorch."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(24)
            self.attention = nn.MultiheadAttention(24, 3, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            tokens = self.norm(tokens)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    class Own(Encoder):
        def __init__(self) -> None:
            super().__init__(depth=0)
            for _ in range(2):
                mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24))
                self.layers.append(nn.ModuleList([Attention(), mlp]))

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.tokens(images)
            for attention, mlp in self.layers:
                tokens = tokens + attention(tokens)
                tokens = tokens + mlp(tokens)
            return self.last(tokens)

    anatomy = wrap(seeded(Own), name="mine", input_size=SIZE).anatomy
    assert anatomy.branches
    assert anatomy.blocks == ("layers.0.0", "layers.1.0")
    assert anatomy.norms == ("layers.0.0.norm", "layers.1.0.norm")
    assert anatomy.final_norm == "last"
    assert len(anatomy.sites) == 2


def test_a_post_norm_encoder_has_residual_layers_only() -> None:
    class PostNorm(Block):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.before(tokens + self.to_qkv(tokens)[..., :24].softmax(1))

    anatomy = wrap(seeded(lambda: Encoder(PostNorm)), name="mine", input_size=SIZE).anatomy
    assert not anatomy.pre_norm
    assert anatomy.normed == ()
    assert anatomy.norms == (None,) * 3


def test_heads_that_lie_in_a_list_are_no_blocks() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(24, 8) for _ in range(3))

        def forward(self, tokens: Tensor) -> Tensor:
            rows = (self.query(tokens) @ self.key(tokens).mT).softmax(-1)
            return rows @ self.value(tokens)

    class ManyHeads(Block):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(Head() for _ in range(3))

        def forward(self, tokens: Tensor) -> Tensor:
            normed = self.before(tokens)
            tokens = tokens + self.out(torch.cat([head(normed) for head in self.heads], -1))
            return tokens + self.mlp(self.between(tokens))

    anatomy = wrap(seeded(lambda: Encoder(ManyHeads)), name="mine", input_size=SIZE).anatomy
    assert anatomy.blocks == ("layers.0", "layers.1", "layers.2")
    assert anatomy.normed


def test_blocks_that_read_all_before_them_are_all_blocks() -> None:
    anatomy = wrap(
        timm.create_model("densenet121", block_config=(2, 3), growth_rate=8),
        name="dense",
        input_size=(3, 64, 64),
    ).anatomy
    assert len(anatomy.blocks) == 5
    assert [layout.width for layout in anatomy.residual[1:]] == [8] * 5


def test_branches_beside_the_main_path_are_no_blocks() -> None:
    class Beside(Encoder):
        def __init__(self) -> None:
            super().__init__(depth=2)
            self.side = nn.ModuleList([Block()])

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.tokens(images)
            context = self.side[0](tokens).mean(1, keepdim=True)
            for layer in self.layers:
                tokens = layer(tokens)
            return self.last(tokens + context)

    anatomy = wrap(seeded(Beside), name="mine", input_size=SIZE).anatomy
    assert anatomy.blocks == ("layers.0", "layers.1")


def test_blocks_of_class_attention_are_no_layers() -> None:
    anatomy = small("cait_xxs24_224", img_size=64, depth=2)
    assert anatomy.blocks == ("blocks.0", "blocks.1")
    assert anatomy.final_norm == "norm"
    assert [layout.prefix_tokens for layout in anatomy.normed] == [0, 0, 1]
    assert [site.queries for site in anatomy.sites] == [16, 16, 1, 1]
    assert anatomy.sites[-1].no_distance == "its only query is the class token"
    assert anatomy.class_token


def test_a_final_norm_of_the_class_token_is_applied_after_pooling() -> None:
    anatomy = small("pit_ti_224", img_size=64)
    assert anatomy.final_norm == "norm"
    assert anatomy.final_norm_pooled


def small(name: str, size: int = 64, **options: object) -> Anatomy:
    """A narrow random model of timm, surveyed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False, **options).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    return find_anatomy(module, (3, size, size))


def test_stages_with_windows() -> None:
    anatomy = small(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
    )
    assert [layout.grid for layout in anatomy.residual] == [(16, 16)] * 3 + [(8, 8)] * 2
    assert [layout.width for layout in anatomy.normed] == [24, 24, 48, 48, 48]
    assert {layout.form for layout in anatomy.residual} == {"grid"}
    assert [site.windows for site in anatomy.sites] == [16, 16, 4, 4]
    assert anatomy.heads == (2, 2, 4, 4)
    assert not anatomy.plain


def test_the_order_of_tokens_is_found() -> None:
    """Hiera keeps its tokens in the order of its mask units, which is not row by row."""
    anatomy = small("hiera_tiny_224", img_size=64, embed_dim=16, stages=(1, 1, 2, 1))
    grids = [layout.grid for layout in anatomy.residual]
    assert grids == [(16, 16), (16, 16), (8, 8), (4, 4), (4, 4), (2, 2)]
    order = anatomy.residual[0].order
    assert order is not None
    assert sorted(order) == list(range(256))
    # Of a mask unit of 8 x 8 tokens, the first two lie beside each other in its first 4 x 4 corner.
    rows = [order[row * 16 : row * 16 + 16] for row in range(16)]
    places = {token: (y, x) for y, row in enumerate(rows) for x, token in enumerate(row)}
    assert places[0] == (0, 0)
    assert max(abs(places[0][axis] - places[1][axis]) for axis in (0, 1)) > 1


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet10t", {}, "it is convolutional"),
        ("mixer_s32_224", {"img_size": 64}, "it mixes its tokens without a softm"),
        ("swiftformer_xs", {}, r"its attention \(\w+\) is computed without"),
    ],
)
def test_models_without_attention(name: str, options: dict[str, object], reason: str) -> None:
    anatomy = small(name, **options)
    assert anatomy.sites == ()
    assert re.match(reason, anatomy.no_attention)
    assert len(anatomy.residual) == len(anatomy.blocks) + 1
    assert all(layout.grid is not None for layout in anatomy.residual)


def test_layers_of_a_convolutional_network() -> None:
    anatomy = small("resnet18")
    assert anatomy.blocks[0] == "layer1.0"
    assert anatomy.blocks[-1] == "layer4.1"
    assert [layout.width for layout in anatomy.residual] == [64] * 3 + [128] * 2 + [256] * 2 + [
        512
    ] * 2
    grids = [layout.grid for layout in anatomy.residual if layout.grid]
    assert grids[0] == (16, 16)
    assert all(before >= after for before, after in pairwise(grids))
    assert {layout.form for layout in anatomy.residual} == {"maps"}


def test_the_user_may_name_the_blocks() -> None:
    module = timm.create_model("resnet18").eval()
    anatomy = wrap(module, name="r", input_size=(3, 64, 64), blocks=["layer1", "layer3"]).anatomy
    assert anatomy.blocks == ("layer1", "layer3")
    assert [layout.width for layout in anatomy.residual] == [64, 64, 256]
    with pytest.raises(CaptureError, match="has no module 'layer9'"):
        wrap(module, name="r", input_size=(3, 64, 64), blocks=["layer9"])
    with pytest.raises(CaptureError, match=r"'fc2' .*runs 2 times"):
        wrap(_Twice(), name="t", input_size=(3, 8, 8), blocks=["fc2"])


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(self.fc2(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_surveyed_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    with pytest.raises(CaptureError, match=r"Sequential has no list of blocks .*blocks=\["):
        wrap(plain, name="mine", input_size=(3, 8, 8))
    with pytest.raises(CaptureError, match="TorchScript"):
        wrap(torch.jit.trace(plain, torch.zeros(1, 3, 8, 8)), name="mine", input_size=(3, 8, 8))
    with pytest.raises(CaptureError, match="Sequential does not name its input size"):
        wrap(plain, name="mine")

    class Packed(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            tokens = self.tokens(images).flatten(0, 1)[None]
            for layer in self.layers:
                tokens = layer(tokens)
            return self.last(tokens)

    with pytest.raises(CaptureError, match=r"handles \(1, 25, 24\) for one image and .* not known"):
        wrap(seeded(Packed), name="packed", input_size=SIZE)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model = seeded(Encoder)

        def forward(self, text: Tensor, images: Tensor) -> Tensor:
            return self.vision_model(images)

    with pytest.raises(CaptureError, match=r"3x32x48 .*needs more than an image, wrap its .vision"):
        wrap(Both(), name="both", input_size=SIZE)


def test_a_compiled_module_is_unwrapped() -> None:
    module = seeded(Encoder)
    model = wrap(torch.compile(module, backend="eager"), name="mine", input_size=SIZE)
    assert model.module is module
    assert model.anatomy.blocks[0] == "layers.0"


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_register_tokens=2,
    )
    model = wrap(
        seeded(lambda: transformers.Dinov2WithRegistersModel(config)),
        name="registers",
        input_size=(3, 32, 32),
    )
    anatomy = model.anatomy
    assert anatomy.residual[0].prefix_tokens == 3
    assert anatomy.grid == (4, 4)
    assert anatomy.class_token
    assert anatomy.final_norm == "layernorm"
    assert len(anatomy.sites) == 2
    assert model.facts["mean"].evidence == "assumed"
    assert wrap(model.module, name="again").input_size == (3, 32, 32)
