"""Where the blocks of one model come from in a comparison: the model itself, or a probe file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vitprobe.data.blocks import Block
from vitprobe.data.images import Images
from vitprobe.errors import DataError
from vitprobe.forward import Forward
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.probe import Probe, ProbeWriter
from vitprobe.settings import Settings


class Source(Protocol):
    """Gives what one model has to say of each block of images."""

    def part(self, block: Block) -> ModelBlock:
        """What the model gives for a block."""
        ...

    def finish(self, images: Images) -> Path | None:
        """All images have gone by; the path of what was written, if anything was."""
        ...


class Live:
    """A model that is run, its blocks kept in a probe file where there is a writer."""

    def __init__(self, forward: Forward, writer: ProbeWriter | None = None) -> None:
        self.forward = forward
        self.writer = writer
        self._number = 0

    def part(self, block: Block) -> ModelBlock:
        """Runs the model on a block, unless an earlier run has left what it gives for it."""
        number, self._number = self._number, self._number + 1
        if self.writer is None:
            return self.forward.part(block)
        if number < self.writer.blocks:
            self.writer.check(number, block)
            return self.writer.block(number, block.first)
        made = self.forward.part(block)
        self.writer.add(block, made)
        return made

    def finish(self, images: Images) -> Path | None:
        """Makes the probe file."""
        return None if self.writer is None else self.writer.finish(images, self.forward.device)


class Read:
    """A model of which there is a probe file.

    Args:
        probe: the file.
        settings: of the comparison.
        where: the images of the comparison, as messages name them.
    """

    def __init__(self, probe: Probe, settings: Settings, where: str) -> None:
        self._probe = probe
        self._wanted = Wanted.of(probe, settings)
        self._where = where

    def part(self, block: Block) -> ModelBlock:
        """Reads a block, which has to be of the same images."""
        self._probe.images.check_block(self._probe.path, block, self._where)
        return self._probe.block(block.first, self._wanted)

    def finish(self, images: Images) -> None:
        """Checks that the images were all of those of the probe file."""
        ours = len(self._probe.images.used)
        if len(images.used) != ours:
            raise DataError(
                f"'{self._probe.path}' was probed on {ours} images and {self._where} has "
                f"{len(images.used)}; give the images that it was probed on"
            )


def kept_blocks(live: Sequence[Live]) -> list[Block]:
    """The blocks that an earlier run has left of all these models, without their pixels."""
    writers = [source.writer for source in live if source.writer is not None]
    if not writers or len(writers) < len(live):
        return []
    found: list[Block] = []
    for number in range(min(writer.blocks for writer in writers)):
        first = sum(len(block.names) for block in found)
        images = writers[0].named(number)
        found.append(Block(first, images.names, {}, images.digests))
    return found
