"""timm's models by name: with their published weights, or with random ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg
from torch import nn

from vitprobe.errors import SourceError, suggest
from vitprobe.models import hub
from vitprobe.models.anatomy import Anatomy
from vitprobe.models.architecture import resized_text
from vitprobe.models.discovery import find_anatomy, find_input_size
from vitprobe.models.model import Fact, LoadReport, Model, live_model
from vitprobe.models.sources import ModelSpec

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_timm(spec: ModelSpec, name: str | None) -> Model:
    """The model of a "timm:NAME" or "init:NAME" spec.

    The published weights come from the local cache of the Hugging Face hub, or are downloaded.
    Random weights are timm's initialisation under `seed` (default 0); the global random state stays
    as it is.

    Raises SourceError for an unknown name, a model without published weights or that cannot be made
    for the `size`, and, within 10 s, where the weights are not cached and the hub cannot be reached
    or HF_HUB_OFFLINE is set; CaptureError for a model that cannot be probed.
    """
    _check_name(spec.target)
    pretrained = spec.kind == "timm"
    seed = spec.options.get("seed", 0)
    size = spec.options.get("size")
    module = _create(spec, seed, size)
    input_size = _input_size(module, size)
    # Before any download: not every timm model can be probed.
    anatomy = find_anatomy(module, input_size)
    if size and anatomy.plain and not _divides(anatomy, size):
        raise SourceError(
            f"size={size[0]}x{size[1]} in '{spec.text}' is not a multiple of the model's patch, "
            f"{anatomy.patch_size[0]:g}x{anatomy.patch_size[1]:g} pixels."
        )
    sha256 = None
    if pretrained:
        weights = _fetch(spec)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        module = _create(spec, seed, size, weights)
    mean, std = configured_statistics(module, input_size[0])
    return live_model(
        name or (spec.target if pretrained else f"init:{spec.target}"),
        module,
        spec.text,
        input_size,
        anatomy,
        evidence="timm",
        mean=[("user", spec.options.get("mean")), ("timm", mean)],
        std=[("user", spec.options.get("std")), ("timm", std)],
        position_embedding=_position_fact(module, anatomy.residual[0].grid, size, pretrained),
        report=_report(module) if pretrained else None,
        sha256=sha256,
    )


def configured_statistics(
    module: nn.Module, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """(mean, std) of a timm model's own `pretrained_cfg`; None where it has none that fit."""
    config = getattr(module, "pretrained_cfg", None) or {}
    mean, std = (
        tuple(values) if values is not None and len(values) == channels else None
        for values in (config.get("mean"), config.get("std"))
    )
    return mean, std


def _check_name(target: str) -> None:
    architecture, _, tag = target.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise SourceError(
            f"timm {timm.__version__} has no model '{architecture}'.{suggest(architecture, known)}"
        )
    if tag and target not in (known := timm.list_pretrained(f"{architecture}.*")):
        raise SourceError(
            f"timm {timm.__version__} has no weights '{tag}' for '{architecture}'; it has "
            f"{', '.join(known) or 'none'}."
        )


def _create(
    spec: ModelSpec, seed: int, size: tuple[int, int] | None, weights: Path | None = None
) -> nn.Module:
    arguments: dict[str, Any] = {}
    if size is not None and _takes_size(spec.target):
        arguments["img_size"] = size
    if weights is not None:
        arguments["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = timm.create_model(spec.target, pretrained=weights is not None, **arguments)
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"timm cannot make '{spec.text}': "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    return module.eval().float().requires_grad_(False)


def _takes_size(target: str) -> bool:
    """Whether timm makes the model for one input size; others run on any."""
    config = get_pretrained_cfg(target, allow_unregistered=True)
    return config is None or config.fixed_input_size


def _divides(anatomy: Anatomy, size: tuple[int, int]) -> bool:
    return all(
        count * patch == side
        for count, patch, side in zip(anatomy.grid, anatomy.patch_size, size, strict=True)
    )


def _input_size(module: nn.Module, size: tuple[int, int] | None) -> tuple[int, int, int]:
    channels, height, width = find_input_size(module)
    return (channels, *size) if size else (channels, height, width)


def _position_fact(
    module: nn.Module, grid: tuple[int, int] | None, size: tuple[int, int] | None, pretrained: bool
) -> Fact:
    if getattr(module, "pos_embed", None) is None:
        return Fact("none added to the tokens", "timm")
    if not pretrained:
        return Fact("random", "timm")
    if grid is None:
        return Fact("as loaded", "timm")
    config: Any = module.pretrained_cfg
    _, height, width = config["input_size"]
    patch = [side / count for side, count in zip(size or (height, width), grid, strict=True)]
    stored = (int(height / patch[0]), int(width / patch[1]))
    return Fact("as loaded", "timm") if stored == grid else Fact(resized_text(stored, grid), "user")


def _report(module: nn.Module) -> LoadReport:
    """timm loads its own weights strictly: every parameter comes from the file."""
    return LoadReport("timm", tuple(module.state_dict()), (), (), (), None, 1.0)


def _fetch(spec: ModelSpec) -> Path:
    """The published weights' file, from the cache or else from the hub."""
    config = get_pretrained_cfg(spec.target)
    if config is None or not config.hf_hub_id:
        raise SourceError(
            f"timm {timm.__version__} knows no published weights on the Hugging Face hub for "
            f"'{spec.target}'; use init:{spec.target} for random ones, or the path of a file."
        )
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _WEIGHTS
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    missing = f"The weights of '{spec.target}' ({repository}) are not in the local cache and"
    if hub.is_offline():
        raise SourceError(f"{missing} HF_HUB_OFFLINE forbids downloading them; unset it once.")
    if reason := hub.unreachable(constants.ENDPOINT):
        raise SourceError(
            f"{missing} {constants.ENDPOINT} cannot be reached ({reason}); connect once, or give "
            "the path of a checkpoint file."
        )
    try:
        listed = huggingface_hub.list_repo_files(repository, revision=revision or None)
        name = next((name for name in names if name in listed), names[-1])
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{missing} cannot be downloaded: {(str(error).strip() or 'no reply').splitlines()[0]}"
        ) from error
