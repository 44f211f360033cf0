"""Images in blocks, each decoded about once, by whichever process owns its block.

Where an image cannot be decoded all that follow it move up by one, so no process can tell its
blocks alone. In rounds of one block a process, each decodes the images that it will own if all of
them can be decoded, and says which cannot; then all know the same list, and decode the few that
have moved to them. While the models run on a round, the next one is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitprobe.distributed import ALONE, Team
from vitprobe.errors import DataError

MINIMUM_TAIL: Final = 32
"""A last block of fewer images than this joins the block before it."""

LUMINANCE: Final = (0.299, 0.587, 0.114)  # ITU-R BT.601

Read = Callable[[], tuple[bytes, Image.Image | Tensor]]
"""Reads one image: its bytes and what they decode to."""
Source = Callable[[int], tuple[str, Read] | None]
"""Name of the image at a position of the order and how to read it; None beyond the last one."""


class View(NamedTuple):
    """What a model is given of an image: its input's channels and size."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Block:
    """Some images, decoded, for one step of a comparison."""

    first: int
    """Index of the first image in the whole run."""
    names: tuple[str, ...]
    views: dict[View, Tensor]
    """(images, channels, height, width) float32 in [0, 1]."""
    digests: tuple[bytes, ...] = ()
    """SHA-256 of what each image's file, or tensor, is made of."""


class Decoded(NamedTuple):
    """An image as the models want it, and the SHA-256 of what it was made of."""

    digest: bytes
    views: dict[View, Tensor]


class Listing:
    """Which images can be decoded, in order: what all processes know alike."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.digests: list[bytes] = []
        self.positions: list[int] = []
        self.undecodable: list[str] = []
        self.position = 0
        """Of the first image that is not known yet."""
        self._sha256 = hashlib.sha256()

    def add(self, name: str, digest: bytes | None) -> None:
        """The next image of the order; a digest of None: it cannot be decoded."""
        if digest is None:
            self.undecodable.append(name)
        else:
            self.names.append(name)
            self.digests.append(digest)
            self.positions.append(self.position)
            self._sha256.update(name.encode() + b"\0" + digest)
        self.position += 1

    @property
    def sha256(self) -> str:
        """Hash over the names and contents of the images, in order."""
        return self._sha256.hexdigest()


@dataclass
class Blocks:
    """The blocks of images that this process owns: of N processes, block b is that of b mod N."""

    source: Source
    listing: Listing
    """What is known already: the images of whole blocks. The rest is added to it."""
    views: Sequence[View]
    size: int
    """Images in a block; a last one of fewer than `MINIMUM_TAIL` joins the block before it."""
    length: int | None
    """Images of the source, or None: it has to be asked for one position after the other, so that
    every process reads all of them."""
    limit: int | None = None
    team: Team = ALONE

    def __post_init__(self) -> None:
        self._tail = min(self.size, MINIMUM_TAIL)
        self._asked: list[tuple[str, Future[Decoded | None] | None]] = []
        self._decoded: dict[int, Decoded] = {}
        self._ended = False

    def read(self, workers: int) -> Iterator[Block]:
        """The blocks, decoded in so many threads.

        Raises:
            DataError: the processes do not find the same images; what is known already are not the
                whole blocks of these images.
        """
        done = len(self.listing.names)
        step = self.size * self.team.size
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for start in count(done // step * step, step):
                # What follows a block says whether it is the last, and what of it belongs to it.
                self._complete(start + step + self._tail, pool)
                self._check_whole(done)
                first = start + self.size * self.team.rank
                block = self._block(first, pool) if first >= done else None
                self._forget(start + step)
                blocks = self._blocks(len(self.listing.names))
                last = self._final and start + step >= blocks * self.size
                if not last:
                    # A round ahead: decoded while the models run on this one.
                    self._ask(start + 2 * step + self._tail, pool)
                if block is not None:
                    yield block
                if last:
                    return

    @property
    def _final(self) -> bool:
        """Whether all images are known."""
        return self._ended or len(self.listing.names) == self.limit

    def _blocks(self, images: int) -> int:
        """How many blocks so many images make."""
        whole, rest = divmod(images, self.size)
        return max(min(images, 1), whole + (rest >= self._tail))

    def _check_whole(self, done: int) -> None:
        """Raise DataError unless so many images are whole blocks, now that those behind are known.

        Where there were others at the end, another block was the last one and took in a tail.
        """
        total = len(self.listing.names)
        blocks, rest = divmod(done, self.size)
        inside = rest == 0 and (not self._final or blocks < self._blocks(total))
        if not (inside or (self._final and done == total)):
            raise DataError(
                f"an earlier pass gave whole blocks of {done} images, which these {total} are not "
                "divided into; give the same images, or start again without what that pass has left"
            )

    def _owns(self, index: int) -> bool:
        """Whether this process is to decode an image, should all before it be decodable."""
        number, place = divmod(index, self.size)
        if self.length is not None:
            images = self.length - len(self.listing.undecodable)
            images = images if self.limit is None else min(images, self.limit)
            number = min(number, self._blocks(images) - 1)
        # Of a source without a length, these may turn out to be the end of the block before.
        elif place < self._tail and number > 0 and (number - 1) % self.team.size == self.team.rank:
            return True
        return number % self.team.size == self.team.rank

    def _complete(self, images: int, pool: ThreadPoolExecutor) -> None:
        """Know so many images, or all there are."""
        while self._asked or not (self._final or len(self.listing.names) >= images):
            if not self._asked:
                self._ask(images, pool)
            self._settle()

    def _ask(self, images: int, pool: ThreadPoolExecutor) -> None:
        """Begin to decode what is missing of so many images, as far as it is this process's."""
        known = len(self.listing.names)
        enough = images if self.limit is None else min(images, self.limit)
        for index in range(known, enough):
            item = self.source(self.listing.position + index - known)
            if item is None:
                return
            name, read = item
            future = None
            if self._owns(index):
                future = pool.submit(decode, read, self.views)
            elif self.length is None:
                future = pool.submit(decode, read, [])
            self._asked.append((name, future))

    def _settle(self) -> None:
        """Wait for what was asked for, and tell the other processes."""
        found: dict[int, bytes | None] = {}
        for place, (_, future) in enumerate(self._asked):
            if future is not None:
                decoded = future.result()
                found[place] = None if decoded is None else decoded.digest
                if decoded is not None and (decoded.views or not self.views):
                    self._decoded[self.listing.position + place] = decoded
        reports = self.team.exchange(found)
        if self.length is None and any(report != found for report in reports):
            raise DataError(
                "the processes of this run are given different images: let the DataLoader give all "
                "of them the same ones in the same order"
            )
        digests = {place: digest for report in reports for place, digest in report.items()}
        for place, (name, _) in enumerate(self._asked):
            self.listing.add(name, digests[place])
        ended = self.length is None and not self._asked
        self._ended = ended or self.listing.position == self.length
        self._asked = []

    def _block(self, first: int, pool: ThreadPoolExecutor) -> Block | None:
        """The block that begins with an image; None where there is none."""
        total = len(self.listing.names)
        stop = first + self.size
        if self._final:
            number, blocks = first // self.size, self._blocks(total)
            if number >= blocks:
                return None
            stop = total if number == blocks - 1 else stop
        images = slice(first, stop)
        positions = self.listing.positions[images]
        moved = {
            position: pool.submit(decode, item[1], self.views)
            for position in positions
            if position not in self._decoded and (item := self.source(position)) is not None
        }
        views = {view: torch.empty(len(positions), *view) for view in self.views}
        for place, position in enumerate(positions):
            image = moved[position].result() if position in moved else self._decoded.pop(position)
            digest = self.listing.digests[first + place]
            if image is None or image.digest != digest:
                raise DataError(
                    f"'{self.listing.names[first + place]}' is not the same in all processes of "
                    "this run; give them the same files"
                )
            for view, tensor in views.items():
                tensor[place] = image.views[view]
        names, digests = self.listing.names[images], self.listing.digests[images]
        return Block(first, tuple(names), views, tuple(digests))

    def _forget(self, images: int) -> None:
        """Drop what was decoded of the first so many images: others own it."""
        positions = set(self.listing.positions[images:])
        self._decoded = {p: image for p, image in self._decoded.items() if p in positions}


def resize(square: Tensor, view: View) -> Tensor:
    """Square images as a model wants them: (…, c, s, s) in [0, 1] → (…, channels, height, width).

    Bicubic with antialiasing, on floats; grey is repeated for three channels, and colour becomes
    ITU-R BT.601 luminance for one. One leading axis at most, of images.
    """
    channels = square.shape[-3]
    if channels == 3 and view.channels == 1:
        square = (square * square.new_tensor(LUMINANCE)[:, None, None]).sum(-3, keepdim=True)
    elif channels == 1 and view.channels == 3:
        square = square.expand(*square.shape[:-3], 3, -1, -1)
    elif channels != view.channels:
        raise DataError(
            f"images of {channels} channels cannot be given to a model of {view.channels}"
        )
    if square.shape[-2:] == (view.height, view.width):
        return square.contiguous()
    images = square if square.ndim == 4 else square[None]
    resized = F.interpolate(
        images, (view.height, view.width), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    return resized if square.ndim == 4 else resized[0]


def decode(read: Read, views: Sequence[View]) -> Decoded | None:
    """An image for models of these inputs; None: it cannot be decoded."""
    try:
        content, image = read()
        square = _square(image)
    except MemoryError:
        raise
    except Exception:
        # Pillow and the archive modules raise whatever damaged bytes lead them to.
        return None
    digest = hashlib.sha256(content).digest()
    return Decoded(digest, {view: resize(square, view) for view in views})


def _square(image: Image.Image | Tensor) -> Tensor:
    """The centre square as floats in [0, 1]: (1 or 3, side, side).

    Of the pixels as stored: an EXIF orientation is not applied, as in common evaluation code.
    """
    if isinstance(image, Tensor):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.mode.startswith(("I", "F")):
        values = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
        values = values / 65535 if image.mode.startswith("I") else values
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("grey values beyond what 16 bits or floats in [0, 1] can hold")
        return values[None]
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    tensor = torch.from_numpy(pixels.copy()).float() / 255
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
