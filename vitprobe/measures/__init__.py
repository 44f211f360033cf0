"""Measures of representations and attention: tensors in, tensors out."""

from vitprobe.measures.attention import (
    AllTokensAttentionEntropy,
    AttentionChunk,
    AttentionDistance,
    AttentionEntropy,
    RawAttentionDistance,
    SinkMass,
    attention_distance,
    attention_entropy,
    sink_mass,
)
from vitprobe.measures.cka import CKA, FirstDirectionShare, cka
from vitprobe.measures.registry import MEASURES
from vitprobe.measures.tokens import select_tokens

__all__ = [
    "CKA",
    "MEASURES",
    "AllTokensAttentionEntropy",
    "AttentionChunk",
    "AttentionDistance",
    "AttentionEntropy",
    "FirstDirectionShare",
    "RawAttentionDistance",
    "SinkMass",
    "attention_distance",
    "attention_entropy",
    "cka",
    "select_tokens",
    "sink_mass",
]
