"""Made pictures of shapes, with a mask for each: data for detection and segmentation without any.

Circles, squares, triangles and crosses of any size and direction lie on a greyish background of
smooth noise, some behind others. A class has its outline and, as the set is told, its range of
hues, by which a small model learns it from some hundred pictures, its texture, or nothing else.
Every picture is a function of (seed, part, number), so that two machines make the same set.
"""

from __future__ import annotations

import colorsys
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitprobe.errors import DataError, ResultError

CLASSES: Final = ("circle", "square", "triangle", "cross")
_PARTS: Final = ("train", "val")
Cue = Literal["hue", "texture", "none"]
_FINE: Final = 4
"""Masks are drawn this much finer than they are kept, so that edges fall where they should."""
_SEEN: Final = 0.5
"""Least share of a shape that others leave to be seen."""
_CONTRAST: Final = 60
"""Least distance in RGB between a shape's colour and that of what it covers."""
_HUES: Final = 0.4
"""How far a hue lies from that of its class, in distances between classes: they do not overlap."""
_IGNORED: Final = 255
# As in PASCAL VOC: a pixel's value is its class, and the colour is for looking at. All 256 colours
# are there, as Pillow would store fewer in too few bits for what is ignored.
_COLOURS: Final = (0, 0, 0, 230, 159, 0, 86, 180, 233, 0, 158, 115, 204, 121, 167)
_PALETTE: Final = [*_COLOURS, *(3 * 256 - len(_COLOURS)) * [255]]


@dataclass(frozen=True)
class Shapes:
    """How a set is made.

    seed: of all pictures. train, val: how many. size: side in pixels.
    fewest, most: shapes in a picture.
    cue: what a class has besides its outline: its range of hues ("hue"); its texture ("texture":
        fine stripes, coarse ones, checks or grain, in any place and direction), with every class in
        all hues; or nothing ("none"), with all hues too.
    """

    seed: int = 0
    train: int = 800
    val: int = 200
    size: int = 64
    fewest: int = 1
    most: int = 3
    cue: Cue = "hue"

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise DataError(f"a set of {self.train} and {self.val} pictures; give at least 1 each")
        if self.seed < 0:
            raise DataError(f"the seed of the shapes must be at least 0, not {self.seed}")
        if self.size < 32:
            raise DataError(f"shapes need pictures of at least 32 pixels, not {self.size}")
        if not 0 <= self.fewest <= self.most:
            raise DataError(f"from {self.fewest} to {self.most} shapes is no range")
        if self.cue not in get_args(Cue):
            raise DataError(f"no cue '{self.cue}'; choose one of {', '.join(get_args(Cue))}")


def shapes_of(source: str) -> Shapes | None:
    """The set that `shapes` or `shapes:SEED` names; None for what names another.

    Raises:
        DataError: the seed is none.
    """
    name, colon, seed = source.partition(":")
    if name != "shapes":
        return None
    if colon and not (seed.isascii() and seed.isdigit()):
        raise DataError(f"'{source}' names no seed; write it as shapes:1")
    return Shapes(seed=int(seed or 0))


class Picture(NamedTuple):
    """One picture.

    image: (size, size, 3) uint8. masks: (n, size, size) bool, of what is seen of each shape.
    labels: (n,) int64, indices into `CLASSES`.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]


def draw(shapes: Shapes, part: str, number: int) -> Picture:
    """The picture of that number in "train" or "val"."""
    rng = np.random.default_rng([shapes.seed, _PARTS.index(part), number])
    size = shapes.size
    image = _background(rng, size)
    masks: list[NDArray[np.bool_]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(shapes.fewest, shapes.most + 1))):
        label, mask = _shape(rng, size)
        behind = [other & ~mask for other in masks]
        seen = all(
            now.sum() >= _SEEN * before.sum() for now, before in zip(behind, masks, strict=True)
        )
        # A shape that would hide another is left out, so that no mask is a sliver.
        if not seen or mask.sum() < 9:
            continue
        masks = [*behind, mask]
        labels.append(label)
        around = image[mask].mean(axis=0)
        coat = _coat(rng, size, label, shapes.cue)
        while np.linalg.norm(coat[mask].mean(axis=0) - around) < _CONTRAST:
            coat = _coat(rng, size, label, shapes.cue)
        image[mask] = coat[mask]
    stacked = np.stack(masks) if masks else np.zeros((0, size, size), dtype=bool)
    image += 8 * rng.standard_normal(image.shape, dtype=np.float32)
    pixels = image.clip(0, 255).round().astype(np.uint8)
    return Picture(pixels, stacked, np.array(labels, dtype=np.int64))


def _background(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """(size, size, 3) of smooth noise between two greyish colours."""
    one, other = (
        _rgb(rng.uniform(), rng.uniform(0, 0.3), rng.uniform(0.15, 0.85)) for _ in range(2)
    )
    return _mixed(_smooth(rng, size), one, other)


def _coat(rng: np.random.Generator, size: int, label: int, cue: Cue) -> NDArray[np.float32]:
    """(size, size, 3) that a shape of that class is cut from: two shades of a hue."""
    spread = _HUES if cue == "hue" else len(CLASSES) / 2
    hue = (label + rng.uniform(-spread, spread)) / len(CLASSES)
    saturation, value = rng.uniform(0.5, 1), rng.uniform(0.4, 1)
    textured = cue == "texture"
    share = _texture(rng, size, label) if textured else _smooth(rng, size)
    darker = (0.3 if textured else 0.7) * value
    return _mixed(share, _rgb(hue, saturation, value), _rgb(hue, saturation, darker))


def _mixed(share: NDArray[Any], one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float32]:
    share = share[..., None]
    mixed: NDArray[np.float32] = (share * one + (1 - share) * other).astype(np.float32)
    return mixed


def _smooth(rng: np.random.Generator, size: int) -> NDArray[Any]:
    """(size, size) of noise, in [0, 1] but for what interpolation adds."""
    coarse = Image.fromarray(rng.uniform(0, 1, (5, 5)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, size: int, label: int) -> NDArray[Any]:
    """(size, size) in [0, 1]: that class's texture, its phase and direction drawn anew."""
    down, across = np.mgrid[:size, :size]
    turn = rng.uniform(0, math.tau)

    def stripes(shortest: float, longest: float, turn: float) -> NDArray[Any]:
        place = across * math.cos(turn) + down * math.sin(turn)
        waves: NDArray[Any] = np.sin(
            math.tau * place / rng.uniform(shortest, longest) + rng.uniform(0, math.tau)
        )
        return waves

    match CLASSES[label]:
        case "circle":
            wave = stripes(3, 3.6, turn)
        case "square":
            wave = stripes(5.5, 7, turn)
        case "triangle":
            wave = 1.4 * stripes(4, 5.5, turn) * stripes(4, 5.5, turn + math.tau / 4)
        case _:
            wave = rng.standard_normal((size, size))
    return (1 + wave.clip(-1, 1)) / 2


def _rgb(hue: float, saturation: float, value: float) -> NDArray[Any]:
    """In 0 … 255."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _shape(rng: np.random.Generator, size: int) -> tuple[int, NDArray[np.bool_]]:
    label = int(rng.integers(len(CLASSES)))
    radius = rng.uniform(0.14, 0.26) * size
    x, y = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
    turn = rng.uniform(0, math.tau)
    canvas = Image.new("L", (size * _FINE, size * _FINE))
    pen = ImageDraw.Draw(canvas)
    if CLASSES[label] == "circle":
        box = [
            (x - radius) * _FINE,
            (y - radius) * _FINE,
            (x + radius) * _FINE,
            (y + radius) * _FINE,
        ]
        pen.ellipse(box, fill=255)
    else:
        corners = _corners(CLASSES[label]) * radius
        spin = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        places = (corners @ spin.T + [x, y]) * _FINE
        pen.polygon([tuple(place) for place in places.tolist()], fill=255)
    fine = np.asarray(canvas).reshape(size, _FINE, size, _FINE)
    return label, fine.mean(axis=(1, 3)) > 127


def _corners(name: str) -> NDArray[np.float64]:
    """(n, 2) corners at distance 1 from the middle, or less."""
    if name == "cross":
        arm, end = 0.32, 0.95
        quarter = np.array([[end, -arm], [end, arm], [arm, arm]])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([quarter @ turn.T for turn in turns])
    number = {"square": 4, "triangle": 3}[name]
    angles = np.arange(number) * math.tau / number
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def write_shapes(folder: Path, shapes: Shapes) -> Path:
    """The set in both formats, folder/coco and folder/voc; whole or not at all.

    Raises:
        ResultError: the folder is there, or cannot be written.
    """
    if folder.exists():
        raise ResultError(f"'{folder}' exists; give another")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = folder.absolute().parent
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{folder.name}.") as aside:
            made = Path(aside) / "made"
            write_coco(made / "coco", shapes)
            write_voc(made / "voc", shapes)
            made.rename(folder)
    except OSError as error:
        raise ResultError(f"cannot write '{folder}': {error.strerror or error}") from error
    return folder


def write_coco(folder: Path, shapes: Shapes) -> Path:
    """The set in COCO's layout: annotations/instances_{train,val}.json and folders of images.

    `folder` is made; category ids are 1, 2, … in the order of `CLASSES`.
    """
    (folder / "annotations").mkdir(parents=True)
    for part in _PARTS:
        (folder / part).mkdir()
        images, annotations = [], []
        for number, name, picture in _pictures(shapes, part):
            Image.fromarray(picture.image).save(folder / part / name)
            side = shapes.size
            images.append({"id": number, "file_name": name, "height": side, "width": side})
            annotations += [
                {"id": 0, "image_id": number, "category_id": int(label) + 1, **_described(mask)}
                for mask, label in zip(picture.masks, picture.labels, strict=True)
            ]
        for i, annotation in enumerate(annotations):
            annotation["id"] = i + 1
        content = {
            "info": {"description": f"shapes, seed {shapes.seed}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        }
        path = folder / "annotations" / f"instances_{part}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_voc(folder: Path, shapes: Shapes) -> Path:
    """The set in PASCAL VOC's layout: JPEGImages, SegmentationClass, ImageSets/Segmentation.

    `folder` is made; class 0 is the background, and pixels along a shape's edge are ignored (255),
    as VOC's are. classes.txt names the classes.
    """
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for part in _PARTS:
        stems = []
        for _, name, picture in _pictures(shapes, part):
            stem = f"{part}_{Path(name).stem}"
            stems.append(stem)
            Image.fromarray(picture.image).save(folder / "JPEGImages" / f"{stem}.png")
            classes = Image.fromarray(class_map(picture), "P")
            classes.putpalette(_PALETTE)
            classes.save(folder / "SegmentationClass" / f"{stem}.png")
        listing = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
        listing.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    names = ("background", *CLASSES)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return folder


def class_map(picture: Picture) -> NDArray[np.uint8]:
    """(size, size): 0 background, i + 1 class i, 255 where a shape ends."""
    labels = np.zeros(picture.image.shape[:2], dtype=np.uint8)
    edges = np.zeros(labels.shape, dtype=bool)
    for mask, label in zip(picture.masks, picture.labels, strict=True):
        labels[mask] = label + 1
        padded = np.pad(mask, 1)
        inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        edges |= mask & ~inner
    labels[edges] = _IGNORED
    return labels


def _pictures(shapes: Shapes, part: str) -> Iterator[tuple[int, str, Picture]]:
    for i in range(getattr(shapes, part)):
        yield i + 1, f"{i + 1:06d}.png", draw(shapes, part, i)


def _described(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What COCO says of an instance: its run lengths, column by column, area and box."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    # Runs start with one of zeros, of no length where the first pixel is a one.
    counts = [0, *runs] if flat[0] else runs
    x, y = int(columns[0]), int(rows[0])
    return {
        "segmentation": {"size": list(mask.shape), "counts": counts},
        "area": int(mask.sum()),
        "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        "iscrowd": 0,
    }
