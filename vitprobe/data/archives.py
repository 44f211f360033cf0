"""Zip archives and uncompressed tars, listed once and then read at random, by offset."""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitprobe.errors import DataError

_LOCAL_HEADER = 30  # bytes of a zip member before its name
_NO_SUM = -1
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """Where a file lies in an archive: `size` bytes from `offset` on, as stored."""

    name: str
    offset: int
    size: int
    deflated: bool = False
    crc: int = _NO_SUM


@dataclass(frozen=True, eq=False)
class Members:
    """Reads the i-th of some members of archives.

    An archive is opened for each read, which costs 10 µs where decoding costs 500: so nothing has
    to be kept for every process and thread, shared between them under a lock, or closed.
    """

    archives: tuple[str, ...]
    archive: NDArray[np.int32]
    table: NDArray[np.int64]
    """(n, 4): offset, size, whether deflated, CRC-32."""

    def __call__(self, i: int) -> bytes:
        offset, size, deflated, crc = self.table[i].tolist()
        with open(self.archives[self.archive[i]], "rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise EOFError("the archive ends within it")
        if deflated:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        if crc not in (_NO_SUM, zlib.crc32(content)):
            raise ValueError("its content does not have the checksum that the archive states")
        return content


def read_members(archives: Sequence[Path], chosen: Sequence[tuple[int, Member]]) -> Members:
    """A reader of (index of the archive, member) pairs."""
    rows: list[Any] = [tuple(member)[1:] for _, member in chosen]
    return Members(
        tuple(map(str, archives)),
        np.array([archive for archive, _ in chosen], dtype=np.int32),
        np.array(rows, dtype=np.int64).reshape(-1, 4),
    )


def list_zip(path: Path) -> tuple[list[Member], list[str]]:
    """The files of a zip archive, and the folders that it names.

    Raises:
        DataError: it cannot be read, or members are encrypted or compressed by another method than
            deflate.
    """
    members, folders = [], []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.is_dir():
                    folders.append(info.filename)
                    continue
                known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if not known or info.flag_bits & 1:
                    raise DataError(
                        f"'{info.filename}' of '{path}' is encrypted or compressed in a way that "
                        "cannot be read; unpack the archive"
                    )
                # The lengths of name and extra field; those of the directory can be others.
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                lengths = file.read(4)
                start = info.header_offset + _LOCAL_HEADER
                start += int.from_bytes(lengths[:2], "little")
                start += int.from_bytes(lengths[2:], "little")
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                members.append(Member(info.filename, start, info.compress_size, deflated, info.CRC))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    return members, folders


def list_tar(path: Path) -> tuple[list[Member], list[str]]:
    """The files of an uncompressed tar archive, and the folders that it names.

    Raises:
        DataError: it cannot be read, is compressed, or holds links in place of files.
    """
    members, folders = [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    folders.append(info.name)
                elif info.isreg():
                    members.append(Member(info.name, info.offset_data, info.size))
                elif info.islnk() or info.issym():
                    raise DataError(f"'{info.name}' of '{path}' is a link; unpack the archive")
    except tarfile.ReadError as error:
        raise DataError(
            f"cannot read '{path}' as an uncompressed tar ({error}); uncompress it, or get it again"
        ) from error
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read '{path}': {error}") from error
    return members, folders


def list_tars(paths: Sequence[Path]) -> list[list[Member]]:
    """The files of each of many tar archives, several read at a time as most of it is waiting."""
    with ThreadPoolExecutor(8) as pool:
        return [members for members, _ in pool.map(list_tar, paths)]


def is_pattern(source: str) -> bool:
    """Whether it has braces as in `shards-{0000..0099}.tar`."""
    return _BRACES.search(source) is not None


def expand(pattern: str) -> list[Path]:
    """`shards-{0000..0099}.tar` → its hundred paths; several braces give every combination."""
    match = _BRACES.search(pattern)
    if match is None:
        return [Path(pattern)]
    first, last = match.groups()
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in expand(
            f"{pattern[: match.start()]}{number:0{len(first)}}{pattern[match.end() :]}"
        )
    ]
