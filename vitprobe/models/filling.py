"""Fill a rebuilt model from a checkpoint's tensors, completely or not at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprobe.errors import CheckpointError
from vitprobe.models.branches import Choice
from vitprobe.models.merging import merged
from vitprobe.models.model import LoadReport
from vitprobe.models.rebuilding import Architecture, learned

# Of the encoder's own keys, these would change what it computes: none may be left over.
_COMPUTES = re.compile(r"blocks\.|patch_embed\.|\w*norm|ln_|.*(pos|rope|rel|token|embed)")
_HEAD = re.compile(r"head(_dist)?\.")
# What tensors of impossible shapes make code that merges or resizes them raise.
_IMPOSSIBLE = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True)
class Encoder:
    """The chosen encoder's tensors.

    renamed: under timm's names as far as renaming alone gives them, as the file has them.
    tensors: wholly under timm's names, converted and merged.
    sources: the file's own key, less the encoder's prefix, for each of `renamed`.
    """

    renamed: dict[str, Tensor]
    tensors: dict[str, Tensor]
    sources: dict[str, str]


def read_encoder(path: Path, choice: Choice) -> Encoder:
    """The chosen encoder under timm's names.

    Raises CheckpointError where two of its tensors have one name, or have shapes that do not go
    together, or one has a shape of which the file does not hold the numbers.
    """
    branch, dialect = choice.branch, choice.dialect
    sources: dict[str, str] = {}
    for key in branch.keys:
        # An encoder without prefix "owns" the keys of one with a prefix beside it.
        if _of_another(choice, branch.prefix + key):
            continue
        name = dialect.to_timm(key)
        if name in sources:
            raise CheckpointError(
                f"'{path}' holds {name} twice, as {sources[name]} and {key}, which contradicts "
                f"the dialect {dialect.name}."
            )
        sources[name] = key
    renamed = {name: branch.tensors[branch.prefix + key] for name, key in sources.items()}
    for name, tensor in renamed.items():
        # A few bytes can be read as any number of numbers, more than memory holds.
        if tensor.layout == torch.strided and tensor.numel() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{sources[name]} in '{path}' has the shape {tuple(tensor.shape)}, of which the "
                "file does not hold the numbers; save a contiguous copy."
            )
    try:
        tensors = merged(dialect.convert(dict(renamed)))
    except _IMPOSSIBLE as error:
        raise CheckpointError(_do_not_fit(path, error)) from error
    return Encoder(renamed, tensors, sources)


def fit(path: Path, encoder: Encoder, architecture: Architecture) -> dict[str, Tensor]:
    """The encoder's tensors under the names of the module to build, checked against its shapes.

    Raises CheckpointError where the file lacks a tensor of the encoder, or has one of another shape
    or of integers. Nothing as large as the model is made before.
    """
    try:
        expected = architecture.blueprint()
    except _IMPOSSIBLE as error:
        raise CheckpointError(
            f"The tensors of '{path}' describe no Vision Transformer that timm can build: "
            f"{_first_line(error)}"
        ) from error
    try:
        tensors = architecture.fit(encoder.tensors)
    except _IMPOSSIBLE as error:
        raise CheckpointError(_do_not_fit(path, error)) from error
    if missing := [key for key in expected if key not in tensors]:
        fraction = _share(expected, [key for key in expected if key in tensors])
        raise CheckpointError(
            f"'{path}' fills only {_percent(fraction)} of its encoder: it lacks {_some(missing)}."
        )
    for key, target in expected.items():
        if tensors[key].shape != target.shape:
            raise CheckpointError(
                f"{key} in '{path}' has the shape {tuple(tensors[key].shape)}, where its other "
                f"tensors ask for {tuple(target.shape)}."
            )
        if not tensors[key].is_floating_point():
            kind = str(tensors[key].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{key} in '{path}' is {kind}; give the weights as floating-point numbers."
            )
    return tensors


def fill(
    path: Path,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    encoder: Encoder,
    choice: Choice,
    dialect: str,
) -> LoadReport:
    """Copy the tensors of `fit` into `module`, as fp32, and report what went where.

    dialect: what the report is to call it.

    Raises CheckpointError, before anything is copied, where the encoder has a tensor that the
    module has no place for.
    """
    expected = learned(module)
    # Beit and Eva have a bias of keys that they keep out of their state dict.
    places = expected | {
        name: buffer for name, buffer in module.named_buffers() if name.endswith("attn.k_bias")
    }
    left = [key for key in tensors if key not in places]
    ignored, unexpected = _leftover(choice, {encoder.sources.get(key, key) for key in left})
    prefix = choice.branch.prefix
    own = [key.removeprefix(prefix) for key in unexpected if key.startswith(prefix)]
    alien = [f"{prefix}{key}" for key in own if _COMPUTES.match(choice.dialect.to_timm(key))]
    if alien := alien + [key for key in left if key not in encoder.sources]:
        raise CheckpointError(
            f"'{path}' is no plain Vision Transformer: it also holds {_some(alien)}, which would "
            "change its features."
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in places:
                places[key].copy_(tensor)
    return LoadReport(
        dialect=dialect,
        matched=tuple(expected),
        missing=(),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
        branch=choice.name,
        loaded_fraction=_share(expected, list(expected)),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _do_not_fit(path: Path, error: Exception) -> str:
    return f"The tensors of '{path}' do not go together: {_first_line(error).rstrip('.')}."


def _percent(fraction: float) -> str:
    """Rounded down: what is not whole is never 100.0%."""
    return f"{math.floor(fraction * 1000) / 1000:.1%}"


def _share(expected: dict[str, Tensor], present: list[str]) -> float:
    """Share of the encoder's parameters, by element, that are present."""
    sizes = {key: tensor.numel() for key, tensor in expected.items() if not _HEAD.match(key)}
    return sum(sizes.get(key, 0) for key in present) / sum(sizes.values())


def _leftover(choice: Choice, left: set[str]) -> tuple[list[str], list[str]]:
    """Keys of the state dict that fill nothing: those known not to matter, and the others.

    left: such keys of the encoder itself, less its prefix.
    """
    branch, dialect = choice.branch, choice.dialect
    ignored: list[str] = []
    unexpected: list[str] = []
    for key in branch.tensors:
        own = key.removeprefix(branch.prefix)
        filling = key.startswith(branch.prefix) and own not in left
        if filling and not _of_another(choice, key):
            continue
        (ignored if _of_another(choice, key) or dialect.ignores(own) else unexpected).append(key)
    return ignored, unexpected


def _of_another(choice: Choice, key: str) -> bool:
    """Whether the longest of the encoders' prefixes before this key is not that of the chosen."""
    own = choice.branch.prefix
    return any(
        key.startswith(prefix) and not (key.startswith(own) and own.startswith(prefix))
        for prefix in choice.others
    )


def _some(keys: list[str]) -> str:
    text = ", ".join(keys[:3])
    return text if len(keys) <= 3 else f"{text} and {len(keys) - 3} more"
