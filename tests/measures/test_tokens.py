from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_for_tests import golden_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprobe.errors import MeasureError
from vitprobe.measures.tokens import (
    TOKEN_MEASURES,
    RankMe,
    effective_rank,
    feature_variance,
    fourier_log_amplitude,
    norm_outliers,
    rankme,
    select_tokens,
    token_cosine,
)

TOKENS = torch.arange(24.0).reshape(2, 4, 3)
MEASURES = {cls.info.name: cls for cls in TOKEN_MEASURES}
PURE = {
    "token_cosine": token_cosine,
    "effective_rank": effective_rank,
    "feature_variance": feature_variance,
    "norm_outliers": norm_outliers,
}
UNCHANGED_BY = {
    "token_cosine": 0,
    "effective_rank": 0,
    "feature_variance": 2,
    "norm_outliers": 0,
    "fourier_amplitude": 0,
}
"""The power of the scale of features by which a measure changes."""


def features(images=3, grid=(5, 5), width=6, seed=0):
    """Tokens with a mean of their own, and in each image one that stands out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, grid[0] * grid[1], width)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7
    tokens[:, -1] *= 20
    return tokens


def stream(name, tokens, grid=(5, 5)):
    measure = MEASURES[name]()
    measure.update(0, 0, tokens, grid)
    return measure.compute()[0]


def test_policies():
    assert torch.equal(select_tokens(TOKENS, 1), TOKENS[:, 1:])
    assert torch.equal(select_tokens(TOKENS, 0), TOKENS)
    assert torch.equal(select_tokens(TOKENS, 2, "cls"), TOKENS[:, 0])
    assert torch.equal(select_tokens(TOKENS, 1, "mean"), TOKENS[:, 1:].mean(1))
    assert torch.equal(select_tokens(TOKENS, 1, "all"), TOKENS)


def test_refused_policies():
    with pytest.raises(MeasureError, match="unknown tokens 'first': use one of patches, cls"):
        select_tokens(TOKENS, 1, "first")
    with pytest.raises(MeasureError, match="without a class token"):
        select_tokens(TOKENS, 0, "cls")


def test_cosine_of_equal_opposite_and_orthogonal_tokens():
    axes = torch.eye(4)
    stacked = torch.stack([axes[[0, 0, 0]], axes[:3], torch.stack([axes[0], -axes[0], axes[1]])])
    torch.testing.assert_close(token_cosine(stacked), torch.tensor([1, 0, -1 / 3]))
    scaled = stacked * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    torch.testing.assert_close(token_cosine(scaled), token_cosine(stacked))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 6), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_cosine_is_the_mean_over_pairs(count, width, seed):
    tokens = features(1, (1, count), width, seed)
    pairs = torch.nn.functional.cosine_similarity(tokens[0][:, None], tokens[0][None], dim=-1)
    expected = pairs[~torch.eye(count, dtype=torch.bool)].mean()
    assert float(token_cosine(tokens)) == pytest.approx(float(expected), abs=1e-12)


def test_tokens_without_a_direction_are_left_out_of_the_cosine():
    tokens = features()
    with_zero = torch.cat([tokens, torch.zeros(3, 1, 6)], dim=1)
    torch.testing.assert_close(token_cosine(with_zero), token_cosine(tokens))
    assert token_cosine(tokens[:, :1]).isnan().all()
    assert token_cosine(with_zero[:, -2:]).isnan().all()
    alike = torch.full((1, 7, 5), 0.1) * torch.arange(1, 6)
    assert token_cosine(alike) == pytest.approx(1)
    assert token_cosine(alike, center=True).isnan().all()


def test_effective_rank_counts_equal_directions():
    axes = torch.eye(6, dtype=torch.float64)
    for count in (1, 2, 5):
        tokens = axes[:count].repeat(4, 1)[None] * 3
        assert float(effective_rank(tokens)) == pytest.approx(count)
    shares = np.array([3.0, 1.0]) / 4
    tokens = torch.diag(torch.tensor([3.0, 1.0]))[None]
    assert float(effective_rank(tokens)) == pytest.approx(
        math.exp(-(shares * np.log(shares)).sum())
    )


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_effective_rank_is_of_the_singular_values(count, width, seed):
    tokens = features(2, (1, count), width, seed)
    for center in (False, True):
        moved = tokens - tokens.mean(1, keepdim=True) if center else tokens
        shares = torch.linalg.svdvals(moved)
        shares = shares / shares.sum(-1, keepdim=True)
        expected = torch.special.entr(shares).sum(-1).exp()
        found = effective_rank(tokens, center=center)
        if center and count == 1:
            assert found.isnan().all()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert not (found > min(count, width) + 1e-9).any()


def test_effective_rank_of_no_or_one_direction_is_exact():
    assert effective_rank(torch.zeros(1, 9, 4)).isnan().all()
    alike = 0.1 * torch.arange(1, 6).double().expand(1, 49, 5)
    assert float(effective_rank(alike)) == 1
    assert (alike != alike.mean(1)).any()  # their mean is theirs up to rounding only
    assert effective_rank(alike, center=True).isnan().all()


def test_variance_is_unbiased_and_over_tokens():
    tokens = torch.tensor([[[1.0, 10.0], [3.0, 10.0]]])
    assert float(feature_variance(tokens)) == pytest.approx((2 + 0) / 2)
    assert feature_variance(tokens[:, :1]).isnan().all()
    assert float(feature_variance(torch.full((1, 4, 3), 2.5))) == 0
    far = tokens.double() + 1e4
    assert float(feature_variance(far.float())) == pytest.approx(1, rel=1e-3)


def test_one_token_far_out_is_an_outlier():
    tokens = features(4)
    norms = torch.linalg.vector_norm(tokens, dim=-1)
    assert (norms.argmax(1) == 24).all()
    torch.testing.assert_close(norm_outliers(tokens), torch.full((4,), 1 / 25).double())
    assert (norm_outliers(tokens[:, :-1]) == 0).all()
    assert (norm_outliers(tokens, cutoff=1e6) == 0).all()


def test_the_cutoff_is_of_the_modified_z_score():
    norms = torch.tensor([1.0, 2, 3, 4, 5, 8.1, 8.3])  # median 4, MAD 2: 3.5 is at 14.4
    for last, expected in ((14.3, 0), (14.5, 1 / 7)):
        norms[-1] = last
        tokens = norms[None, :, None] * torch.tensor([0.6, 0.8])
        assert float(norm_outliers(tokens)) == pytest.approx(expected)


def test_norms_without_spread_have_no_outliers_to_speak_of():
    tokens = torch.nn.functional.layer_norm(features().float(), (6,), eps=0)
    assert norm_outliers(tokens).isnan().all()
    assert norm_outliers(torch.zeros(2, 5, 3)).isnan().all()
    assert norm_outliers(tokens[:, :1]).isnan().all()


def test_normal_norms_have_few_outliers():
    generator = torch.Generator().manual_seed(0)
    norms = 10 + torch.randn(50, 4000, 1, generator=generator)
    assert float(norm_outliers(norms).mean()) == pytest.approx(0.00023, rel=0.3)


@pytest.mark.parametrize("side", [3, 4, 7, 14])
def test_a_wave_has_its_amplitude_at_its_own_frequency(side):
    place = torch.arange(side, dtype=torch.float64)
    steps = (place[:, None] + place).flatten()
    for k in range(1, (side + 1) // 2):
        wave = 3 + torch.cos(2 * math.pi * k * steps / side)
        noise = features(1, (side, side), 1, seed=k)[0, :, 0] * 1e-3
        frequencies, curve = fourier_log_amplitude((wave + noise)[None, :, None], grid=(side, side))
        assert frequencies.tolist() == pytest.approx(
            [2 * i / side for i in range(len(frequencies))]
        )
        assert frequencies.max() < 1 <= frequencies.max() + 2 / side
        assert int(curve[0, 1:].argmax()) + 1 == k
        assert float(curve[0, k]) == pytest.approx(math.log(1 / 6), abs=0.01)


@pytest.mark.parametrize("side", [3, 6, 9])
def test_curves_are_the_diagonal_of_the_transform(side):
    tokens = features(2, (side, side))
    grid = tokens.reshape(2, side, side, 6)
    logs = torch.fft.fft2(grid, dim=(1, 2)).abs().log()
    expected = torch.stack([logs[:, k, k] - logs[:, 0, 0] for k in range((side + 1) // 2)], 1)
    _, curve = fourier_log_amplitude(tokens, grid=(side, side))
    torch.testing.assert_close(curve, expected.mean(-1))


def test_white_noise_has_half_the_logarithm_of_two():
    noise = torch.randn(400, 64, 16, generator=torch.Generator().manual_seed(0))
    _, curve = fourier_log_amplitude(noise, grid=(8, 8))
    assert curve.mean(0)[1:].tolist() == pytest.approx([math.log(2) / 2] * 3, abs=0.03)


def test_dimensions_without_amplitude_are_left_out_and_images_without_any_undefined():
    tokens = features(2).float()
    with_constant = torch.cat([tokens, torch.full((2, 25, 2), 0.3)], dim=-1)
    _, expected = fourier_log_amplitude(tokens, grid=(5, 5))
    _, found = fourier_log_amplitude(with_constant, grid=(5, 5))
    torch.testing.assert_close(found, expected)
    _, constant = fourier_log_amplitude(with_constant[..., 6:], grid=(5, 5))
    assert constant[:, 0].tolist() == [0, 0]
    assert constant[:, 1:].isnan().all()
    assert fourier_log_amplitude(torch.zeros(1, 25, 2), grid=(5, 5))[1].isnan().all()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((3, 5), "a grid of 3 x 5 patches has no diagonal of equal frequencies"),
        ((1, 1), "a grid of 1 x 1 patches has no frequency between 0 and pi"),
        ((2, 2), "no frequency between 0 and pi"),
    ],
)
def test_grids_without_a_curve(grid, message):
    tokens = features(2, grid)
    with pytest.raises(MeasureError, match=message):
        fourier_log_amplitude(tokens, grid=grid)
    measure = MEASURES["fourier_amplitude"]()
    measure.update(0, 0, tokens, grid)
    assert np.isnan(measure.compute()[0]).tolist() == [True, True]
    assert measure.curves() == {}


def test_curves_are_means_over_images():
    tokens = features(5)
    tokens[2] = 0
    whole, first, second = (MEASURES["fourier_amplitude"]() for _ in range(3))
    whole.update(3, 0, tokens, (5, 5))
    first.update(3, 0, tokens[:1], (5, 5))
    second.update(3, 1, tokens[1:], (5, 5))
    first.merge(second)
    frequencies, expected = fourier_log_amplitude(tokens[[0, 1, 3, 4]], grid=(5, 5))
    for measure in (whole, first):
        ((layer, (found, mean, error)),) = measure.curves().items()
        assert layer == 3
        np.testing.assert_allclose(found, frequencies)
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(error, expected.std(0) / 2, rtol=1e-4, atol=1e-6)
        assert np.isnan(measure.compute()[3]).tolist() == [False, False, True, False, False]
        np.testing.assert_allclose(measure.compute()[3][[0, 1, 3, 4]], expected[:, -1], rtol=1e-5)
    empty = MEASURES["fourier_amplitude"]()
    empty.merge(whole)
    np.testing.assert_array_equal(empty.curves()[3][1], whole.curves()[3][1])
    alone = MEASURES["fourier_amplitude"]()
    alone.update(0, 0, tokens[:1], (5, 5))
    assert np.isnan(alone.curves()[0][2]).all()


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_streaming_equals_the_pure_functions_at_any_scale(name, scale):
    tokens = features(5) * scale
    expected = (
        PURE[name](tokens) if name in PURE else fourier_log_amplitude(tokens, grid=(5, 5))[1][:, -1]
    )
    found = stream(name, tokens.float())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(
        found, stream(name, tokens / scale) * scale ** UNCHANGED_BY[name], rtol=1e-4
    )
    low, high = MEASURES[name].info.bounds
    assert ((low <= found) & (found <= high)).all()


@pytest.mark.parametrize("name", MEASURES)
def test_half_precision_and_large_norms(name):
    tokens = (features(2, (7, 7), 48) * 500).half()
    np.testing.assert_allclose(
        stream(name, tokens, (7, 7)), stream(name, tokens.double(), (7, 7)), rtol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = stream(name, tokens.float(), (7, 7))
    assert np.array_equal(under_autocast, stream(name, tokens.float(), (7, 7)))


@pytest.mark.parametrize("name", MEASURES)
def test_one_patch_is_undefined_or_right(name):
    found = stream(name, features(2, (1, 1)), (1, 1))
    if name == "effective_rank":
        assert found.tolist() == [1, 1]
    else:
        assert np.isnan(found).all()


@pytest.mark.parametrize("name", MEASURES)
def test_declared_invariances_hold_and_no_other(name):
    tokens = features(4)
    # The share of outliers changes only where an outlier is one no more: this one has nothing but
    # the first dimension, which `linear` shrinks and `shift` takes off.
    tokens[:, -1] = 60 * torch.eye(6)[0]
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    linear = torch.tensor([0.01, 1, 1.1, 1.2, 1.3, 1.4]).double()[:, None] * turn
    shift = torch.tensor([-60.0, 1, 2, 3, 4, 5]).double()
    images = torch.randperm(4, generator=generator)
    patches = torch.randperm(25, generator=generator)
    expected = stream(name, tokens)
    changed = {
        "orthogonal transformation": (tokens @ turn, expected),
        "invertible linear transformation": (tokens @ linear, expected),
        "isotropic scaling": (tokens * 3, expected),
        "shift": (tokens + shift, expected),
        "order of images": (tokens[images], expected[images]),
        "order of tokens": (tokens[:, patches], expected),
    }
    for invariance, (other, same) in changed.items():
        holds = np.allclose(stream(name, other), same, rtol=1e-4)
        assert holds == (invariance in MEASURES[name].info.invariances), invariance


@pytest.mark.parametrize("name", MEASURES)
def test_merging_is_a_union_of_images(name):
    tokens = features(5)
    whole, first, second = (MEASURES[name]() for _ in range(3))
    whole.update(2, 0, tokens, (5, 5))
    second.update(2, 2, tokens[2:], (5, 5))
    first.update(2, 0, tokens[:2], (5, 5))
    second.merge(first)
    assert np.array_equal(second.compute()[2], whole.compute()[2])
    with pytest.raises(MeasureError, match=f"{name}: image 0 is in both parts"):
        second.merge(first)
    with pytest.raises(MeasureError, match="image 3 comes twice in layer 2"):
        whole.update(2, 3, tokens[:1], (5, 5))


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_features_is_refused(name):
    tokens = features()
    with pytest.raises(
        MeasureError, match=r"layer 0 gives tokens of shape \(3, 25, 6\) for a grid"
    ):
        stream(name, tokens, (4, 6))
    tokens[1, 2, 3] = math.inf
    with pytest.raises(MeasureError, match="features are NaN or infinite in layer 0"):
        stream(name, tokens)


@pytest.mark.parametrize("function", PURE.values())
def test_refusals(function):
    with pytest.raises(MeasureError, match=r"give \(batch, tokens, width\)"):
        function(torch.zeros(4, 3))
    with pytest.raises(MeasureError, match="NaN or infinite"):
        function(torch.full((1, 2, 3), torch.nan))
    assert isinstance(function(features().numpy()), np.ndarray)
    with pytest.raises(MeasureError, match="25 tokens are no grid of 3 x 5"):
        fourier_log_amplitude(features(), grid=(3, 5))


def test_rankme_of_equal_directions_and_at_any_scale():
    embeddings = torch.eye(5, dtype=torch.float64).repeat(6, 1)
    assert rankme(embeddings) == pytest.approx(5, rel=1e-5)
    assert rankme(embeddings * 1e-4) == pytest.approx(rankme(embeddings * 1e4), rel=1e-12)
    assert rankme(torch.ones(7, 3)) == pytest.approx(1, abs=1e-5)
    for embedded, message in (
        (torch.zeros(3, 2), "all 0"),
        (torch.ones(3), "give .images, width."),
        (torch.full((3, 2), torch.nan), "NaN or infinite"),
    ):
        with pytest.raises(MeasureError, match=message):
            rankme(embedded)


def test_rankme_streams_and_merges_exactly():
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    whole, first, second = (RankMe(3) for _ in range(3))
    whole.update(1, 0, vectors)
    first.update(1, 0, vectors[:25])
    second.update(1, 25, vectors[25:])
    second.merge(first)
    value, error = whole.compute()
    assert value[1] == pytest.approx(rankme(vectors))
    assert value.isnan().tolist() == error.isnan().tolist() == [True, False, True]
    for a, b in zip(second.compute(), (value, error), strict=True):
        assert torch.equal(a, b) or torch.equal(a[1], b[1])
    with pytest.raises(MeasureError, match="rankme: image 0 is in both parts"):
        second.merge(first)
    with pytest.raises(MeasureError, match="NaN or infinite in layer 2"):
        whole.update(2, 0, vectors * math.inf)


def test_rankme_errors_need_two_images_a_group():
    few = RankMe(2)
    few.update(0, 0, torch.randn(19, 4, generator=torch.Generator().manual_seed(0)))
    few.update(1, 0, torch.zeros(40, 4))
    value, error = few.compute()
    assert value.isnan().tolist() == [False, True]
    assert error.isnan().all()


@pytest.mark.parametrize("name", RankMe.info.invariances)
def test_rankme_invariances(name):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 1
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    changed = {
        "orthogonal transformation": vectors @ turn,
        "isotropic scaling": 5 * vectors,
        "order of images": vectors.flip(0),
    }
    assert rankme(changed[name]) == pytest.approx(rankme(vectors))
    assert rankme(vectors + 3) != pytest.approx(rankme(vectors))
    assert rankme(vectors * torch.arange(1, 7)) != pytest.approx(rankme(vectors))


@pytest.mark.slow
def test_rankme_intervals_cover_the_mean_over_samples():
    generator = torch.Generator().manual_seed(0)
    scale = 0.8 ** torch.arange(16)
    found = []
    for _ in range(400):
        measure = RankMe(1)
        measure.update(0, 0, torch.randn(100, 16, generator=generator) * scale)
        found.append([float(number[0]) for number in measure.compute()])
    value, error = np.array(found).T
    covered = np.abs(value - value.mean()) <= 2.262 * error
    assert 0.91 <= covered.mean() <= 0.98


@pytest.mark.parametrize("cls", [*TOKEN_MEASURES, RankMe])
def test_every_measure_says_what_it_is(cls):
    assert cls.info.group == "tokens"


@pytest.mark.parametrize("scale", [1e-40, 1e30, 1e37])
def test_cosine_of_features_of_any_scale(scale):
    tokens = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    found = token_cosine((tokens.double() * scale).float())
    np.testing.assert_allclose(found, token_cosine(tokens), atol=1e-3)


@pytest.mark.parametrize("cutoff", [0, -1, math.nan])
def test_a_cutoff_that_is_none(cutoff):
    with pytest.raises(MeasureError, match="is none; give one above 0"):
        norm_outliers(torch.ones(1, 4, 2), cutoff=cutoff)


def test_one_image_has_no_rankme():
    measure = RankMe(1)
    measure.update(0, 0, torch.ones(1, 4))
    assert measure.compute()[0].isnan().all()


@pytest.mark.parametrize("case", ["feat_7x7", "feat_8x8"])
def test_golden_values(case):
    tokens, expected = golden_attention()["arrays"][case], golden_attention()[case]
    side = int(case[-1])
    frequencies, curve = fourier_log_amplitude(tokens, grid=(side, side), epsilon=1e-6)
    found = {
        "own_dft_loops_fourier": curve.mean(0),
        "fourier_frequencies_rad_of_the_entries": frequencies * math.pi,
        "token_cosine_offdiag_mean_per_image": token_cosine(tokens),
        "token_cosine_offdiag_mean_per_image_token_mean_removed": token_cosine(tokens, center=True),
        "effective_rank_roy_vetterli_per_image": effective_rank(tokens),
        "effective_rank_token_mean_removed_per_image": effective_rank(tokens, center=True),
        "rankme_eps1e-7_all_tokens_stacked": rankme(tokens.reshape(-1, tokens.shape[-1])),
        "feature_map_variance_how_do_vits_work": feature_variance(tokens).mean(),
    }
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-9, atol=1e-14, err_msg=key)
    _, exact = fourier_log_amplitude(tokens, grid=(side, side))
    np.testing.assert_allclose(exact.mean(0), expected["own_dft_loops_fourier"], rtol=1e-5)
