"""Fill a rebuilt model from a checkpoint's tensors, completely or not at all."""

from __future__ import annotations

import re
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitprobe.errors import CheckpointError
from vitprobe.models.architecture import Architecture
from vitprobe.models.branches import Choice
from vitprobe.models.model import LoadReport

# Of the encoder's own keys, these would change what it computes: none may be left over.
_COMPUTES = re.compile(r"blocks\.|patch_embed\.|norm|fc_norm|.*(pos|rope|rel|token|embed)")
_HEAD = re.compile(r"head(_dist)?\.")


def encoder_tensors(choice: Choice) -> dict[str, Tensor]:
    """The chosen encoder's tensors under timm's names."""
    branch = choice.branch
    return {choice.dialect.to_timm(key): branch.tensors[branch.prefix + key] for key in branch.keys}


def fill(
    path: Path,
    module: VisionTransformer,
    architecture: Architecture,
    choice: Choice,
    dialect: str | None = None,
) -> LoadReport:
    """Copy the chosen encoder's tensors into `module`, as fp32, and report what went where.

    dialect: what the report is to call it, if not the dialect that was recognised.

    Raises CheckpointError, before anything is copied, where the file lacks a tensor of the encoder,
    has one of another shape or of integers, or has one that the module has no place for.
    """
    tensors = encoder_tensors(choice)
    expected = module.state_dict()
    if missing := [key for key in expected if key not in tensors]:
        fraction = _share(expected, [key for key in expected if key in tensors])
        raise CheckpointError(
            f"'{path}' fills only {fraction:.1%} of its encoder: it lacks {_some(missing)}."
        )
    tensors["pos_embed"] = architecture.fit_positions(tensors["pos_embed"])
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
    ignored, unexpected = _leftover(choice, set(expected))
    own = [key for key in unexpected if key.startswith(choice.branch.prefix)]
    if alien := [key for key in own if _COMPUTES.match(key.removeprefix(choice.branch.prefix))]:
        raise CheckpointError(
            f"'{path}' is no plain Vision Transformer: it also holds {_some(alien)}, which would "
            "change its features."
        )
    module.load_state_dict({key: tensors[key].float() for key in expected})
    return LoadReport(
        dialect=dialect or choice.dialect.name,
        matched=tuple(expected),
        missing=(),
        unexpected=tuple(unexpected),
        ignored=tuple(ignored),
        branch=choice.name,
        loaded_fraction=_share(expected, list(expected)),
    )


def _share(expected: dict[str, Tensor], present: list[str]) -> float:
    """Share of the encoder's parameters, by element, that are present."""
    sizes = {key: tensor.numel() for key, tensor in expected.items() if not _HEAD.match(key)}
    return sum(sizes.get(key, 0) for key in present) / sum(sizes.values())


def _leftover(choice: Choice, expected: set[str]) -> tuple[list[str], list[str]]:
    """Keys of the state dict that fill nothing: those known not to matter, and the others."""
    branch, dialect = choice.branch, choice.dialect
    ignored: list[str] = []
    unexpected: list[str] = []
    for key in branch.tensors:
        own = key.removeprefix(branch.prefix)
        if key.startswith(branch.prefix) and dialect.to_timm(own) in expected:
            continue
        # An encoder without prefix "owns" the keys of one with a prefix beside it.
        another = any(key.startswith(prefix) for prefix in choice.others if prefix)
        (ignored if another or dialect.ignores(own) else unexpected).append(key)
    return ignored, unexpected


def _some(keys: list[str]) -> str:
    text = ", ".join(keys[:3])
    return text if len(keys) <= 3 else f"{text} and {len(keys) - 3} more"
