"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitprobe.errors import ResultError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes that file's place when the block ends well.

    When it does not, the new file is removed and the old one is as it was.

    Raises:
        ResultError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise ResultError(f"cannot write '{path}': there is no folder '{path.parent}'")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
