"""Places found by experiment against those that a model's own arithmetic gives its tokens."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitprobe.measures.chunks import grid_positions
from vitprobe.models.locate import Locating
from vitprobe.models.places import Ramps

SIZE = (3, 64, 64)


def perturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.eval().requires_grad_(False)


def sites_of(module: nn.Module, size=SIZE):
    ramps = Ramps()
    with Locating(module, ramps, size) as locating, torch.no_grad():
        module(ramps.images(size))
    return locating.sites()


def in_windows(lattice: Tensor, window: int, shift: int = 0) -> Tensor:
    """(windows, tokens, ...) of (rows, columns, ...), rolled and cut as Swin does."""
    rows, columns = lattice.shape[:2]
    rolled = lattice.roll((-shift, -shift), (0, 1))
    cut = rolled.unflatten(1, (columns // window, window)).unflatten(0, (rows // window, window))
    return cut.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def lattice(side: int, size: int = 64) -> Tensor:
    return grid_positions((side, side), size / side).reshape(side, side, 2)


def close(site, query: Tensor, key: Tensor | None = None) -> None:
    assert site.no_distance == ""
    torch.testing.assert_close(site.query_xy, query)
    torch.testing.assert_close(site.key_xy, query if key is None else key)


class Own(nn.Module):
    """Attention as somebody may write it: class token last, tokens in an order of their own."""

    def __init__(self, attend, order: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.qkv = nn.Linear(24, 72)
        self.head = nn.Linear(24, 10)
        self.attend, self.order = attend, order

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).mT
        if self.order is not None:
            tokens = tokens[:, self.order]
        tokens = torch.cat([tokens, self.cls.expand(len(images), -1, -1)], 1)
        tokens = tokens + self.attend(*self.qkv(tokens).chunk(3, -1))
        return self.head(tokens[:, -1]).softmax(-1)


def heads_of(tokens: Tensor, heads: int = 3) -> Tensor:
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def fused(q, k, v):
    q, k, v = map(heads_of, (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def explicit(q, k, v):
    q, k, v = map(heads_of, (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


def flat(q, k, v):
    """Heads beside images on one axis."""
    q, k, v = (heads_of(each).flatten(0, 1) for each in (q, k, v))
    rows = (q @ k.mT).softmax(-1)
    return (rows @ v).unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)


def keys_first(q, k, v):
    q, k, v = map(heads_of, (q, k, v))
    rows = (k @ q.mT).softmax(2)
    return (rows.mT @ v).transpose(1, 2).flatten(2)


def summed(q, k, v):
    q, k, v = (each.unflatten(-1, (3, -1)) for each in (q, k, v))
    rows = torch.einsum("n i h d, n j h d -> n h i j", q, k).softmax(-1)
    return torch.einsum("nhij,njhd->nihd", rows, v).flatten(2)


@pytest.mark.parametrize("attend", [fused, explicit, flat, keys_first, summed])
def test_tokens_of_any_order_and_attention_of_any_spelling(attend):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    module = Own(attend, order).eval()
    module.num_heads = 3
    (site,) = sites_of(module)
    assert (site.path, site.heads, site.windows) == ("", 3, 1)
    assert (site.queries, site.query_prefix, site.key_prefix) == (65, 1, 1)
    assert site.query_order.tolist() == site.key_order.tolist() == [64, *range(64)]
    close(site, lattice(8).reshape(1, 64, 2)[:, order])
    assert site.whole
    # Two softmaxes run in this module; the classifier's is no attention.
    assert site.calls == 2


def test_heads_are_told_from_windows_though_the_model_does_not_say():
    (site,) = sites_of(Own(fused).eval())
    assert (site.heads, site.windows) == (3, 1)

    def by_row(q, k, v):
        cut = [each[:, :64].unflatten(1, (8, 8)).unflatten(-1, (3, -1)) for each in (q, k, v)]
        q, k, v = (each.permute(0, 3, 1, 2, 4) for each in cut)
        mixed = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1, 4)
        return F.pad(mixed.flatten(3).flatten(1, 2), (0, 0, 0, 1))

    (site,) = sites_of(Own(by_row).eval())
    assert site.axes == (("windows", 1), ("heads", 3), ("windows", 8))
    close(site, lattice(8))


def test_softmaxes_that_are_no_attention():
    gates = {
        "classes": lambda q, k, v: v * q.mean(1, keepdim=True).softmax(-1),
        "two branches": lambda q, k, v: (
            torch.stack([q, k], 1).mean(2).softmax(1)[:, :, None] * torch.stack([v, v], 1)
        ).sum(1),
        "experts": lambda q, k, v: v * q[..., :4].softmax(-1).sum(-1, keepdim=True),
        "positions alone": lambda q, k, v: torch.ones(len(q), 65, 65).softmax(-1) @ v,
    }
    for name, gate in gates.items():
        assert sites_of(Own(gate).eval()) == (), name


def test_a_single_query_and_channels_have_no_distance():
    def of_class(q, k, v):
        mixed = F.scaled_dot_product_attention(*map(heads_of, (q[:, -1:], k, v)))
        return mixed.transpose(1, 2).flatten(2)

    def pooling(q, k, v):
        q = torch.ones(len(k), 3, 1, 8)
        pooled = F.scaled_dot_product_attention(q, heads_of(k[:, :64]), heads_of(v[:, :64]))
        return pooled.transpose(1, 2).flatten(2)

    def channels(q, k, v):
        rows = (heads_of(q).mT @ heads_of(k)).softmax(-1)
        return (heads_of(v) @ rows.mT).transpose(1, 2).flatten(2)

    def fused_channels(q, k, v):
        q, k, v = (heads_of(each).mT for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).mT.transpose(1, 2).flatten(2)

    for attend, why, over, shape, prefix in (
        (of_class, "its only query is the class token", "tokens", (1, 65), 1),
        (pooling, "its only query is no patch", "tokens", (1, 64), 0),
        (channels, "its rows are over channels", "channels", (8, 8), 0),
        (fused_channels, "its rows are over channels", "channels", (8, 8), 0),
    ):
        module = Own(attend).eval()
        module.num_heads = 3
        (site,) = sites_of(module)
        assert (site.no_distance, site.over) == (why, over)
        assert (site.queries, site.keys, site.heads) == (*shape, 3)
        assert site.key_prefix == prefix
        assert site.query_xy is None
        assert site.key_xy is None
        assert not site.whole


def test_without_ramps_attention_is_found_and_not_located():
    module = Own(fused).eval()
    module.num_heads = 3
    for ramps in (None, Ramps(0)):
        with Locating(module, ramps, SIZE) as locating, torch.no_grad():
            output = module(torch.ones(1, *SIZE))
        assert torch.equal(output, module(torch.ones(1, *SIZE)))
        (site,) = locating.sites()
        assert (site.heads, site.queries, site.keys) == (3, 65, 65)
        assert site.no_distance == "the model is too large for its tokens to be located"


def test_swin_shifts_its_windows_and_masks_what_they_join():
    module = perturbed(
        timm.models.SwinTransformer(
            img_size=64, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
        )
    )
    sites = sites_of(module)
    assert [(site.heads, site.windows, site.queries) for site in sites] == [
        (2, 16, 16), (2, 16, 16), (4, 4, 16), (4, 4, 16),
    ]  # fmt: skip
    for site, side, shift in zip(sites, (16, 16, 8, 8), (0, 2, 0, 2), strict=True):
        close(site, in_windows(lattice(side), 4, shift))
        if not shift:
            assert site.allowed is None
            continue
        # Neighbours may attend to each other only where they are neighbours in the image.
        region = torch.bucketize(torch.arange(side), torch.tensor([side - 4, side - 2]), right=True)
        label = in_windows((3 * region[:, None] + region).roll((shift, shift), (0, 1)), 4, shift)
        assert torch.equal(site.allowed, label[:, :, None] == label[:, None])


def test_pyramid_attends_to_pooled_keys():
    module = perturbed(
        timm.models.PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1),
            embed_dims=(16, 32, 48, 64),
            num_heads=(1, 2, 3, 4),
            sr_ratios=(4, 2, 1, 1),
        )
    )
    sites = sites_of(module)
    assert [(site.heads, site.queries, site.keys) for site in sites[:3]] == [
        (1, 256, 16), (2, 64, 16), (3, 16, 16),
    ]  # fmt: skip
    for site, query, key in zip(sites, (16, 8, 4), (4, 4, 4), strict=False):
        close(site, lattice(query).reshape(1, -1, 2), lattice(key).reshape(1, -1, 2))
        assert site.whole == (query == key)


def test_hiera_unrolls_its_tokens():
    module = perturbed(
        timm.models.Hiera(
            img_size=64, embed_dim=24, num_heads=1, stages=(1, 1), q_pool=1, mask_unit_size=(4, 4),
            mask_unit_attn=(True, False),
        )
    )  # fmt: skip
    first, second = sites_of(module)
    assert (first.windows, first.queries) == (16, 16)
    assert second.windows in (1, 16)
    # Hiera's windows are the inner axis of its own order.
    truth = module.unroll(lattice(16).reshape(1, 256, 2)).reshape(16, 16, 2).transpose(0, 1)
    close(first, truth)
    assert second.query_xy is not None


def test_grid_attention_is_spread_over_the_image():
    module = perturbed(
        timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1,), embed_dim=(32,))
    )
    block, grid = sites_of(module)
    side = int((block.windows * block.queries) ** 0.5)
    window = int(block.queries**0.5)
    close(block, in_windows(lattice(side), window))
    step = side // window
    spread = torch.stack(
        [lattice(side)[i::step, j::step].flatten(0, 1) for i in range(step) for j in range(step)]
    )
    close(grid, spread)


@pytest.mark.parametrize(
    ("name", "options", "note"),
    [
        ("cait_xxs24_224", {"depth": 1}, "Talking heads"),
        ("convit_tiny", {"depth": 1, "local_up_to_layer": 1}, "Gated positional"),
        ("vit_dwee_patch16_reg1_gap_256", {"depth": 1}, "Differential"),
    ],
)
def test_what_a_reader_must_know_is_noted(name, options, note):
    module = perturbed(timm.create_model(name, img_size=128, num_classes=0, **options))
    sites = sites_of(module, (3, 128, 128))
    assert sites[0].note.startswith(note)
    close(sites[0], lattice(8, 128).reshape(1, 64, 2))
    if note == "Differential":
        assert len(sites) == sites[0].calls == 2


def test_volo_predicts_a_window_from_its_middle_which_gives_no_places():
    module = perturbed(
        timm.models.VOLO(
            layers=(1, 1),
            img_size=64,
            embed_dims=(24, 48),
            num_heads=(2, 3),
            post_layers=None,
            mlp_ratio=2,
            outlook_attention=(True, False),
            downsamples=(True, False),
        )
    )
    outlook, attention = sites_of(module)[:2]
    assert outlook.no_distance == "several of its queries have the same place"
    close(attention, lattice(4).reshape(1, 16, 2))
