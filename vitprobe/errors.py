"""The errors a user can mend.

Every one carries a single sentence that names the offending thing and says what to do. The command
line prints that sentence and exits with status 2; any other exception is a defect of vitprobe.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitprobeError(Exception):
    """Base of every error that bad input can cause."""


class SourceError(VitprobeError):
    """A model spec that names nothing loadable."""


class CheckpointError(VitprobeError):
    """A checkpoint file that cannot be read, or does not fill the model it is loaded into."""


class CaptureError(VitprobeError):
    """A model whose features or attention cannot be captured as asked."""


class MeasureError(VitprobeError):
    """Features or attention on which a measure is not defined."""


class DataError(VitprobeError):
    """Images that are missing, undecodable, too few, or of the wrong shape."""


class RecipeError(VitprobeError):
    """A training recipe or override that cannot be followed."""


class LoggerError(VitprobeError):
    """A logger that is unknown, not installed or cannot be opened."""


class ResultError(VitprobeError):
    """A result file or output directory that cannot be read or written."""


class ElsewhereError(VitprobeError):
    """An error of another process of this run, in its words; that process tells the user."""


class NoRoomError(VitprobeError):
    """Memory that does not suffice for what a smaller forward pass needs as well; names what."""


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    # oneDNN gives no other reason where it finds no room.
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, of whatever kind, said that its memory does not suffice."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    )


def no_images(path: object) -> DataError:
    """What to raise where there are no images at a path."""
    return DataError(f"no images at '{path}': there is no such file or folder")


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, or the empty string.

    Of names that `name` begins it is the shortest: half a name resembles the wrong ones.
    """
    known = list(known)
    begun = min((other for other in known if name and other.startswith(name)), key=len, default="")
    nearest = [begun] if begun else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
