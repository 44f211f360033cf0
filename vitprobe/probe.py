"""Probe files: what one model gives for some images, for comparisons to come.

A comparison takes probe files among its models, with the result of the models themselves to the
last bit. So many models need not fit in memory together, one can be added later, and a run that was
killed goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from tqdm.auto import tqdm

from vitprobe import provenance
from vitprobe.block_arrays import Named, from_arrays, images_of, to_arrays
from vitprobe.capture.features import Convention
from vitprobe.data.blocks import Block, Listing, View
from vitprobe.data.images import Images
from vitprobe.data.images import images as as_images
from vitprobe.devices import find_device
from vitprobe.distributed import ALONE, Team, launched
from vitprobe.errors import DataError, MeasureError, ResultError, VitprobeError
from vitprobe.forward import Forward, running
from vitprobe.gather import Attention
from vitprobe.measures.tokens import TokenPolicy
from vitprobe.model_block import ModelBlock, Wanted
from vitprobe.models import Anatomy, Model
from vitprobe.models.saved_anatomy import read_anatomy, save_anatomy
from vitprobe.probe_file import (
    ANATOMY,
    FORMAT,
    PartialProbe,
    ProbeArchive,
    check_free,
    member,
    other_model,
)
from vitprobe.settings import DEFAULT_MEASURES, Precision, Settings

_DESCRIBED: Final = (
    *("name", "spec", "dialect", "parameters", "input_size", "mean", "std", "facts", "assumed"),
    *("report", "nonfinite", "training", "sha256"),
)
"""What `Model.describe` gives."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One model as a probe file has it; from `open_probe`.

    path: of the file.
    name: of the model.
    settings: with which it was probed.
    images: the list that it was probed on.
    anatomy: of the model.
    dtype: of its weights, such as "torch.float32".
    weights: SHA-256 of them.
    made: versions, device and time of the run that made it.
    sha256: of the file's header, which holds those of all its blocks.
    """

    path: Path
    name: str
    settings: Settings
    images: ProbedImages
    anatomy: Anatomy
    dtype: str
    weights: str
    made: dict[str, Any]
    sha256: str
    _archive: ProbeArchive = field(repr=False)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self._archive.header["model"]["input_size"]
        return channels, height, width

    @property
    def spec(self) -> str:
        """Where the model came from."""
        return str(self._archive.header["model"]["spec"])

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the model's architecture: value and evidence of each fact."""
        return dict(self.describe()["facts"])

    def describe(self) -> dict[str, Any]:
        """All that is known of the model, as JSON-able values."""
        return {**self._archive.header["model"], "name": self.name}

    def weights_sha256(self) -> str:
        """SHA-256 of the weights."""
        return self.weights

    def block(self, first: int, wanted: Wanted) -> ModelBlock:
        """What the model gave for the block that begins with image `first`, as far as wanted.

        Raises:
            ResultError: the file is damaged.
        """
        number = self.images.starts.index(first)
        count = len(self.images.named(number).names)
        name = member(number)
        held = Wanted.of(self, self.settings)
        try:
            return from_arrays(self._archive.tensors(name), held, wanted, first, count)
        except (
            *(ResultError, ValueError, TypeError, LookupError, AttributeError),
            *(OverflowError, RecursionError),
        ) as error:
            if isinstance(error, ResultError) and str(self.path) in str(error):
                raise
            self._archive.damaged(f"'{name}' {error}")

    def check(self, settings: Settings) -> None:
        """Raise MeasureError where a comparison asks otherwise than the model was probed."""
        ours = self.settings
        options = ["block", "layers", "tokens", "precision"]
        if Wanted.of(self, settings).subset:
            options.append("max_images")
        for option in options:
            probed, asked = getattr(ours, option), getattr(settings, option)
            if probed != asked:
                name = option.replace("_", " ")
                raise MeasureError(
                    f"'{self.path}' was probed with {name} {probed} and this comparison has "
                    f"{asked}; compare with {name} {probed}, or probe the model again"
                )
        held, wanted = Wanted.of(self, ours), Wanted.of(self, settings)
        lacking = [name for name in settings.attention if name not in ours.attention]
        lacking += [name for name in settings.layer_tokens if name not in ours.layer_tokens]
        if wanted.subset and not held.subset:
            lacking += [name for name in settings.similarity if name not in ("cka", "cka_rbf")]
        if wanted.grams and not held.grams:
            lacking += [name for name in settings.similarity if name in ("cka", "cka_rbf")]
        if lacking:
            raise MeasureError(
                f"'{self.path}' was probed for {', '.join(ours.named)} and holds nothing of "
                f"{', '.join(lacking)}; leave them out, or probe the model again with them"
            )


class ProbedImages(Images):
    """The images of a probe file, which are not at hand: names and digests alone."""

    starts: Sequence[int]

    @classmethod
    def read(cls, saved: Mapping[str, Any], starts: Sequence[int]) -> ProbedImages:
        """From the header of a probe file; starts: the first image of each block."""
        listing = Listing()
        for name, digest in zip(saved["names"], saved["digests"], strict=True):
            if not isinstance(name, str):
                raise TypeError(name)
            listing.add(name, bytes.fromhex(digest))
        listing.undecodable = [str(name) for name in saved["undecodable"]]
        found = cls(
            source=str(saved["source"]),
            names=listing.names,
            _open=_nothing,
            limit=saved["limit"],
            seed=saved["seed"],
            _listing=listing,
        )
        found.starts = starts
        return found

    def named(self, number: int) -> Named:
        """The images of a block."""
        stop = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.used)
        images = slice(self.starts[number], stop)
        return Named(tuple(self.used[images]), tuple(self.digests[images]))

    def blocks(
        self,
        views: Iterable[View],
        size: int,
        *,
        workers: int = 2,
        done: Sequence[tuple[str, bytes]] = (),
        team: Team = ALONE,
    ) -> Iterator[Block]:
        """The blocks of this process, without pixels.

        Raises:
            DataError: a model is to be run on them.
        """
        if list(views):
            self._open()
        for number in range(team.rank, len(self.starts), team.size):
            named = self.named(number)
            yield Block(self.starts[number], named.names, {}, named.digests)

    def check_same(self, path: Path, others: Images, where: str) -> None:
        """Raise DataError unless others are the same images, as far as they are known."""
        for what, ours, theirs in (
            ("limit", self.limit, others.limit),
            ("seed", self.seed, others.seed),
        ):
            if ours != theirs:
                had, has = (
                    f"no {what}" if value is None else f"{what} {value}" for value in (ours, theirs)
                )
                raise DataError(
                    f"'{path}' was probed with {had} of the images and {where} has {has}; give the "
                    f"same {what}, or probe the model again"
                )
        if isinstance(others, ProbedImages):
            known, digests = others.used, others.digests
            if len(known) != len(self.used):
                raise DataError(
                    f"'{path}' was probed on {len(self.used)} images and {where} has "
                    f"{len(known)}; probe both on the same"
                )
        else:
            lost = {*self.undecodable}
            known = [name for name in others.names or () if name not in lost]
            known = known if others.limit is None else known[: others.limit]
            digests = []
            if others.names is not None and len(known) != len(self.used):
                raise DataError(
                    f"'{path}' was probed on {len(self.used)} images and {where} has "
                    f"{len(known)}; give the images that it was probed on"
                )
        self._check_begin(path, 0, known, digests, where)

    def check_block(self, path: Path, block: Block, where: str) -> None:
        """Raise DataError unless a block is one of these, of the same images."""
        whole = block.first in self.starts and len(block.names) == len(
            self.named(self.starts.index(block.first)).names
        )
        if not whole:
            raise DataError(
                f"'{path}' has no block of {len(block.names)} images from image {block.first}, as "
                f"{where} has; give the images that it was probed on"
            )
        self._check_begin(path, block.first, block.names, block.digests, where)

    def _check_begin(
        self,
        path: Path,
        first: int,
        names: Sequence[str],
        digests: Sequence[bytes],
        where: str,
    ) -> None:
        for index, name in enumerate(names, first):
            if name != self.used[index]:
                raise DataError(
                    f"'{path}' was probed on '{self.used[index]}' as image {index}, where {where} "
                    f"has '{name}'; give the images that it was probed on"
                )
        for index, digest in enumerate(digests, first):
            if digest != self.digests[index]:
                raise DataError(
                    f"'{path}' was probed on another '{self.used[index]}' than {where} has, by the "
                    "same name; give the images that it was probed on"
                )


def _nothing() -> NoReturn:
    raise DataError("the images of a probe file are not at hand; give the images themselves")


def open_probe(path: str | os.PathLike[str], *, name: str | None = None) -> Probe:
    """A probe file, as a model for `compare`.

    Args:
        path: of the file; blocks are read from it one at a time, when they are wanted.
        name: of the model, in place of the one that it was probed under.

    Raises:
        ResultError: no such file, or one that is no probe file or damaged.
    """
    archive = ProbeArchive(Path(path))
    try:
        return _read(archive, name)
    except ResultError as error:
        if str(archive.path) in str(error):
            raise
        archive.damaged(str(error))
    except (
        *(KeyError, TypeError, ValueError, AttributeError, LookupError, RecursionError),
        VitprobeError,
    ) as error:
        archive.damaged(f"its header is not that of a model ({error})")


def describe_probe(probe: Probe) -> str:
    """What `vitprobe inspect` prints of a probe file, in plain text."""
    described, settings, images = probe.describe(), probe.settings, probe.images
    lost = f", {len(images.undecodable)} undecodable" if images.undecodable else ""
    facts, blocks = described["facts"], len(images.starts)
    sections: dict[str, list[tuple[str, object]]] = {
        "Probe file": [
            ("file", probe.path),
            ("sha256", probe.sha256),
            ("made", f"{probe.made['created']} on {probe.made['device']}"),
        ],
        "Model": [
            ("name", probe.name),
            *((key, described[key]) for key in ("spec", "dialect", "sha256")),
            ("parameters", f"{described['parameters']:,}"),
            ("weights", probe.weights),
            ("input", " x ".join(map(str, probe.input_size))),
            *((key, f"{fact['value']}  ({fact['evidence']})") for key, fact in facts.items()),
        ],
        "Settings": [
            ("measures", ", ".join(settings.named)),
            *((key, getattr(settings, key)) for key in ("layers", "tokens", "block", "precision")),
            ("max_images", settings.max_images),
        ],
        "Images": [
            ("source", images.source),
            ("used", f"{len(images.used)} in {blocks} block{'s' if blocks > 1 else ''}{lost}"),
            *(("limit", images.limit), ("seed", images.seed), ("sha256", images.sha256)),
        ],
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {key:<12}  {value}" for key, value in rows if value is not None)])
        for title, rows in sections.items()
    )


def _read(archive: ProbeArchive, name: str | None) -> Probe:
    header = archive.header
    model, settings = header["model"], dict(header["settings"])
    if missing := [key for key in _DESCRIBED if key not in model]:
        raise ResultError(f"its header does not say the model's {missing[0]}")
    if not all({"value", "evidence"} <= fact.keys() for fact in model["facts"].values()):
        raise ResultError("its header has facts of the model without a value or its evidence")
    if unknown := [name for name in model["assumed"] if name not in model["facts"]]:
        raise ResultError(f"its header assumes '{unknown[0]}', which is no fact of the model")
    if type(model["parameters"]) is not int:
        raise ResultError("its header gives the model no number of parameters")
    channels, height, width = model["input_size"]
    if not all(type(size) is int and 0 < size < 1 << 16 for size in (channels, height, width)):
        raise ResultError("its header gives the model an input that is no image")
    settings["measures"] = tuple(settings["measures"])
    images = header["images"]
    starts, counts = [int(first) for first in images["starts"]], len(images["names"])
    if (
        not starts
        or starts[0] != 0
        or not all(a < b for a, b in zip(starts, [*starts[1:], counts], strict=True))
    ):
        raise ResultError("its header has no order in its blocks")
    limit, seed = images["limit"], images["seed"]
    if not all(value is None or (type(value) is int and value >= 0) for value in (limit, seed)):
        raise ResultError("its header has a limit or seed of the images that is no number")
    listed = ProbedImages.read(images, starts)
    if listed.sha256 != images["sha256"]:
        raise ResultError("its list of images is not what its header says")
    made = header["provenance"]
    datetime.fromisoformat(made["created"])
    if not isinstance(made["device"], str) or not isinstance(made["versions"], dict):
        raise ResultError("its header does not say on what device and with what it was made")
    return Probe(
        path=archive.path,
        name=str(model["name"]) if name is None else name,
        settings=Settings(**settings, progress=False),
        images=listed,
        anatomy=read_anatomy(header["anatomy"], archive.tensors(ANATOMY)),
        dtype=str(header["dtype"]),
        weights=str(header["weights"]),
        made={key: made[key] for key in ("created", "device", "versions")},
        sha256=archive.sha256,
        _archive=archive,
    )


def probe(
    model: Model,
    images: Any,
    out: str | os.PathLike[str],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    layers: Convention = "normed",
    tokens: TokenPolicy = "patches",
    block: int = 128,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    limit: int | None = None,
    seed: int | None = None,
    workers: int = 2,
    progress: bool = True,
    max_images: int = 256,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Run one model over images and keep, in a probe file, what comparisons need of it.

    Blocks are written as they come to a folder beside `out`, which is removed at the end.

    Args:
        model: from `load` or `wrap`.
        images: whatever `vitprobe.images` takes.
        out: a name that ends in .probe.
        measures: that comparisons may then ask for, or fewer; everything else as in `compare`.
        resume: go on behind the last whole block of a run that was cut short, if there is one; a
            file that is there already, of the same model, settings and images, is left as it is.
        force: replace a file that is there, or what a run that was cut short has left.

    Returns:
        The path of the file.

    Raises:
        VitprobeError: as `compare`; and `out` is taken or cannot be written, or what is there to
            be resumed is of another model, other settings or other images.
    """
    settings = Settings(
        measures if isinstance(measures, str) else tuple(measures),
        layers=layers,
        tokens=tokens,
        block=block,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        progress=progress,
        max_images=max_images,
    )
    if not isinstance(model, Model):
        raise VitprobeError(
            f"cannot probe {type(model).__name__}: make a model of it with load or wrap"
        )
    if launched() > 1:
        raise VitprobeError(
            "a probe file is made by one process: start it without torchrun, one model a device"
        )
    source = as_images(images, limit=limit, seed=seed)
    check_free(Path(out), resume=resume, force=force)
    attention = Attention([model], settings.attention, settings.required)
    if not (settings.features or attention.measures):
        raise MeasureError(
            f"'{model.name}' has no attention, and nothing else was asked for; give other "
            "measures, such as cka"
        )
    Wanted.of(model, settings)
    if resume and Path(out).exists():
        found = open_probe(out)
        check_finished(found, model, settings, source)
        source.check_begin(list(zip(found.images.used, found.images.digests, strict=True)))
        return Path(out)
    device_ = find_device(settings.device)
    writer = ProbeWriter(Path(out), model, settings, source, device_, resume=resume, force=force)
    total = len(source) if source.names is not None else source.limit
    with (
        tqdm(
            total=total,
            initial=len(writer.done),
            unit=" images",
            desc=f"probing {model.name}",
            disable=None if settings.progress else True,
        ) as bar,
        running([model], settings, device_),
    ):
        forward = Forward(model, settings, device_)
        views = [View(*model.input_size)]
        for part in source.blocks(views, block, workers=workers, done=writer.done):
            writer.add(part, forward.part(part))
            bar.update(len(part.names))
    return writer.finish(source, device_)


class ProbeWriter:
    """Writes a probe file, block by block, as a comparison or `probe` runs the model.

    Args:
        out: the file.
        model: what is probed.
        settings: of the run.
        images: of the run.
        device: on which the model is run; blocks of another kind of device are not gone on with.
        resume: go on behind the blocks that are there.
        force: replace what is there.
    """

    def __init__(
        self,
        out: Path,
        model: Model,
        settings: Settings,
        images: Images,
        device: torch.device,
        *,
        resume: bool,
        force: bool,
    ) -> None:
        check_free(out, resume=resume, force=force)
        anatomy, tensors = save_anatomy(model.anatomy)
        about = {
            "format": FORMAT,
            "model": model.describe(),
            "dtype": model.dtype,
            "weights": model.weights_sha256(),
            "anatomy": anatomy,
            "settings": _kept_settings(settings),
            "device": device.type,
            "images": {"source": images.source, "limit": images.limit, "seed": images.seed},
        }
        self._partial = PartialProbe(out, about, tensors, resume=resume)
        self._model = model
        self._held = Wanted.of(model, settings)
        self._listed = [self._images(number) for number in range(self._partial.blocks)]

    @property
    def blocks(self) -> int:
        """How many whole blocks there are."""
        return self._partial.blocks

    @property
    def done(self) -> list[tuple[str, bytes]]:
        """Name and digest of the images of all whole blocks."""
        return [
            pair for part in self._listed for pair in zip(part.names, part.digests, strict=True)
        ]

    def _images(self, number: int) -> Named:
        try:
            return images_of(self._partial.tensors(number))
        except ResultError as error:
            raise ResultError(
                f"block {number} in '{self._partial.folder}': {error}; remove it to begin again"
            ) from error

    def named(self, number: int) -> Named:
        """The images of a block that is there."""
        return self._listed[number]

    def block(self, number: int, first: int) -> ModelBlock:
        """A block that is there."""
        arrays = self._partial.tensors(number)
        count = len(self._listed[number].names)
        try:
            return from_arrays(arrays, self._held, self._held, first, count)
        except ResultError as error:
            raise ResultError(
                f"block {number} in '{self._partial.folder}': {error}; remove it to begin again"
            ) from error

    def check(self, number: int, block: Block) -> None:
        """Raise DataError unless a block that is there is of the same images as this one."""
        if self._listed[number] != Named(block.names, block.digests):
            raise DataError(
                f"block {number} in '{self._partial.folder}' is of other images; give the same, or "
                "remove it to begin again"
            )

    def add(self, block: Block, part: ModelBlock) -> None:
        """Keep what the model gave for a block, behind those that are there."""
        named = Named(block.names, block.digests)
        self._partial.add(len(self._listed), to_arrays(part, named))
        self._listed.append(named)

    def finish(self, images: Images, device: torch.device) -> Path:
        """Make the file, once the images have all gone by."""
        counts = [len(part.names) for part in self._listed]
        starts = np.cumsum([0, *counts])[:-1].tolist()
        return self._partial.finish(
            {
                "names": images.used,
                "digests": [digest.hex() for digest in images.digests],
                "undecodable": images.undecodable,
                "sha256": images.sha256,
                "starts": starts,
            },
            {**provenance.collect(), "device": str(device)},
        )


def _kept_settings(settings: Settings) -> dict[str, Any]:
    names = ("layers", "tokens", "block", "precision", "max_images")
    return {
        "measures": list(settings.named),
        **{name: value for name, value in asdict(settings).items() if name in names},
    }


def check_folder(folder: Path, names: Sequence[str], processes: int) -> None:
    """Raise VitprobeError where the probe files of models cannot go to a folder."""
    if processes > 1:
        raise VitprobeError(
            "probe files are written by one process: leave them out under torchrun, or probe one "
            "model a process"
        )
    for name in names:
        if "/" in name or "\\" in name or name.startswith("."):
            raise ResultError(f"no probe file can be named after '{name}'; rename the model")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot write '{folder}': {error.strerror}") from error


def check_finished(found: Probe, model: Model, settings: Settings, images: Images) -> None:
    """Raise VitprobeError where a finished probe file is not of this model, or otherwise made."""
    about = json.loads(json.dumps({"weights": model.weights_sha256(), "model": model.describe()}))
    other = other_model({"weights": found.weights, "model": found.describe()}, about)
    if other is not None:
        what, ours, theirs = other
        raise ResultError(
            f"'{found.path}' is of another model than '{model.name}' ({what} {ours}, where it has "
            f"{theirs}); give another place, or remove it"
        )
    found.check(settings)
    found.images.check_same(found.path, images, f"'{images.source}'")
