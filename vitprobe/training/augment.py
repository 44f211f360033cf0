"""Augmentation of a whole batch at once, on the device where the images live.

Cropping, resizing, mirroring and blurring are linear and act on rows and columns apart. For each
sample they are therefore two small matrices, and a batch of crops is two batched matrix products:
antialiased, without workers, and without a copy to the host. On one CPU core this cuts about twice
as many views of 28 to 32 pixels as bicubic `grid_sample`, which does not antialias, and as many of
224.

Colours follow torchvision's definitions. What only some samples get is computed for those alone on
the CPU; elsewhere it is computed for all and selected, for counting the chosen ones would make the
host wait for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandAugment
from torchvision.transforms.v2.functional import resized_crop

from vitprobe.errors import RecipeError
from vitprobe.training.randomness import Draws

_CROP_ATTEMPTS = 10
_ERASE_SCALE, _ERASE_RATIO = (0.02, 1 / 3), (0.3, 3.3)
_RAND_AUGMENT_LEVELS = 11
_BLUR_RADIUS = 11
# Chances and amounts that one stream of a view provides, uniform on [0, 1).
_LOOK = (
    *("flip", "jitter", "grayscale", "blur", "solarize", "erase"),
    *("sigma", "brightness", "contrast", "saturation", "hue"),
)
# In the order in which `jitter` numbers them.
_JITTER = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class AugmentConfig:
    """How one kind of view is drawn from an image.

    count: how many views are drawn this way from each image.
    size: side of the view in pixels; 0 is the encoder's image size.
    crop_scale: smallest and largest share of the image's area.
    crop_ratio: smallest and largest width / height.
    flip: probability of a horizontal flip.
    jitter: probability of colour jitter, whose strengths follow. Factors of brightness, contrast
        and saturation are uniform in [max(0, 1 - s), 1 + s], the shift of hue in [-hue, hue] turns,
        and their order is random, as in torchvision's ColorJitter. Images of one channel know
        brightness and contrast only.
    grayscale: probability of losing all colour.
    blur: probability of a Gaussian blur; `blur_sigma`, in pixels of the view, is uniform.
    solarize: probability that values of one half and more are inverted.
    rand_augment: magnitude, 0 (off) to 10, of two operations of RandAugment (Cubuk et al. 2020).
    erase: probability of random erasing (Zhong et al. 2020), filled with normal noise.
    """

    count: int = 1
    size: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    rand_augment: int = 0
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RecipeError(f"augment.count must be at least 1, not {self.count}.")
        if self.size < 0:
            raise RecipeError(f"augment.size must be 0 or a number of pixels, not {self.size}.")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise RecipeError(
                f"augment.crop_scale must rise within (0, 1], not {list(self.crop_scale)}."
            )
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise RecipeError(f"augment.{name} must be positive and rise, not {[low, high]}.")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize", "erase"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"augment.{name} must be a probability, not {value}.")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RecipeError(f"augment.{name} must not be negative, but is {value}.")
        if not 0 <= self.hue <= 0.5:
            raise RecipeError(f"augment.hue must lie within 0 and 0.5 turns, not {self.hue}.")
        if self.jitter and not (self.brightness or self.contrast or self.saturation or self.hue):
            raise RecipeError(
                f"augment.jitter is {self.jitter}, but there is nothing to change: give one of "
                "augment.brightness, contrast, saturation, hue, or set it to 0."
            )
        if not 0 <= self.rand_augment < _RAND_AUGMENT_LEVELS:
            raise RecipeError(
                f"augment.rand_augment must be a magnitude from 0 to {_RAND_AUGMENT_LEVELS - 1}, "
                f"not {self.rand_augment}."
            )


class Augment:
    """Turns stored images into the normalised views that methods read.

    views: the kinds of view, in order; size: the encoder's image size; mean, std: per channel.
    """

    def __init__(
        self,
        views: Sequence[AugmentConfig],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.size = size
        self._mean, self._std = tuple(mean), tuple(std)
        configs = [config for config in views for _ in range(config.count)]
        self._views = [
            _View(config, f"view {i}", config.size or size, self._mean, self._std)
            for i, config in enumerate(configs)
        ]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The side of every view, in order."""
        return tuple(view.size for view in self._views)

    @property
    def in_workers(self) -> str:
        """Why images cannot be augmented in batches on their device; "" where they can."""
        if any(view.config.rand_augment for view in self._views):
            return "augment.rand_augment changes one image at a time"
        return ""

    def __call__(self, images: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """Every view of images (b, c, h, w), uint8 or float32 in [0, 1]: each (b, c, s, s) float32.

        Raises RecipeError where `in_workers` gives a reason.
        """
        if self.in_workers:
            raise RecipeError(f"{self.in_workers}; set it to 0 to augment in batches.")
        images = _unit(images)
        return tuple(view(images, draws) for view in self._views)

    def cut(self, image: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """The crops of one image (c, h, w) uint8, for `finish`: each (c, s, s) uint8.

        The boxes are those of `__call__`, rounded to whole pixels. `draws` are of that one sample.
        """
        return tuple(view.cut(image, draws) for view in self._views)

    def finish(self, crops: Sequence[Tensor], draws: Draws) -> tuple[Tensor, ...]:
        """All that follows `cut`, for a batch of each crop: (b, c, s, s) uint8 → float32."""
        return tuple(
            view.finish(batch, draws) for view, batch in zip(self._views, crops, strict=True)
        )

    def plain(self, images: Tensor) -> Tensor:
        """Whole images, resized (bicubic, antialiased) and normalised.

        (b, c, h, w) uint8 or float32 in [0, 1] → (b, c, size, size) float32.
        """
        shape = (self.size, self.size)
        resized = F.interpolate(
            _unit(images), shape, mode="bicubic", antialias=True, align_corners=False
        )
        return self.normalize(resized.clamp(0, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std per channel, of images in [0, 1]."""
        return _normalize(images, self._mean, self._std)


class _View:
    """One of the views: its random numbers come from streams named after it alone."""

    def __init__(
        self,
        config: AugmentConfig,
        name: str,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.config = config
        self.name = name
        self.size = size
        self.mean, self.std = mean, std
        fill = [round(255 * value) for value in mean]
        self._rand_augment = RandAugment(2, config.rand_augment, _RAND_AUGMENT_LEVELS, fill=fill)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        look = self._look(draws)
        boxes = self._boxes(draws, *images.shape[-2:])
        crops = crop(images, boxes, self.size, look["flip"] < self.config.flip)
        return self._appear(crops, look, draws)

    def cut(self, image: Tensor, draws: Draws) -> Tensor:
        height, width = image.shape[-2:]
        top, left, h, w = self._boxes(draws, height, width)[0].tolist()
        (top, h), (left, w) = _whole(top, h, height), _whole(left, w, width)
        shape = [self.size, self.size]
        view = resized_crop(
            image, top, left, h, w, shape, InterpolationMode.BICUBIC, antialias=True
        )
        if not self.config.rand_augment:
            return view
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the generators of GPUs as well.
            torch.default_generator.manual_seed(int(draws.bits(f"{self.name} rand augment", 1)))
            return self._rand_augment(view)

    def finish(self, crops: Tensor, draws: Draws) -> Tensor:
        look = self._look(draws)
        images = _unit(crops)
        flipped = look["flip"] < self.config.flip
        images = torch.where(_per_sample(flipped), images.flip(-1), images)
        return self._appear(images, look, draws)

    def _look(self, draws: Draws) -> dict[str, Tensor]:
        numbers = draws.uniform(f"{self.name} look", len(_LOOK))
        return dict(zip(_LOOK, numbers.unbind(dim=1), strict=True))

    def _boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        scale, ratio = self.config.crop_scale, self.config.crop_ratio
        return crop_boxes(draws, f"{self.name} crop", height, width, scale=scale, ratio=ratio)

    def _appear(self, images: Tensor, look: dict[str, Tensor], draws: Draws) -> Tensor:
        """Colour, blur, solarise, normalise and erase; overwrites images (b, c, s, s).

        A flip, done with the crop already, commutes with all that precede erasing.
        """
        config = self.config
        coloured = images.shape[1] == 3
        kinds = [kind for kind in _JITTER if coloured or kind in ("brightness", "contrast")]
        if config.jitter and any(getattr(config, kind) for kind in kinds):
            if not config.hue and coloured:
                kinds.remove("hue")  # by far the dearest
            amounts = [_amount(kind, getattr(config, kind), look[kind]) for kind in kinds]
            order = draws.permutation(f"{self.name} order", len(kinds))
            chosen = look["jitter"] < config.jitter
            images = _where(chosen, jitter, images, torch.stack(amounts, dim=1), order)
        if config.grayscale and coloured:
            images = _where(look["grayscale"] < config.grayscale, grayscale, images)
        if config.blur:
            low, high = config.blur_sigma
            sigma = low + (high - low) * look["sigma"]
            images = _where(look["blur"] < config.blur, blur, images, sigma)
        if config.solarize:
            images = _where(look["solarize"] < config.solarize, solarize, images)
        images = _normalize(images, self.mean, self.std)
        if config.erase:

            def fill(images: Tensor, index: Tensor) -> Tensor:
                own = dataclasses.replace(draws, index=index)
                boxes = crop_boxes(
                    own,
                    f"{self.name} erase",
                    *images.shape[-2:],
                    scale=_ERASE_SCALE,
                    ratio=_ERASE_RATIO,
                )
                noise = own.normal(f"{self.name} noise", images[0].numel())
                return erase(images, boxes, noise.view_as(images))

            images = _where(look["erase"] < config.erase, fill, images, draws.index)
        return images


def crop_boxes(
    draws: Draws,
    stream: str,
    height: int,
    width: int,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> Tensor:
    """Boxes of a random resized crop (Szegedy et al. 2015), in pixels: (b, 4) top, left, h, w.

    Area is uniform in `scale` of the image, width / height log-uniform in `ratio`, drawn up to ten
    times until the box fits, as in torchvision's RandomResizedCrop but without rounding to whole
    pixels. Where none of the ten fits, the first is cut down to the image at a random place
    (torchvision takes the largest centred box of an allowed ratio).
    """
    numbers = draws.uniform(stream, 2 * _CROP_ATTEMPTS + 2)
    area_draw, ratio_draw, place = numbers.split([_CROP_ATTEMPTS, _CROP_ATTEMPTS, 2], dim=1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * ratio_draw)
    box_w, box_h = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    fits = (box_w <= width) & (box_h <= height)
    # argmax of an all-False row is 0: the first attempt, cut down to the image.
    first = fits.int().argmax(dim=1, keepdim=True)
    w = box_w.gather(1, first)[:, 0].clamp(max=width)
    h = box_h.gather(1, first)[:, 0].clamp(max=height)
    top, left = place.unbind(dim=1)
    return torch.stack([top * (height - h), left * (width - w), h, w], dim=1)


def crop(images: Tensor, boxes: Tensor, size: int, flipped: Tensor) -> Tensor:
    """Cut and resize boxes (b, 4) top, left, height, width in pixels; flip where `flipped` (b,).

    (b, c, h, w) → (b, c, size, size), antialiased bicubic, clamped to [0, 1]. As in torchvision's
    resized_crop nothing outside a box is read; a pixel partly inside counts in proportion.
    """
    top, left, h, w = boxes.unbind(dim=1)
    rows = _resizing(top, h, images.shape[-2], size, torch.zeros_like(flipped))
    columns = _resizing(left, w, images.shape[-1], size, flipped)
    return _separable(images, rows, columns).clamp_(0, 1)


def _resizing(start: Tensor, length: Tensor, n: int, size: int, backwards: Tensor) -> Tensor:
    """(b, size, n): weights by which n pixels make `size` ones of the span [start, start + length).

    The `size` new ones run from end to start where `backwards` (b,).
    Keys' cubic convolution (1981) with a = -1/2, stretched where it reduces, as torch antialiases.
    """
    scale = (length / size)[:, None]
    place = torch.arange(size, device=start.device) + 0.5
    centre = start[:, None] + scale * torch.where(backwards[:, None], size - place, place)
    pixel = torch.arange(n, device=start.device)
    end = (start + length)[:, None]
    inside = (torch.minimum(pixel + 1, end) - torch.maximum(pixel, start[:, None])).clamp_(0, 1)
    stretch = scale.clamp(min=1)
    distance = ((pixel + 0.5) / stretch)[:, None, :] - (centre / stretch)[:, :, None]
    distance.abs_()
    # With u = 2 - |x| and v = 1 - |x|, each 0 where negative, the kernel's two cubic pieces are
    # u²(u - 1)/2 + v²(1 - 2v): no branch, and few passes over what is as large as the images.
    u, v = (2 - distance).clamp_(min=0), (1 - distance).clamp_(min=0)
    outer = u.mul(0.5).sub_(0.5).mul_(u).mul_(u)
    weights = v.mul(-2).add_(1).mul_(v).mul_(v).add_(outer).mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows (b, s, h) · images (b, c, h, w) · columns (b, t, w) transposed: (b, c, s, t)."""
    # One channel after the other: broadcasting over them would copy the matrices.
    return torch.stack([rows @ (x @ columns.mT) for x in images.unbind(dim=1)], dim=1)


def jitter(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """Colour jitter of images (b, c, h, w) in [0, 1], each in an order of its own.

    amounts: (b, n) factors of brightness, contrast and saturation, then the shift of hue in turns;
    order: (b, n) a permutation of those n. n = 2 for other than colour images, at least 3 for them.
    """
    for kind in order.unbind(dim=1):
        amount = amounts.gather(1, kind[:, None])[:, 0]
        factor = torch.where(kind == 3, 1.0, amount)
        light = _luminance(images)
        # The three blend with black, the mean luminance and each pixel's luminance; hue with none.
        rest = 1 - factor
        blend = light.mul(_per_sample(rest * (kind == 2)))
        blend.add_(light.mean(dim=(1, 2, 3), keepdim=True) * _per_sample(rest * (kind == 1)))
        images = images.mul(_per_sample(factor)).add_(blend).clamp_(0, 1)
        if amounts.shape[1] > 3:
            images = _where(kind == 3, shift_hue, images, amount)
    return images


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (b, 3, h, w) by `turns` (b,), keeping HSV's saturation and value."""
    red, green, blue = images.unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    divisor = torch.where(chroma > 0, chroma, 1.0)
    # The hue in sixths of a turn, from the channel that is largest.
    hue = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue.add_(6 * turns[:, None, None]).remainder_(6)
    shares = [(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()]
    return torch.stack([low + chroma * share.clamp_(0, 1) for share in shares], dim=1)


def grayscale(images: Tensor) -> Tensor:
    """Luminance in place of every channel: (b, 3, h, w) → the same."""
    return _luminance(images).expand_as(images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (b, c, s, s) by `sigma` (b,) pixels, reflecting at the borders.

    The kernel is cut at 11 pixels, or at a quarter of a view of less than 44: 23 taps from there
    on, as SimCLR's (Chen et al. 2020) at 224 pixels.
    """
    size = images.shape[-1]
    radius = min(_BLUR_RADIUS, size // 4)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.softmax(-0.5 * (distance / sigma[:, None]).square(), dim=1)
    matrix = (taps @ _reflections(size, radius, images.device)).view(-1, size, size)
    return _separable(images, matrix, matrix)


@functools.lru_cache(maxsize=16)
def _reflections(size: int, radius: int, device: torch.device) -> Tensor:
    """(2 radius + 1, size x size): 1 where a tap around an output pixel lands, once reflected."""
    place = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    inside = size - 1 - (size - 1 - place.abs()).abs()
    return F.one_hot(inside, size).transpose(0, 1).flatten(1).to(device, torch.float32)


def solarize(images: Tensor) -> Tensor:
    """Invert the values of one half and more, of images in [0, 1]."""
    return torch.where(images >= 0.5, 1 - images, images)


def erase(images: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """`noise` in place of the pixels of images (b, c, h, w) whose centre lies in `boxes` (b, 4)."""
    top, left, h, w = boxes[:, :, None].unbind(dim=1)
    row, column = (torch.arange(n, device=images.device) + 0.5 for n in images.shape[-2:])
    rows, columns = (row >= top) & (row < top + h), (column >= left) & (column < left + w)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], noise, images)


def _where(
    chosen: Tensor, change: Callable[..., Tensor], images: Tensor, *parameters: Tensor
) -> Tensor:
    """change(images, *parameters) where `chosen` (b,); may overwrite images (b, c, h, w)."""
    if images.device.type != "cpu":
        return torch.where(_per_sample(chosen), change(images, *parameters), images)
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        images.index_copy_(0, rows, change(images[rows], *(values[rows] for values in parameters)))
    return images


def _amount(kind: str, strength: float, number: Tensor) -> Tensor:
    """What a number uniform on [0, 1) makes of the strength of one kind of colour jitter."""
    low, high = (-strength, strength) if kind == "hue" else (max(0.0, 1 - strength), 1 + strength)
    return low + (high - low) * number


def _whole(start: float, length: float, n: int) -> tuple[int, int]:
    """The span of at least one whole pixel out of n that is nearest to start, length."""
    first = min(round(start), n - 1)
    return first, max(round(start + length) - first, 1)


def _luminance(images: Tensor) -> Tensor:
    """(b, 1, h, w): ITU-R BT.601 luminance of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - _channels(mean, images.device)).div_(_channels(std, images.device))


@functools.lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, for a copy to the device at every call would make the host wait for it.
    return torch.tensor(values, device=device)[:, None, None]


def _unit(images: Tensor) -> Tensor:
    """Values in [0, 1] as float32, of uint8 or of such floats."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _per_sample(values: Tensor) -> Tensor:
    """(b,) → (b, 1, 1, 1)."""
    return values[:, None, None, None]
