"""Model specs: the strings that say where a model comes from. Imports no torch.

A spec is `SOURCE[,option=value…]`, where SOURCE is one of

- `path/to/checkpoint`: a file, or a saved folder, in any dialect of `vitprobe.models.formats`
- `run:DIR`: the encoder that `vitprobe pretrain` left in DIR
- `bundled:NAME`: an encoder that comes with vitprobe, `bundled:fashion_mae`
- `timm:NAME`: a timm model with its published weights
- `hf:FOLDER_OR_REPOSITORY`: a model of transformers, run by that library
- `torchvision:NAME`: a torchvision model with its published weights
- `path/to/NAME.probe`: a probe file, which holds no model but what a comparison needs of one
- `init:NAME`, `init:path/to/checkpoint`, `init:run:DIR`, `init:hf:…` or `init:torchvision:NAME`:
  the same architecture with random weights
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprobe.bundled import bundled_encoder
from vitprobe.errors import CheckpointError, SourceError, suggest

PROBE_SUFFIX = ".probe"
RUN_ENCODER = "encoder.safetensors"
"""The file of a run that holds its encoder."""
LIBRARIES = ("hf", "torchvision")
_PREFIXES = ("file", "run", "bundled", "timm", *LIBRARIES, "init")
# With random weights: of a timm model, a file, and the models of the libraries.
RANDOM = ("init", "init_file", *(f"init_{library}" for library in LIBRARIES))
_FILES = ("file", "run", "bundled", "init_file")
_KINDS = ("file", "run", "bundled", "timm", *LIBRARIES, *RANDOM)


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from.

    kind: "file", "run", "bundled", "timm", "hf", "torchvision", "probe", or with random weights
        "init" (of a timm name), "init_file" (of a checkpoint's), "init_hf" or "init_torchvision".
    target: path of a file, folder or run directory, or the name of a model or repository.
    options: validated values of the options that were given (`OPTIONS` lists them).
    text: the spec as it was written.
    """

    kind: str
    target: str
    options: dict[str, Any]
    text: str


def parse_spec(text: str, **options: Any) -> ModelSpec:
    """Read a spec string; keyword `options` win over those in the string, None leaves them be.

    A text that as a whole, or behind "init:", names an existing file or folder is that, commas and
    all.

    Raises SourceError for an empty spec, a source or option that does not exist (the nearest is
    suggested), one that does not apply to this kind of source, and a value that cannot be read.
    """
    text = text.strip()
    whole = text and _exists(text.removeprefix("init:"))
    target, *pieces = [text] if whole else text.split(",")
    kind, target = _split_kind(target.strip(), text)
    written = [_split_option(piece, text) for piece in pieces]
    given = dict(written)
    for name in given:
        if [key for key, _ in written].count(name) > 1:
            raise SourceError(f"'{name}' is given twice in the model spec '{text}'; give it once.")
    given.update((name, value) for name, value in options.items() if value is not None)
    return ModelSpec(kind, target, _validate(kind, given, text), text)


def _split_kind(source: str, text: str) -> tuple[str, str]:
    prefix, colon, target = source.partition(":")
    # A Windows drive is one letter, and a path may hold a colon: neither is a misspelt source.
    if colon and prefix not in _PREFIXES and re.fullmatch(r"[A-Za-z]\w+", prefix):
        raise SourceError(
            f"'{prefix}:' in '{text}' is no source of models; use timm:NAME, hf:NAME, "
            "torchvision:NAME, init:NAME, run:DIR or the path of a checkpoint file."
            f"{suggest(prefix, _PREFIXES)}"
        )
    if not colon or prefix not in _PREFIXES:
        prefix, target = "probe" if source.endswith(PROBE_SUFFIX) else "file", source
    if prefix == "init":
        library, _, rest = target.partition(":")
        if library in LIBRARIES:
            prefix, target = f"init_{library}", rest
        elif library == "run" and rest:
            prefix, target = "init_file", str(Path(rest) / RUN_ENCODER)
        elif library == "bundled" and rest:
            prefix, target = "init_file", str(bundled_encoder(rest))
        elif target and _exists(target):
            prefix = "init_file"
    if not target:
        raise SourceError(
            f"The model spec '{text}' names no model; give timm:NAME, hf:NAME, torchvision:NAME, "
            "init:NAME, run:DIR or the path of a checkpoint file."
        )
    return prefix, target


def no_checkpoint(path: str | Path) -> CheckpointError:
    """What to raise where there is no file at a path."""
    return CheckpointError(
        f"There is no checkpoint file '{path}'; a timm model is named as timm:NAME, one of Hugging "
        "Face as hf:NAME."
    )


def _exists(path: str) -> bool:
    """Whether a path is that of a file, or of a folder that a model was saved in."""
    try:
        return Path(path).is_file() or (Path(path) / "config.json").is_file()
    except (OSError, ValueError):  # too long a name, or a null byte
        return False


def _split_option(piece: str, text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in piece.partition("="))
    if not equals or not name or not value:
        raise SourceError(
            f"'{piece.strip()}' in the model spec '{text}' is not an option of the form name=value."
        )
    return name, value


def _validate(kind: str, given: Mapping[str, Any], text: str) -> dict[str, Any]:
    options = {}
    for name, value in given.items():
        if name not in OPTIONS:
            raise SourceError(
                f"'{name}' in the model spec '{text}' is not an option; there are "
                f"{', '.join(OPTIONS)}.{suggest(name, OPTIONS)}"
            )
        if kind not in OPTIONS[name].kinds:
            takes = ", ".join(known for known, other in OPTIONS.items() if kind in other.kinds)
            if kind == "probe":
                takes = "none: a probe file was made with them"
            raise SourceError(
                f"The option '{name}' does not apply to '{text}', which takes {takes}."
            )
        options[name] = read_option(name, value, f"the model spec '{text}'")
    return options


def read_option(name: str, value: Any, where: str) -> Any:
    """The value of one option, from its text or a Python value; `where` is for the SourceError."""
    option = OPTIONS[name]
    try:
        return option.read(value)
    except (TypeError, ValueError, OverflowError):
        raise SourceError(f"{name}={value} in {where} is not {option.expected}.") from None


def _count(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    number = _whole(value)
    if number < 1:
        raise ValueError(value)
    return number


def _whole(value: Any) -> int:
    number = int(value)
    if number != float(value) or number < 0:
        raise ValueError(value)
    return number


def _size(value: Any) -> tuple[int, int]:
    """(height, width) from 224, "224", "192x256" or (192, 256)."""
    if isinstance(value, str):
        value = value.lower().split("x")
    sides = tuple(_count(side) for side in (value if isinstance(value, Iterable) else [value]))
    if not 1 <= len(sides) <= 2:
        raise ValueError(value)
    return sides[0], sides[-1]


def _channels(value: Any) -> tuple[float, ...]:
    """One number for all channels, or one a channel separated by "/"."""
    if isinstance(value, str):
        value = value.split("/")
    numbers = tuple(float(number) for number in (value if isinstance(value, Iterable) else [value]))
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(value)
    return numbers


def _brightness(value: Any) -> tuple[float, ...]:
    numbers = _channels(value)
    if max(numbers) > 1:
        raise ValueError(value)
    return numbers


def _positive_channels(value: Any) -> tuple[float, ...]:
    numbers = _channels(value)
    if min(numbers) <= 0:
        raise ValueError(value)
    return numbers


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(value)
    return number


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


@dataclass(frozen=True)
class Option:
    """How one option is read, what it accepts in words, and the kinds of source that take it."""

    read: Callable[[Any], Any]
    expected: str
    kinds: tuple[str, ...]


OPTIONS = {
    "heads": Option(_count, "a number of attention heads (an integer above 0)", _FILES),
    "branch": Option(_name, "the name of a branch such as teacher or ema", _FILES),
    "size": Option(_size, "an input size such as 224 or 192x256 (height x width)", _KINDS),
    "mean": Option(
        _brightness,
        "a number, or one a channel such as 0.48/0.45/0.40, of images in [0, 1]",
        _KINDS,
    ),
    "std": Option(
        _positive_channels, "a number above 0, or one a channel such as 0.23/0.22/0.22", _KINDS
    ),
    "eps": Option(_positive, "a LayerNorm epsilon such as 1e-6", _FILES),
    "activation": Option(_name, "the name of an activation such as quick_gelu", _FILES),
    "seed": Option(_whole, "a seed (an integer from 0)", RANDOM),
}
