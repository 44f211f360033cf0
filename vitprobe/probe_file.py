"""The form of probe files: one zip, stored and not compressed, of a header and a file a block.

- `header.json`: what the model is, how it was probed, the images, and size and SHA-256 of the rest.
- `anatomy.safetensors`: where the model's tokens and attention lie.
- `blocks/000000.safetensors` …: what the model gave for each block of images.

While it is being made, a folder beside it holds each of them once it is whole; a run that is killed
leaves that folder, and goes on behind its last block. Nothing in a probe file is executed, and no
more of it is read than the header says and the file has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vitprobe.errors import ResultError
from vitprobe.files import replacing
from vitprobe.models.sources import PROBE_SUFFIX

FORMAT: Final = 1
HEADER: Final = "header.json"
ANATOMY: Final = "anatomy.safetensors"
BLOCKS: Final = "blocks"
MOST_HEADER: Final = 1 << 30


MODEL: Final = ("weights", "model.input_size", "model.mean", "model.std")
"""What makes a model the same one, beside the values of its facts."""
SAME: Final = (
    "format",
    *(f"settings.{name}" for name in ("measures", "layers", "tokens", "block", "precision")),
    "settings.max_images",
    "device",
    "images.limit",
    "images.seed",
)
"""What a run must have in common with the one that it goes on with."""


class ProbeArchive:
    """A finished probe file, read a member at a time.

    Raises:
        ResultError: it cannot be read, is no probe file, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
            self._size = path.stat().st_size
        except FileNotFoundError:
            raise ResultError(f"no probe file '{path}'") from None
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ResultError(
                f"'{path}' is no probe file, or only a part of one ({error}); probe the model again"
            ) from error
        content = self._read(HEADER, MOST_HEADER)
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Of the header, which holds those of all the rest."""
        try:
            self.header: dict[str, Any] = json.loads(content)
            number = self.header["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged("its header cannot be read")
        if number != FORMAT:
            raise ResultError(
                f"'{path}' has format {number!r:.40} and this vitprobe reads {FORMAT}; probe the "
                "model again"
            )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a member.

        Raises:
            ResultError: it is missing, or not what the header says.
        """
        try:
            entry = self.header["members"][name]
            size, sha256 = entry["bytes"], entry["sha256"]
        except (KeyError, TypeError):
            self.damaged(f"its header does not know '{name}'")
        content = self._read(name, size)
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            self.damaged(f"'{name}' is not what its header says")
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            self.damaged(f"'{name}' cannot be read ({error})")

    def _read(self, name: str, most: object) -> bytes:
        info = self._members.get(name)
        if info is None:
            self.damaged(f"it lacks '{name}'")
        stored = info.compress_type == zipfile.ZIP_STORED
        if not stored or not isinstance(most, int) or not 0 <= info.file_size <= self._size:
            self.damaged(f"'{name}' is not stored as it should be")
        if info.file_size > most:
            self.damaged(f"'{name}' is larger than its header says")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            self.damaged(f"'{name}' cannot be read ({error})")

    def damaged(self, what: str) -> NoReturn:
        """Raise ResultError: what is wrong with the file, as a clause."""
        raise ResultError(f"'{self.path}' is damaged: {what}; probe the model again")


class PartialProbe:
    """The folder in which a probe file is made, block by block.

    Args:
        out: the probe file that is to be.
        about: header, but for what is known at the end alone.
        anatomy: tensors of it.
        resume: go on behind the blocks that an earlier run with the same `about` has left, rather
            than begin again.

    Raises:
        ResultError: an earlier run has left blocks of something else; or it cannot be written.
    """

    def __init__(
        self,
        out: Path,
        about: Mapping[str, Any],
        anatomy: Mapping[str, Tensor],
        *,
        resume: bool,
    ) -> None:
        self.out = out
        self.folder = _partial(out)
        self._about = json.loads(json.dumps(about))
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        begun = (self.folder / HEADER).is_file()
        if begun:
            _check_same(self.folder, self._about)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"cannot write '{self.folder}': {error.strerror}") from error
        if not begun:
            # A folder that was being removed may have lost its header before its blocks.
            shutil.rmtree(self.folder / BLOCKS, ignore_errors=True)
            self._write(ANATOMY, save(dict(anatomy)))
            self._write(HEADER, json.dumps(self._about).encode())
        self.blocks = 0
        """How many whole blocks there are."""
        while (self.folder / member(self.blocks)).is_file():
            self.blocks += 1

    def add(self, number: int, arrays: Mapping[str, Tensor]) -> None:
        """Keep a block, if it is not there yet."""
        if number >= self.blocks:
            self._write(member(number), save(dict(arrays)))
            self.blocks = number + 1

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The arrays of a block that is there."""
        path = self.folder / member(number)
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ResultError(
                f"'{path}' cannot be read ({error}); remove it to begin again"
            ) from error

    def finish(self, images: Mapping[str, Any], provenance: Mapping[str, Any]) -> Path:
        """Join all to the probe file, and remove the folder."""
        names = [ANATOMY, *(member(number) for number in range(self.blocks))]
        members = {}
        for name in names:
            with (self.folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            members[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
        header = {
            **self._about,
            "images": {**self._about["images"], **images},
            "provenance": provenance,
            "members": members,
        }
        with (
            replacing(self.out) as path,
            zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr(HEADER, json.dumps(header))
            for name in names:
                archive.write(self.folder / name, name)
        shutil.rmtree(self.folder)
        return self.out

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)


def member(number: int) -> str:
    """Where in a probe file the block of this number is."""
    return f"{BLOCKS}/{number:06}.safetensors"


def _partial(out: Path) -> Path:
    """The folder in which a probe file is made."""
    return out.with_name(f"{out.name}.partial")


def check_free(out: Path, *, resume: bool, force: bool) -> None:
    """Raise ResultError where a probe file cannot go to `out`."""
    if out.suffix != PROBE_SUFFIX:
        raise ResultError(f"'{out}': give a probe file a name that ends in {PROBE_SUFFIX}")
    if out.is_dir():
        raise ResultError(f"'{out}' is a folder; give the probe file another name")
    if out.exists() and not (resume or force):
        raise ResultError(f"'{out}' exists; take it as it is by resume, or remove it")
    if _partial(out).exists() and not (resume or force):
        raise ResultError(
            f"'{_partial(out)}' is left of a run that was cut short; go on with it by resume, or "
            "remove it"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ResultError(f"cannot write '{out}': there is no folder '{parent}'")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResultError(f"cannot write '{out}': no permission to write in '{parent}'")


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise ResultError where a folder was left by a run that was otherwise made."""
    try:
        before = json.loads((folder / HEADER).read_bytes())
        found = other_model(before, about) or _difference(before, about, SAME)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"'{folder}' does not say what run has left it; remove it to begin again"
        ) from error
    if found is not None:
        what, ours, theirs = found
        raise ResultError(
            f"'{folder}' was left by a run with {what} {ours}, where this one has {theirs}; "
            "give the same, or remove it to begin again"
        )


def other_model(before: Mapping[str, Any], about: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """In what the models of two headers differ, and both values in words; None: they are the same.

    The same weights with other heads are another model.
    """
    facts = [header["model"]["facts"] for header in (before, about)]
    names = (f"model.facts.{name}.value" for name in facts[0] if name in facts[1])
    return _difference(before, about, (*MODEL, *names))


def _difference(
    before: Mapping[str, Any], about: Mapping[str, Any], names: Iterable[str]
) -> tuple[str, str, str] | None:
    for name in names:
        ours, theirs = _at(before, name), _at(about, name)
        if ours != theirs:
            what = name.removesuffix(".value").rpartition(".")[2].replace("_", " ")
            return what, _short(ours), _short(theirs)
    return None


def _at(header: Mapping[str, Any], name: str) -> Any:
    value: Any = header
    for part in name.split("."):
        value = value[part]
    return value


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = "none" if value is None else text
    return text if len(text) <= 60 else f"{text[:12]}…"
