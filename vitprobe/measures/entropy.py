"""Entropy of attention rows: how widely a head spreads its attention.

Sources: Wang et al. 2023 ("A Closer Look at Self-Supervised Lightweight Vision Transformers"); Vig
& Belinkov 2019 ("Analyzing the Structure of Attention in a Transformer Language Model").
"""

from __future__ import annotations

import math

from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, like
from vitprobe.measures.base import Info
from vitprobe.measures.by_image import OVER_IMAGES
from vitprobe.measures.chunks import (
    NO_PLACE,
    ONLY_PATCHES,
    AttentionChunk,
    RowMeasure,
    checked,
    mean_of_defined,
    normalized,
    row_entropy,
)


def attention_entropy(attention: A, *, prefix_tokens: int = 0, renormalize: bool = True) -> A:
    """Mean entropy of the attention rows of each image and head, in nats.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.
        renormalize: divide each row by its mass on patch keys. Without it the sum of -p ln p runs
            over patch keys only, which is an entropy only where `prefix_tokens` is 0.

    Returns:
        (batch, heads), the kind of array given; between 0 and ln(keys) when renormalised; nan where
        no query has mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    rows = checked(attention, prefix_tokens)[..., prefix_tokens:, prefix_tokens:]
    if renormalize:
        rows = normalized(rows)
    return like(mean_of_defined(row_entropy(rows)), attention)


def class_attention_entropy(attention: A, *, prefix_tokens: int) -> A:
    """Entropy of the class token's attention over patches, for each image and head, in nats.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), the class token first among queries
            and keys; further queries are ignored; torch or numpy.
        prefix_tokens: leading keys that are no patches, the class token among them.

    Returns:
        (batch, heads), between 0 and ln(patches), the row renormalised over patch keys; the kind of
        array given; nan where the class token sends nothing to patches.

    Raises:
        MeasureError: no prefix token, shapes that do not fit, or values that are no attention.
    """
    tensor = checked(attention, 0)
    if not 0 < prefix_tokens < tensor.shape[-1]:
        raise MeasureError(
            f"{prefix_tokens} prefix tokens among {tensor.shape[-1]} keys leave no class token or "
            "no patches"
        )
    return like(row_entropy(normalized(tensor[..., 0, prefix_tokens:])), attention)


_ENTROPIES_ELSEWHERE = (
    "Wang et al.'s mae-lite sums -p ln(p + 1e-6), which falls below 0 for a head that looks at one "
    "patch, and averages batches of unequal size alike."
)


class AttentionEntropy(RowMeasure):
    """Streaming `attention_entropy`, patch queries, renormalised over patch keys."""

    info = Info(
        name="attention_entropy",
        title="Attention entropy",
        unit="nats",
        range="0 to ln(patches)",
        direction="higher: a head spreads its attention over more patches",
        what=(
            "Attention entropy is how widely a head spreads its attention: 0 when each patch looks "
            "at a single other one, ln(patches) when it looks at all alike."
        ),
        formula="mean over patch queries q of -sum_k p(k|q) ln p(k|q), p over patch keys only",
        source="Wang et al. 2023; Vig & Belinkov 2019",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=(
            "Uniform attention gives ln(patches), which relative units divide by; untrained models "
            "lie near it."
        ),
        caveats=(
            f"Grows with the number of patches: compare grids in relative units. {ONLY_PATCHES}"
        ),
        elsewhere=_ENTROPIES_ELSEWHERE,
        bounds=(0, math.inf),
    )

    relative = True
    mapless = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return chunk.rows.entropy[..., chunk.query_prefix :]


class RawAttentionEntropy(RowMeasure):
    """Streaming `attention_entropy(renormalize=False)`."""

    info = Info(
        name="attention_entropy_raw",
        title="Attention entropy (not renormalised)",
        unit="nats",
        range="0 to ln(patches), of 3 patches or more",
        direction="higher: a head spreads more attention over more patches",
        what=(
            "The part of the all-token entropy that patch keys contribute: it falls both when a "
            "head looks at fewer patches and when it sends its attention to prefix tokens."
        ),
        formula="mean over patch queries q of -sum over patch keys k of p(k|q) ln p(k|q)",
        source="Wang et al. 2023; Vig & Belinkov 2019",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=(
            "Uniform attention over all tokens gives ln(tokens) times the patches' share of the "
            "tokens, which relative units divide by."
        ),
        caveats=(
            "No entropy, since its rows do not sum to 1 where there are prefix tokens; without "
            "prefix tokens it is attention_entropy."
        ),
        elsewhere=_ENTROPIES_ELSEWHERE,
        bounds=(0, math.inf),
    )

    relative = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return row_entropy(chunk.patch_log_p.exp())


class AllTokensAttentionEntropy(RowMeasure):
    """Streaming entropy over all queries and all keys, prefix tokens included."""

    info = Info(
        name="attention_entropy_all",
        title="Attention entropy (all tokens)",
        unit="nats",
        range="0 to ln(tokens)",
        direction="higher: a head spreads its attention over more tokens",
        what="Attention entropy over all tokens, the class token and registers included.",
        formula="mean over all queries q of -sum over all keys of p(k|q) ln p(k|q)",
        source="Wang et al. 2023; Vig & Belinkov 2019",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="Uniform attention gives ln(tokens), which relative units divide by.",
        caveats=(
            "Falls when attention goes to the class token or registers, however evenly the rest is "
            "spread; grows with the number of tokens."
        ),
        elsewhere=_ENTROPIES_ELSEWHERE,
        bounds=(0, math.inf),
    )

    relative = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return row_entropy(chunk.log_p.exp())


class ClassAttentionEntropy(RowMeasure):
    """Streaming `class_attention_entropy`; undefined in models without prefix tokens."""

    info = Info(
        name="class_attention_entropy",
        title="Class-token attention entropy",
        unit="nats",
        range="0 to ln(patches)",
        direction="higher: the class token gathers from more patches",
        what=(
            "How widely the class token spreads its attention over patches: low when the image's "
            "summary is read off a few of them."
        ),
        formula="-sum_k p(k|class) ln p(k|class), p over patch keys only",
        source="Caron et al. 2021 on class-token attention; the entropy of Wang et al. 2023",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null=(
            "Uniform attention gives ln(patches), which relative units divide by; untrained models "
            "lie near it."
        ),
        caveats=(
            "The first prefix token is taken for the class token: in a model that has registers "
            "alone it is a register. Undefined without prefix tokens. A class token that no loss "
            "uses, as in masked autoencoders, still attends."
        ),
        elsewhere="Others draw the class token's map; none was found to report its entropy.",
        bounds=(0, math.inf),
    )

    asks = "class"
    relative = True
    mapless = True

    def rows(self, chunk: AttentionChunk) -> Tensor:
        first = chunk.first_query == 0 and chunk.query_prefix > 0
        has_class = (first and chunk.class_token) or chunk.of_class_token
        return chunk.rows.entropy[..., : int(has_class)]
