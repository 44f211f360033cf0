"""Every operation against torchvision's on the same parameters; what is drawn; what it hangs on."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from vitprobe.errors import RecipeError
from vitprobe.training import augment as module
from vitprobe.training.augment import (
    Augment,
    AugmentConfig,
    blur,
    crop,
    crop_boxes,
    erase,
    grayscale,
    jitter,
    shift_hue,
    solarize,
)
from vitprobe.training.randomness import Draws

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
EVERYTHING = AugmentConfig(
    crop_scale=(0.3, 1.0),
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
    erase=0.25,
)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _images(n: int = 6, channels: int = 3, height: int = 20, width: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, height, width, generator=generator)


def _stored(n: int = 6, channels: int = 3, size: int = 20) -> Tensor:
    return (_images(n, channels, size, size) * 255).round().to(torch.uint8)


def _augment(*views: AugmentConfig, size: int = 12, channels: int = 3) -> Augment:
    return Augment(views, size=size, mean=[0.0] * channels, std=[1.0] * channels)


def _draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, torch.arange(n))


# Operations


@given(
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    size=st.integers(1, 40),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    flip=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_crop_of_whole_pixels_is_torchvisions(
    height: int, width: int, size: int, corners: tuple[float, ...], flip: bool
) -> None:
    top, left = int(corners[0] * (height - 1)), int(corners[1] * (width - 1))
    h = 1 + int(corners[2] * (height - top - 1))
    w = 1 + int(corners[3] * (width - left - 1))
    images = _images(1, 2, height, width)
    ours = crop(images, torch.tensor([[top, left, h, w]]).float(), size, torch.tensor([flip]))
    theirs = tv.resized_crop(images, top, left, h, w, [size, size], interpolation=3, antialias=True)
    theirs = theirs.flip(-1) if flip else theirs
    torch.testing.assert_close(ours, theirs.clamp(0, 1), atol=1e-5, rtol=0)


def test_a_crop_moves_smoothly_with_its_box() -> None:
    images = _images(1).expand(200, -1, -1, -1)
    start = torch.linspace(2, 6, 200)
    boxes = torch.stack([start, start, 10 - start / 3, 10 - start / 4], dim=1)
    crops = crop(images, boxes, 12, torch.zeros(200, dtype=torch.bool))
    assert (crops[1:] - crops[:-1]).abs().max() < 0.1


def test_an_even_image_stays_even_however_it_is_cut() -> None:
    boxes = crop_boxes(_draws(50), "crop", 9, 13, scale=(0.02, 1), ratio=(0.5, 2))
    crops = crop(torch.full((50, 1, 9, 13), 0.3), boxes, 7, torch.arange(50) < 25)
    torch.testing.assert_close(crops, torch.full_like(crops, 0.3))


BLENDS: dict[int, Callable[[Tensor, float], Tensor]] = {
    0: tv.adjust_brightness,
    1: tv.adjust_contrast,
    2: tv.adjust_saturation,
    3: tv.adjust_hue,
}


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_in_each_samples_own_order(channels: int) -> None:
    kinds = 4 if channels == 3 else 2
    images = _images(24, channels)
    draws = _draws(24)
    amounts = draws.uniform("factor", 4) * 2
    amounts[:, 3] = amounts[:, 3] / 2 - 0.5
    amounts, order = amounts[:, :kinds], draws.permutation("order", kinds)
    ours = jitter(images.clone(), amounts, order)
    for i in range(24):
        expected = images[i]
        for kind in order[i].tolist():
            expected = BLENDS[kind](expected, float(amounts[i, kind]))
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.1, 0.5])
def test_hue_is_torchvisions_even_of_greys_and_pure_colours(turns: float) -> None:
    pure = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    images = torch.cat([_images(1)[0].flatten(1), pure.T], dim=1)[None, :, None]
    ours = shift_hue(images, torch.tensor([turns]))
    torch.testing.assert_close(ours, tv.adjust_hue(images, turns), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "taps"), [(28, 15), (32, 17), (96, 23)])
def test_blur_is_torchvisions(size: int, taps: int) -> None:
    images = _images(3, 2, size, size)
    sigma = torch.tensor([0.1, 1.0, 2.0])
    ours = blur(images, sigma)
    for i in range(3):
        theirs = tv.gaussian_blur(images[i], [taps, taps], [float(sigma[i])])
        torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_blur_keeps_an_even_image_of_any_size(size: int) -> None:
    images = torch.full((1, 1, size, size), 0.7)
    torch.testing.assert_close(blur(images, torch.tensor([2.0])), images)


def test_solarize_and_grayscale_are_torchvisions() -> None:
    images = _images()
    torch.testing.assert_close(solarize(images), tv.solarize(images, 0.5))
    torch.testing.assert_close(grayscale(images), tv.rgb_to_grayscale(images, 3))


def test_erasing_is_torchvisions_on_the_same_box() -> None:
    images, noise = _images(1), _images(2)[1:]
    ours = erase(images, torch.tensor([[3.0, 5, 7, 4]]), noise)
    torch.testing.assert_close(ours, tv.erase(images, 3, 5, 7, 4, noise[:, :, 3:10, 5:9]))


# What is drawn


def test_boxes_are_distributed_as_torchvisions() -> None:
    scale, ratio, n = (0.2, 1.0), (3 / 4, 4 / 3), 4000
    boxes = crop_boxes(_draws(n), "crop", 100, 100, scale=scale, ratio=ratio)
    torch.manual_seed(0)
    reference = RandomResizedCrop(1, scale=scale, ratio=ratio)
    image = torch.empty(1, 100, 100)
    theirs = torch.tensor(
        [
            [p["top"], p["left"], p["height"], p["width"]]
            for p in (reference.make_params([image]) for _ in range(n))
        ]
    ).float()
    # Four standard errors of the difference, and half a pixel for torchvision's rounding.
    error = 4 * (boxes.var(dim=0) / n + theirs.var(dim=0) / n).sqrt()
    assert ((boxes.mean(dim=0) - theirs.mean(dim=0)).abs() < error + 0.5).all()
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    difference = boxes.quantile(quantiles, dim=0) - theirs.quantile(quantiles, dim=0)
    assert difference.abs().max() < 3


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 64), (64, 8)])
def test_boxes_stay_inside_the_image(height: int, width: int) -> None:
    boxes = crop_boxes(_draws(500), "crop", height, width, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3))
    top, left, h, w = boxes.unbind(dim=1)
    assert (boxes >= 0).all()
    assert (top + h <= height + 1e-4).all()
    assert (left + w <= width + 1e-4).all()


@pytest.mark.parametrize("option", ["flip", "grayscale", "solarize", "blur", "erase", "jitter"])
def test_each_chance_has_its_probability(option: str) -> None:
    n = 2000
    images = _images(1, size := 3, 6, 6).expand(n, -1, -1, -1)
    strength = {"brightness": 0.9} if option == "jitter" else {}
    config = AugmentConfig(**{**WHOLE, option: 0.3, **strength}, blur_sigma=(1.0, 1.0))
    (views,) = _augment(config, size=6, channels=size)(images, _draws(n))
    changed = ((views - images).abs() > 1e-4).flatten(1).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.3, abs=0.04)


def test_brightness_is_uniform_between_its_bounds() -> None:
    config = AugmentConfig(**WHOLE, jitter=1.0, brightness=0.4)
    (views,) = _augment(config, size=4)(torch.full((3000, 3, 4, 4), 0.5), _draws(3000))
    factors = (views[:, 0, 0, 0] / 0.5).sort().values
    torch.testing.assert_close(factors, torch.linspace(0.6, 1.4, 3000), atol=0.03, rtol=0)


def test_a_hue_alone_is_turned_both_ways() -> None:
    config = AugmentConfig(**WHOLE, jitter=1.0, hue=0.1)
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(1000, 3, 4, 4)
    (views,) = _augment(config, size=4)(red, _draws(1000))
    green, blue = views[:, 1, 0, 0], views[:, 2, 0, 0]
    torch.testing.assert_close(
        (green - blue).sort().values, torch.linspace(-0.6, 0.6, 1000), atol=0.06, rtol=0
    )


def test_erased_areas_are_those_of_the_paper_and_hold_normal_noise() -> None:
    n = 1000
    (views,) = _augment(AugmentConfig(**WHOLE, erase=1.0), size=32)(
        torch.zeros(n, 3, 32, 32), _draws(n)
    )
    erased = views != 0
    share = erased[:, 0].float().mean(dim=(1, 2))
    assert share.min() > 0.005
    assert share.max() < 0.36
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    noise = views[erased]
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)


def test_one_channel_has_no_colour_to_lose() -> None:
    colour = {"jitter": 1.0, "saturation": 0.9, "hue": 0.5, "grayscale": 1.0}
    images = _images(4, 1)
    plain, other = _augment(AugmentConfig(), AugmentConfig(**colour), channels=1)(images, _draws(4))
    assert plain.shape == other.shape
    (same,) = _augment(AugmentConfig(**colour), channels=1)(images, _draws(4))
    torch.testing.assert_close(plain, same)


# What a view depends on


def test_a_view_depends_on_its_sample_alone() -> None:
    images, draws = _images(32), _draws(32)
    augment = _augment(EVERYTHING)
    (whole,) = augment(images, draws)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    (shuffled,) = augment(images[order], Draws(0, 0, order))
    torch.testing.assert_close(shuffled, whole[order])
    (part,) = augment(images[4:7], Draws(0, 0, torch.arange(4, 7)))
    torch.testing.assert_close(part, whole[4:7])
    (later,) = augment(images, Draws(0, 1, torch.arange(32)))
    assert not torch.equal(later, whole)


def test_views_are_independent_and_unmoved_by_others() -> None:
    images, draws = _images(500, 1, 8, 8), _draws(500)
    ramp = torch.linspace(0, 1, 8).expand(500, 1, 8, 8)
    config = AugmentConfig(crop_scale=(0.2, 1.0))
    first, second = _augment(config, config, channels=1)(ramp, draws)
    means = torch.stack([first.mean(dim=(1, 2, 3)), second.mean(dim=(1, 2, 3))])
    assert abs(float(torch.corrcoef(means)[0, 1])) < 0.15
    views = _augment(config, AugmentConfig(count=2, size=5), channels=1)(images, draws)
    (alone,) = _augment(config, channels=1)(images, draws)
    torch.testing.assert_close(views[0], alone)
    assert not torch.equal(views[1], views[2])


def test_sizes_follow_the_counts() -> None:
    augment = _augment(AugmentConfig(count=2), AugmentConfig(size=6, count=3), size=12)
    assert augment.sizes == (12, 12, 6, 6, 6)
    views = augment(_images(), _draws(6))
    assert tuple(view.shape[-1] for view in views) == augment.sizes
    assert augment.in_workers == ""


def test_the_images_given_are_left_as_they_are() -> None:
    config = AugmentConfig(**{**WHOLE, "flip": 0.5}, solarize=1.0, blur=0.5)
    images, stored = _images(), _stored()
    kept, kept_stored = images.clone(), stored.clone()
    augment = _augment(config, size=20)
    augment(images, _draws(6))
    augment.finish([images], _draws(6))
    augment.finish([stored], _draws(6))
    assert torch.equal(images, kept)
    assert torch.equal(stored, kept_stored)


def test_bytes_and_floats_give_the_same_views() -> None:
    stored, draws = _stored(16), _draws(16)
    augment = _augment(EVERYTHING)
    torch.testing.assert_close(augment(stored, draws), augment(stored.float() / 255, draws))
    torch.testing.assert_close(augment.plain(stored), augment.plain(stored.float() / 255))


@GPU
def test_a_gpu_makes_what_the_cpu_makes() -> None:
    stored, index = _stored(64), torch.arange(64)
    augment = _augment(EVERYTHING, AugmentConfig(size=6, count=2))
    on_cpu = augment(stored, Draws(0, 0, index))
    on_gpu = augment(stored.cuda(), Draws(0, 0, index.cuda()))
    for ours, theirs in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), atol=2e-3, rtol=0)


def test_computing_for_all_and_selecting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, draws = _images(32), _draws(32)
    subset = _augment(EVERYTHING)(images, draws)

    def select(chosen: Tensor, change: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        return torch.where(chosen[:, None, None, None], change(x, *rest), x)

    monkeypatch.setattr(module, "_where", select)
    torch.testing.assert_close(_augment(EVERYTHING)(images, draws), subset)


# In workers


@pytest.mark.parametrize("channels", [1, 3])
def test_workers_make_the_views_of_the_device_up_to_rounding(channels: int) -> None:
    config = AugmentConfig(
        crop_scale=(0.5, 1.0), jitter=0.8, brightness=0.4, hue=0.05, grayscale=0.3, blur=0.5
    )
    augment = _augment(config, AugmentConfig(size=16), size=32, channels=channels)
    smooth = torch.nn.functional.interpolate(_images(8, channels, 4, 4), 64, mode="bilinear")
    stored, draws = (smooth * 255).round().to(torch.uint8), _draws(8)
    crops = [augment.cut(stored[i], Draws(0, 0, torch.tensor([i]))) for i in range(8)]
    batches = [torch.stack(views) for views in zip(*crops, strict=True)]
    assert [batch.dtype for batch in batches] == [torch.uint8] * 2
    finished = augment.finish(batches, draws)
    for ours, direct in zip(finished, augment(stored, draws), strict=True):
        assert ours.shape == direct.shape
        assert (ours - direct).abs().mean() < 0.02


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_box_of_less_than_a_pixel_is_cut_as_one(size: int) -> None:
    augment = _augment(AugmentConfig(crop_scale=(0.001, 0.01)), size=3)
    image = _stored(1, 3, size)[0]
    for i in range(20):
        (view,) = augment.cut(image, Draws(0, 0, torch.tensor([i])))
        assert view.shape == (3, 3, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_keyed_by_sample_and_leaves_global_randomness_alone(channels: int) -> None:
    config = AugmentConfig(**WHOLE, rand_augment=9)
    augment = pickle.loads(pickle.dumps(_augment(config, size=20, channels=channels)))
    stored = _stored(40, channels)
    before = torch.get_rng_state()
    first, again = (
        [augment.cut(x, Draws(0, 0, torch.tensor([i])))[0] for i, x in enumerate(stored)]
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(first, stored, strict=True)]
    assert sum(changed) > 25
    (other,) = augment.cut(stored[0], Draws(1, 0, torch.tensor([0])))
    assert not torch.equal(other, first[0])


def test_rand_augment_is_refused_in_batches() -> None:
    augment = _augment(AugmentConfig(rand_augment=9))
    assert "rand_augment" in augment.in_workers
    with pytest.raises(RecipeError, match=r"augment\.rand_augment .*; set it to 0"):
        augment(_images(), _draws(6))


# Whole images and settings


def test_plain_is_the_whole_image_normalised() -> None:
    augment = Augment([AugmentConfig()], size=12, mean=(0.5, 0.25), std=(0.5, 2.0))
    flat = augment.plain(torch.ones(1, 2, 8, 8))
    torch.testing.assert_close(flat[0, :, 0, 0], torch.tensor([1.0, 0.375]))
    images = _images(2, 2, 12, 12)
    torch.testing.assert_close(augment.plain(images), augment.normalize(images))
    assert augment.plain(_images(2, 2, 30, 17)).shape == (2, 2, 12, 12)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"size": -1},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"flip": 2},
        {"jitter": -0.1},
        {"jitter": 0.8},
        {"brightness": -1},
        {"contrast": float("nan")},
        {"saturation": float("inf")},
        {"hue": 0.6},
        {"grayscale": 1.5},
        {"blur": float("nan")},
        {"blur_sigma": (0.0, 2.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"solarize": 7},
        {"rand_augment": 11},
        {"erase": -1},
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"augment.{next(iter(options))}"):
        AugmentConfig(**options)
