"""Measures of representations and attention: tensors in, tensors out."""

from vitprobe.measures.attention import (
    AllTokensAttentionEntropy,
    AttentionChunk,
    AttentionDistance,
    AttentionEntropy,
    AttentionMeasure,
    RawAttentionDistance,
    SinkMass,
    attention_distance,
    attention_distance_quantile,
    attention_entropy,
    class_attention_entropy,
    sink_mass,
)
from vitprobe.measures.base import Info
from vitprobe.measures.canonical import canonical_correlations, pwcca, svcca
from vitprobe.measures.cka import CKA, CKARBF, cka
from vitprobe.measures.exact_cka import ExactCKA
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.heads import attention_nmi, head_divergence
from vitprobe.measures.neighbours import mutual_knn
from vitprobe.measures.registry import ALL_MEASURES, MEASURES, register
from vitprobe.measures.rollout import attention_rollout
from vitprobe.measures.rsa import rsa
from vitprobe.measures.similarity import linear_regression, procrustes
from vitprobe.measures.subset import SubsetMeasure
from vitprobe.measures.tokens import (
    TokenMeasure,
    effective_rank,
    feature_variance,
    fourier_log_amplitude,
    norm_outliers,
    rankme,
    select_tokens,
    token_cosine,
)

__all__ = [
    "ALL_MEASURES",
    "CKA",
    "CKARBF",
    "MEASURES",
    "AllTokensAttentionEntropy",
    "AttentionChunk",
    "AttentionDistance",
    "AttentionEntropy",
    "AttentionMeasure",
    "ExactCKA",
    "FirstDirectionShare",
    "Info",
    "RawAttentionDistance",
    "SinkMass",
    "SubsetMeasure",
    "TokenMeasure",
    "attention_distance",
    "attention_distance_quantile",
    "attention_entropy",
    "attention_nmi",
    "attention_rollout",
    "canonical_correlations",
    "cka",
    "class_attention_entropy",
    "effective_rank",
    "feature_variance",
    "fourier_log_amplitude",
    "head_divergence",
    "linear_regression",
    "mutual_knn",
    "norm_outliers",
    "procrustes",
    "pwcca",
    "rankme",
    "register",
    "rsa",
    "select_tokens",
    "sink_mass",
    "svcca",
    "token_cosine",
]
