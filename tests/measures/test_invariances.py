"""Every measure has exactly the invariances that it declares.

What is declared must leave the number as it is; what is not declared, of the words that make sense
for the measure's input, must visibly change it on the example.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.measures import (
    ALL_MEASURES,
    cka,
    linear_regression,
    mutual_knn,
    procrustes,
    pwcca,
    rankme,
    rsa,
    svcca,
)
from vitprobe.measures.attention import AttentionChunk, grid_positions
from vitprobe.measures.first_direction import FirstDirectionShare
from vitprobe.measures.gram import centered_gram
from vitprobe.measures.registry import ATTENTION, TOKENS

BY_NAME = {cls.info.name: cls for cls in ALL_MEASURES}
OF_FEATURES = ("orthogonal transformation", "invertible linear transformation")
OF_FEATURES += ("isotropic scaling", "shift", "order of images")
OF_TOKENS = (*OF_FEATURES, "order of tokens")
OF_ATTENTION = ("order of images", "order of tokens", "order of keys")

SIMILARITY = {
    "cka": cka,
    "cka_rbf": lambda x, y: cka(x, y, kernel="rbf"),
    "svcca": svcca,
    "pwcca": pwcca,
    "procrustes": procrustes,
    "rsa_spearman": rsa,
    "rsa_pearson": lambda x, y: rsa(x, y, correlation="pearson"),
    "mutual_knn": mutual_knn,
    "linear_regression": linear_regression,
}


def generator(name, invariance, seed):
    """Any numbers for what must hold; one example of what must not, which chance may hide."""
    declared = invariance in BY_NAME[name].info.invariances
    return np.random.default_rng(seed if declared else 0)


def share(x):
    measure = FirstDirectionShare(1)
    measure.update_grams(centered_gram(torch.from_numpy(x))[None])
    return float(measure.compute()[0])


OF_ONE_LAYER = {"first_direction_share": share, "rankme": rankme}


def changed_features(x, invariance, rng):
    """Features (..., width) after what the word allows; order of images is not of one layer."""
    width = x.shape[-1]
    if invariance == "orthogonal transformation":
        return x @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    if invariance == "invertible linear transformation":
        left, right = (np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(2))
        return x @ (left * np.geomspace(0.1, 10, width) @ right)
    if invariance == "isotropic scaling":
        return x * rng.choice([1e-4, 0.3, 1e4])
    return x + 2 * rng.normal(size=width)


def pair(rng, images=60):
    x = rng.normal(size=(images, 8)) * np.geomspace(4, 0.4, 8) + rng.normal(size=8)
    return x, x[:, :4] @ rng.normal(size=(4, 10)) + 2 * rng.normal(size=(images, 10))


@pytest.mark.parametrize("invariance", OF_FEATURES)
@pytest.mark.parametrize("name", SIMILARITY)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_similarity(name, invariance, seed):
    rng = generator(name, invariance, seed)
    measure, (x, y) = SIMILARITY[name], pair(rng)
    if invariance == "order of images":
        order = rng.permutation(len(x))
        changes = [(x[order], y[order])]
    else:
        changes = [(changed_features(x, invariance, rng), y)]
        changes.append((x, changed_features(y, invariance, rng)))
    difference = max(abs(measure(*changed) - measure(x, y)) for changed in changes)
    if invariance in BY_NAME[name].info.invariances:
        assert difference < 1e-9
    else:
        assert difference > 1e-3


@pytest.mark.parametrize("name", SIMILARITY)
def test_the_order_of_the_images_of_one_layer_matters(name):
    rng = np.random.default_rng(0)
    x, y = pair(rng)
    assert abs(SIMILARITY[name](x[rng.permutation(len(x))], y) - SIMILARITY[name](x, y)) > 1e-2


@pytest.mark.parametrize("invariance", OF_FEATURES)
@pytest.mark.parametrize("name", OF_ONE_LAYER)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_one_layer(name, invariance, seed):
    rng = generator(name, invariance, seed)
    measure, (x, _) = OF_ONE_LAYER[name], pair(rng)
    if invariance == "order of images":
        changed = x[rng.permutation(len(x))]
    else:
        changed = changed_features(x, invariance, rng)
    difference = abs(measure(changed) / measure(x) - 1)
    if invariance in BY_NAME[name].info.invariances:
        assert difference < 1e-6
    else:
        assert difference > 1e-3


GRID = (4, 4)


def of_tokens(name, tokens):
    measure = TOKENS[name]()
    measure.update(0, 0, torch.from_numpy(tokens), GRID)
    return measure.compute()[0]


@pytest.mark.parametrize("invariance", OF_TOKENS)
@pytest.mark.parametrize("name", TOKENS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_tokens(name, invariance, seed):
    rng = generator(name, invariance, seed)
    tokens = rng.normal(size=(12, 16, 6)) * np.geomspace(3, 0.5, 6) + rng.normal(size=6)
    # Some tokens stand out by their norm, for the measure that counts those.
    tokens[rng.random((12, 16)) < 0.2] *= 6
    value = of_tokens(name, tokens)
    if invariance == "order of images":
        order = rng.permutation(12)
        value, changed = value[order], tokens[order]
    elif invariance == "order of tokens":
        changed = tokens[:, rng.permutation(16)]
    else:
        changed = changed_features(tokens, invariance, rng)
    difference = np.abs(of_tokens(name, changed) - value).max() / np.abs(value).max()
    if invariance in BY_NAME[name].info.invariances:
        assert difference < 1e-4
    else:
        assert difference > 1e-2


def of_attention(name, attention):
    places = grid_positions(GRID, 16)
    measure = ATTENTION[name]()
    measure.update(
        AttentionChunk(
            torch.from_numpy(attention).log(),
            query_prefix=1,
            key_prefix=1,
            query_xy=places,
            key_xy=places,
            layer=0,
        )
    )
    return measure.compute()[0].mean


@pytest.mark.parametrize("invariance", OF_ATTENTION)
@pytest.mark.parametrize("name", ATTENTION)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_attention(name, invariance, seed):
    rng = generator(name, invariance, seed)
    attention = rng.dirichlet(np.full(17, 0.4), size=(5, 3, 17))
    value = of_attention(name, attention)
    patches = np.concatenate([[0], 1 + rng.permutation(16)])
    if invariance == "order of images":
        order = rng.permutation(5)
        value, changed = value[order], attention[order]
    elif invariance == "order of tokens":
        changed = attention[:, :, patches][..., patches]
    else:
        changed = attention[..., patches]
    difference = np.abs(of_attention(name, changed) / value - 1).max()
    if invariance in BY_NAME[name].info.invariances:
        assert difference < 1e-5
    else:
        assert difference > 1e-3


def test_every_measure_is_tested():
    assert set(BY_NAME) == {*SIMILARITY, *OF_ONE_LAYER, *TOKENS, *ATTENTION}


@pytest.mark.parametrize("name", BY_NAME)
def test_only_words_that_make_sense_are_declared(name):
    words = OF_ATTENTION if name in ATTENTION else OF_TOKENS if name in TOKENS else OF_FEATURES
    declared = BY_NAME[name].info.invariances
    assert len(set(declared)) == len(declared)
    assert set(declared) <= set(words)
