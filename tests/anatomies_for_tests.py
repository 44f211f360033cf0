"""Hand-made anatomies: attention layers of every kind, without a model that would have them."""

from __future__ import annotations

import torch
from torch import nn

from vitprobe.measures.attention import grid_positions
from vitprobe.models.anatomy import Anatomy, Layout, Site
from vitprobe.models.model import Model

GRID, PATCH = (4, 4), 8.0


def global_site(prefix=0, heads=2):
    places = grid_positions(GRID, PATCH)[None]
    tokens = prefix + 16
    sizes = {"queries": tokens, "keys": tokens, "query_prefix": prefix, "key_prefix": prefix}
    return Site("blocks.0", 0, heads, **sizes, query_xy=places, key_xy=places)


def window_site(heads=2, allowed=None):
    """Four windows of 2 x 2 patches."""
    places = grid_positions(GRID, PATCH).view(2, 2, 2, 2, 2).transpose(1, 2).reshape(4, 4, 2)
    return Site(
        "blocks.0", 0, heads, 4, 4, windows=4, query_xy=places, key_xy=places, allowed=allowed
    )


def pooled_site(heads=2):
    """16 queries, 4 keys that stand for 2 x 2 patches each."""
    queries, keys = grid_positions(GRID, PATCH)[None], grid_positions((2, 2), 2 * PATCH)[None]
    return Site("blocks.0", 0, heads, 16, 4, query_xy=queries, key_xy=keys)


def class_site(heads=2):
    why = "its only query is the class token"
    return Site("blocks.0", 0, heads, 1, 17, key_prefix=1, no_distance=why)


def channel_site(heads=2, width=6):
    why = "it attends over channels"
    return Site("blocks.0", 0, heads, width, width, over="channels", no_distance=why)


def anatomy(*sites, no_attention="", class_token=False, prefix=0):
    layout = Layout("tokens", 8, prefix, 16, GRID, (PATCH, PATCH))
    blocks = tuple(f"blocks.{i}" for i in range(max(1, len(sites))))
    layouts = (layout,) * (len(blocks) + 1)
    return Anatomy(
        blocks=blocks,
        norms=(None,) * len(blocks),
        final_norm=None,
        final_norm_pooled=False,
        class_token=class_token,
        pre_norm=False,
        residual=layouts,
        normed=(),
        sites=sites,
        no_attention=no_attention,
    )


def model(name, *sites, **more):
    """A model that is never run."""
    return Model(
        name=name,
        module=nn.Identity(),
        spec="module",
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        facts={},
        anatomy=anatomy(*sites, **more),
        report=None,
        sha256=None,
        training=None,
    )


def uniform_maps(site, images=3):
    """Uniform attention of all windows of a site: (images, heads, queries, keys)."""
    return torch.full((images, site.heads, site.queries, site.keys), 1 / site.keys)
