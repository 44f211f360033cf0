"""What heads have in common: with their queries (NMI), and with each other (divergences).

Sources: Park et al. 2023 ("What Do Self-Supervised Vision Transformers Learn?", NMI), Xie et al.
2023 ("Revealing the Dark Secrets of Masked Image Modeling", KL between heads), Clark et al. 2019
("What Does BERT Look At?", Jensen-Shannon divergence between heads), Lin 1991.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vitprobe.errors import MeasureError
from vitprobe.measures.arrays import A, like
from vitprobe.measures.base import Info
from vitprobe.measures.by_image import OVER_IMAGES
from vitprobe.measures.chunks import (
    NO_PLACE,
    ONLY_PATCHES,
    AttentionChunk,
    MapMeasure,
    PerImage,
    RowMeasure,
    checked,
    mean_of_defined,
    normalized,
    row_entropy,
)


def attention_nmi(attention: A, *, prefix_tokens: int = 0) -> A:
    """Normalised mutual information of query and key, for each image and head.

    With patch queries equally likely and keys drawn by their attention, renormalised over patches:
    MI / sqrt(H(query) H(key)) (Park et al. 2023).

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.

    Returns:
        (batch, heads) between 0 and 1, the kind of array given; nan where it is 0/0: all queries
        attend to one and the same key, or there is but one query with mass on patch keys.

    Raises:
        MeasureError: shapes that do not fit, or values that are no attention.
    """
    rows = normalized(checked(attention, prefix_tokens)[..., prefix_tokens:, prefix_tokens:])
    return like(_nmi(*_marginals(rows, row_entropy(rows))), attention)


def _marginals(rows: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over defined rows of attention to each key, and of entropies; and their number."""
    return rows.nansum(-2), entropy.nansum(-1), (~entropy.isnan()).sum(-1)


def _nmi(keys: Tensor, entropy: Tensor, queries: Tensor) -> Tensor:
    key_entropy = row_entropy(keys / queries[..., None])
    # Never negative, but for rounding.
    information = (key_entropy - entropy / queries).clamp_min(0)
    scale = torch.sqrt(key_entropy * queries.to(keys).log())
    return information / torch.where(scale > 0, scale, torch.nan)


def head_divergence(attention: A, *, kind: Literal["js", "kl"] = "js", prefix_tokens: int = 0) -> A:
    """Divergence between the heads of a layer, mean over patch queries, in nats.

    Args:
        attention: post-softmax, (batch, heads, queries, keys), prefix tokens first; torch or numpy.
        kind: `js`, the Jensen-Shannon divergence, or `kl`, the Kullback-Leibler divergence.
        prefix_tokens: leading tokens that are no patches, dropped from queries and keys.

    Returns:
        (batch, heads g, heads h), the kind of array given. `js`: symmetric, between 0 and ln 2.
        `kl`: entry [g, h] is KL(g || h), inf where g attends to a key that h gives nothing. Rows
        are renormalised over patch keys; queries at which g or h has no mass there are left out,
        and where none is left the entry is nan.

    Raises:
        MeasureError: unknown kind, shapes that do not fit, or values that are no attention.
    """
    if kind not in ("js", "kl"):
        raise MeasureError(f"unknown divergence '{kind}': use 'js' or 'kl'")
    rows = normalized(checked(attention, prefix_tokens)[..., prefix_tokens:, prefix_tokens:])
    pairs = _js(rows, row_entropy(rows)) if kind == "js" else _kl(rows, rows.log())
    return like(mean_of_defined(pairs), attention)


def _js(rows: Tensor, entropy: Tensor) -> Tensor:
    """(batch, heads, heads, queries): entropy of two heads' mean less the mean of their two."""
    batch, heads, queries, _ = rows.shape
    pairs = rows.new_zeros(batch, heads, heads, queries)
    for g in range(heads - 1):
        mixed = row_entropy((rows[:, g, None] + rows[:, g + 1 :]) / 2)
        mean = (entropy[:, g, None] + entropy[:, g + 1 :]) / 2
        pairs[:, g, g + 1 :] = (mixed - mean).clamp_min(0)
    pairs.diagonal(dim1=1, dim2=2).copy_((entropy - entropy).mT)
    return pairs + pairs.transpose(1, 2)


def _kl(rows: Tensor, log_rows: Tensor) -> Tensor:
    """(batch, heads g, heads h, queries) of sum_k p_g (ln p_g - ln p_h)."""
    p, log_p = rows.transpose(1, 2), log_rows.transpose(1, 2)
    nothing = log_p == -torch.inf
    cross = p @ log_p.masked_fill(nothing, 0).mT
    pairs = (cross.diagonal(dim1=-2, dim2=-1)[..., None] - cross).clamp_min(0)
    if nothing.any():
        pairs = pairs.masked_fill(p @ nothing.to(p).mT > 0, torch.inf)
    return pairs.permute(0, 2, 3, 1)


def _mean_over_others(pairs: Tensor) -> Tensor:
    """(batch, heads, queries): of each head with the others, nan where there is none."""
    others = pairs.clone()
    others.diagonal(dim1=1, dim2=2).fill_(torch.nan)
    return mean_of_defined(others.transpose(-1, -2))


class AttentionNMI(MapMeasure):
    """Streaming `attention_nmi`.

    Of an image whose queries come in parts it keeps one number a head and key.
    """

    info = Info(
        name="attention_nmi",
        title="Attention NMI",
        unit="share",
        range="0 to 1",
        direction="higher: what a head attends to depends on the patch that asks",
        what=(
            "How much the patch that asks decides what a head looks at: 0 when all patches look at "
            "the same places, 1 when each looks at one of its own."
        ),
        formula=(
            "MI(q, k) / sqrt(H(q) H(k)), p(q) uniform over patch queries, p(k|q) over patch keys "
            "only"
        ),
        source="Park et al. 2023; Strehl & Ghosh 2002",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="0 when all queries attend alike, as under uniform attention; no relative unit.",
        caveats=(
            "Undefined (0/0) for a head whose queries all attend to one key, and with one patch. "
            "Low values do not tell a head that attends everywhere from one that attends to one "
            f"region: read the entropy with it. {ONLY_PATCHES}"
        ),
        elsewhere=(
            "cl-vs-mim adds 1e-8 inside its logarithms and in single precision, so that a head "
            "whose queries all attend to one key gets a number near 0 instead of none."
        ),
        bounds=(0, 1),
    )

    def part(self, chunk: AttentionChunk) -> tuple[Tensor, ...]:
        undefined = chunk.entropy.isnan().sum(-1)
        return (*_marginals(chunk.renormalized, chunk.entropy), undefined)

    def join(self, before: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(a + b for a, b in zip(before, part, strict=True))

    def finish(self, chunk: AttentionChunk, content: tuple[Tensor, ...]) -> PerImage:
        keys, entropy, defined, undefined = content
        value = _nmi(keys, entropy, defined)
        undefined = torch.where(value.isnan(), defined + undefined, undefined)
        return PerImage(value.cpu().numpy(), undefined.cpu().numpy())


_DIVERGENCE_CAVEATS = (
    "A mean over the other heads: one odd head raises it for all. Undefined in a layer of one "
    f"head. It does not say that heads do different work, only that they look elsewhere. "
    f"{ONLY_PATCHES}"
)
_DIVERGENCE_ELSEWHERE = (
    "Papers average over all pairs of a layer and print one number; here each head has its mean "
    "over the others, and their mean over heads is that number."
)


class HeadDivergence(RowMeasure):
    """Streaming `head_divergence(kind="js")`, of each head the mean over the other heads."""

    info = Info(
        name="head_divergence",
        title="Head divergence (Jensen-Shannon)",
        unit="nats",
        range="0 to ln 2",
        direction="higher: a head looks at other patches than the other heads of its layer",
        what=(
            "How differently a head attends from the other heads of its layer: 0 when all heads "
            "look at the same patches, ln 2 when none shares a patch with another."
        ),
        formula=(
            "mean over patch queries and over the other heads h of H((p_g + p_h) / 2) - (H(p_g) + "
            "H(p_h)) / 2, p over patch keys only"
        ),
        source="Lin 1991; Clark et al. 2019 (sec. 6); Xie et al. 2023 (with KL)",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="0 when heads attend alike, as under uniform attention; no relative unit.",
        caveats=_DIVERGENCE_CAVEATS,
        elsewhere=_DIVERGENCE_ELSEWHERE,
        bounds=(0, math.log(2)),
    )
    needs = "heads"

    def rows(self, chunk: AttentionChunk) -> Tensor:
        return _mean_over_others(_js(chunk.renormalized, chunk.entropy))


class HeadDivergenceKL(RowMeasure):
    """Streaming `head_divergence(kind="kl")`, of head g the mean over the others of KL(g || h).

    A row whose divergence is infinite counts as undefined.
    """

    info = Info(
        name="head_divergence_kl",
        title="Head divergence (Kullback-Leibler)",
        unit="nats",
        range="0 and up",
        direction="higher: a head looks at patches that the other heads of its layer neglect",
        what=(
            "How badly the other heads of a layer would predict what a head looks at: the mean of "
            "KL(this head || another)."
        ),
        formula=(
            "mean over patch queries and over the other heads h of sum_k p_g(k|q) ln(p_g(k|q) / "
            "p_h(k|q)), p over patch keys only"
        ),
        source="Xie et al. 2023; Kullback & Leibler 1951",
        invariances=NO_PLACE,
        streams="exact",
        group="attention",
        interval=OVER_IMAGES,
        null="0 when heads attend alike, as under uniform attention; no relative unit.",
        caveats=(
            "Not symmetric, and without an upper end: weights of 1e-20 that no output would feel "
            "decide it, so prefer the Jensen-Shannon divergence. A row at which it is infinite (a "
            "masked key that this head attends to) is left out of the mean and counted as "
            f"undefined. {_DIVERGENCE_CAVEATS}"
        ),
        elsewhere=(
            "Code in use adds an epsilon such as 1e-8 to every weight, which caps it near "
            f"-ln(epsilon) = 18.4 nats. {_DIVERGENCE_ELSEWHERE}"
        ),
        bounds=(0, math.inf),
    )
    needs = "heads"

    def rows(self, chunk: AttentionChunk) -> Tensor:
        log_rows = torch.log_softmax(chunk.patch_log_p, dim=-1)
        rows = _mean_over_others(_kl(chunk.renormalized, log_rows))
        return rows.masked_fill(rows.isinf(), torch.nan)
