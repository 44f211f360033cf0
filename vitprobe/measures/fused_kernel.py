"""The Triton kernel of `fused.rows`; only that function imports this file."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Powers of 2 come with fewer instructions than those of e."""


@triton.jit
def _logits(
    loaded, query, key, query_row, key_row, query_depth, key_depth,
    mask, mask_row, mask_key, at, at_query, scale, queries, last,
    depth: tl.constexpr, span: tl.constexpr, masked: tl.constexpr, edge: tl.constexpr,
):  # fmt: skip
    """(queries, keys) of a tile: what the softmax is given, -inf behind the last key.

    `loaded` is the tile's whole queries if one span holds their depth. Only an `edge` has keys
    behind the last.
    """
    here = at < last
    places = tl.arange(0, span)
    product = tl.zeros((at_query.shape[0], at.shape[0]), tl.float32)
    for first in tl.static_range(0, depth, span):
        inner = first + places
        row = loaded
        if span < depth:
            row = tl.load(
                query + at_query[:, None] * query_row + inner[None] * query_depth,
                mask=(at_query[:, None] < queries) & (inner[None] < depth),
                other=0.0,
            )
        pointers = key + at[None] * key_row + inner[:, None] * key_depth
        if edge:
            column = tl.load(pointers, mask=here[None] & (inner[:, None] < depth), other=0.0)
        elif depth % span:
            column = tl.load(pointers, mask=inner[:, None] < depth, other=0.0)
        else:
            column = tl.load(pointers)
        product = tl.dot(row, column, product, input_precision="ieee")
    logits = product * scale
    if masked != "none":
        pointers = mask + at_query[:, None] * mask_row + at[None] * mask_key
        given = tl.load(pointers, mask=(at_query[:, None] < queries) & here[None], other=0)
        if masked == "added":
            logits += given.to(tl.float32)
        else:
            logits = tl.where(given != 0, logits, -float("inf"))
    if edge:
        logits = tl.where(here[None], logits, -float("inf"))
    return logits


@triton.jit
def _weights(logits, top):
    """Logits less their maximum so far, their exponentials, that maximum and how far it rose.

    While no key may be read the maximum is -inf, which is taken for 0. The product of a weight of 0
    and its difference is 0, not nan.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    known = tl.where(higher == -float("inf"), 0.0, higher)
    less = logits - known[:, None]
    rise = tl.where(top == -float("inf"), 0.0, known - top)
    return tl.maximum(less, -200.0), tl.exp2(less * LOG2_E), higher, rise


@triton.jit
def _add_patches(
    top, total, logits_sum, distance_sum, first, query_x, query_y, key_xy, key_places,
    loaded, query, key, query_row, key_row, query_depth, key_depth,
    mask, mask_row, mask_key, at_query, scale, queries, patches,
    depth: tl.constexpr, span: tl.constexpr, masked: tl.constexpr, places: tl.constexpr,
    tile_keys: tl.constexpr, edge: tl.constexpr,
):  # fmt: skip
    """The sums over patch keys with those of one tile."""
    at = first + tl.arange(0, tile_keys)
    logits = _logits(
        loaded, query, key, query_row, key_row, query_depth, key_depth,
        mask, mask_row, mask_key, at, at_query, scale, queries, patches, depth, span, masked, edge,
    )  # fmt: skip
    less, weight, top, rise = _weights(logits, top)
    rescale = tl.exp(-rise)
    logits_sum = (logits_sum - rise * total) * rescale + tl.sum(weight * less, 1)
    total = total * rescale + tl.sum(weight, 1)
    if places:
        if edge:
            x = tl.load(key_xy + at, mask=at < patches, other=0.0)
            y = tl.load(key_xy + key_places + at, mask=at < patches, other=0.0)
        else:
            x = tl.load(key_xy + at)
            y = tl.load(key_xy + key_places + at)
        x = query_x[:, None] - x[None]
        y = query_y[:, None] - y[None]
        distance_sum = distance_sum * rescale + tl.sum(weight * tl.sqrt(x * x + y * y), 1)
    return top, total, logits_sum, distance_sum


@triton.jit
def kernel(
    query, key, mask, query_xy, key_xy, entropy, distance, sink, scale,
    query_image, query_head, query_row, query_depth,
    key_image, key_head, key_row, key_depth,
    mask_image, mask_head, mask_row, mask_key,
    heads, queries, keys, key_prefix, query_places, key_places,
    depth: tl.constexpr, masked: tl.constexpr, places: tl.constexpr,
    tile_queries: tl.constexpr, tile_keys: tl.constexpr, tile_prefix: tl.constexpr,
    span: tl.constexpr,
):  # fmt: skip
    """One program: some queries of one head of one image, and all their keys."""
    tiles = tl.cdiv(queries, tile_queries)
    map_ = tl.program_id(0) // tiles
    image = (map_ // heads).to(tl.int64)
    head = (map_ % heads).to(tl.int64)
    query += image * query_image + head * query_head
    key += image * key_image + head * key_head
    mask += image * mask_image + head * mask_head
    at_query = tl.program_id(0) % tiles * tile_queries + tl.arange(0, tile_queries)
    inner = tl.arange(0, span)
    loaded = tl.load(
        query + at_query[:, None] * query_row + inner[None] * query_depth,
        mask=(at_query[:, None] < queries) & (inner[None] < depth),
        other=0.0,
    )

    # Prefix keys and patch keys have a maximum and a sum each: beside a sink that takes all of the
    # mass, what is left for the patches would underflow.
    prefix_top = tl.full((tile_queries,), -float("inf"), tl.float32)
    prefix_sum = tl.zeros((tile_queries,), tl.float32)
    for first in range(0, key_prefix, tile_prefix):
        logits = _logits(
            loaded, query, key, query_row, key_row, query_depth, key_depth,
            mask, mask_row, mask_key, first + tl.arange(0, tile_prefix), at_query, scale, queries,
            key_prefix, depth, span, masked, True,
        )  # fmt: skip
        _, weight, prefix_top, rise = _weights(logits, prefix_top)
        prefix_sum = prefix_sum * tl.exp(-rise) + tl.sum(weight, 1)

    top = tl.full((tile_queries,), -float("inf"), tl.float32)
    total = tl.zeros((tile_queries,), tl.float32)
    logits_sum = tl.zeros((tile_queries,), tl.float32)
    distance_sum = tl.zeros((tile_queries,), tl.float32)
    query_x = total
    query_y = total
    if places:
        query_x = tl.load(query_xy + at_query, mask=at_query < queries, other=0.0)
        query_y = tl.load(query_xy + query_places + at_query, mask=at_query < queries, other=0.0)
    patches = keys - key_prefix
    key += key_prefix * key_row
    mask += key_prefix * mask_key
    whole = patches // tile_keys * tile_keys
    for first in range(0, whole, tile_keys):
        top, total, logits_sum, distance_sum = _add_patches(
            top, total, logits_sum, distance_sum, first, query_x, query_y, key_xy, key_places,
            loaded, query, key, query_row, key_row, query_depth, key_depth,
            mask, mask_row, mask_key, at_query, scale, queries, patches,
            depth, span, masked, places, tile_keys, False,
        )  # fmt: skip
    if whole < patches:
        top, total, logits_sum, distance_sum = _add_patches(
            top, total, logits_sum, distance_sum, whole, query_x, query_y, key_xy, key_places,
            loaded, query, key, query_row, key_row, query_depth, key_depth,
            mask, mask_row, mask_key, at_query, scale, queries, patches,
            depth, span, masked, places, tile_keys, True,
        )  # fmt: skip

    # Where nothing may be read the sums are 0, and what they are divided by no matter.
    written = map_.to(tl.int64) * queries + at_query
    inside = at_query < queries
    some = total != 0
    divisor = tl.where(some, total, 1.0)
    value = tl.log(divisor) - logits_sum / divisor
    tl.store(entropy + written, tl.where(some, value, float("nan")), mask=inside)
    if places:
        value = distance_sum / divisor
        tl.store(distance + written, tl.where(some, value, float("nan")), mask=inside)
    both = tl.maximum(prefix_top, top)
    both = tl.where(both == -float("inf"), 0.0, both)
    prefix_sum *= tl.exp(prefix_top - both)
    total = prefix_sum + total * tl.exp(top - both)
    tl.store(sink + written, prefix_sum / tl.where(total == 0, 1.0, total), mask=inside)
