"""torchvision's models by name: with their published weights, or with random ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from vitprobe.errors import SourceError, suggest
from vitprobe.models import hub
from vitprobe.models.discovery import find_anatomy
from vitprobe.models.model import Fact, LoadReport, Model, live_model
from vitprobe.models.sources import ModelSpec

# The argument of those constructors that fix the size of the input.
_SIZE = {"vit_": "image_size", "maxvit": "input_size"}


def load_torchvision(spec: ModelSpec, name: str | None) -> Model:
    """The model of a "torchvision:NAME" or "init:torchvision:NAME" spec; NAME may be NAME.WEIGHTS.

    The published weights come from torch's cache (`torch.hub.get_dir()`), or are downloaded.
    Random weights are torchvision's initialisation under `seed` (default 0); the global random
    state stays as it is. The input is that of the weights' transforms.

    Raises SourceError for an unknown name, for weights that are not cached while their server
    cannot be reached (within 10 s), and for a `size` that the model cannot take; CaptureError for a
    model that cannot be probed.
    """
    pretrained = spec.kind == "torchvision"
    weights = _weights(spec)
    transforms = weights.transforms()
    size = spec.options.get("size") or tuple(transforms.crop_size * 2)[:2]
    sha256 = None
    if pretrained:
        sha256 = hashlib.sha256(_fetch(spec, weights).read_bytes()).hexdigest()
    module = _create(spec, weights if pretrained else None)
    input_size = (3, *size)
    anatomy = find_anatomy(module, input_size)
    return live_model(
        name or (spec.target if pretrained else f"init:{spec.target}"),
        module,
        spec.text,
        input_size,
        anatomy,
        evidence="module",
        mean=[("user", spec.options.get("mean")), ("torchvision", transforms.mean)],
        std=[("user", spec.options.get("std")), ("torchvision", transforms.std)],
        position_embedding=_position_fact(module, pretrained),
        # torchvision loads strictly: every parameter comes from the file.
        report=LoadReport("torchvision", tuple(module.state_dict()), (), (), (), None, 1.0)
        if pretrained
        else None,
        sha256=sha256,
    )


def _position_fact(module: nn.Module, pretrained: bool) -> Fact:
    if not any(name.endswith("pos_embedding") for name, _ in module.named_parameters()):
        return Fact("none added to the tokens", "torchvision")
    return Fact("as loaded" if pretrained else "random", "torchvision")


def _weights(spec: ModelSpec) -> Any:
    """The named weights of a classification model, or its default ones."""
    architecture, _, tag = spec.target.partition(".")
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise SourceError(
            f"torchvision {torchvision.__version__} has no model '{architecture}'."
            f"{suggest(architecture, known)}"
        )
    weights = torchvision.models.get_model_weights(architecture)
    if not tag:
        return weights.DEFAULT
    if tag not in weights.__members__:
        raise SourceError(
            f"torchvision {torchvision.__version__} has no weights '{tag}' for '{architecture}'; "
            f"it has {', '.join(weights.__members__)}."
        )
    return weights[tag]


def _create(spec: ModelSpec, weights: Any) -> nn.Module:
    architecture = spec.target.partition(".")[0]
    arguments: dict[str, Any] = {}
    size = spec.options.get("size")
    for start, argument in _SIZE.items():
        if size and weights is None and architecture.startswith(start):
            arguments[argument] = size[0] if argument == "image_size" else size
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.options.get("seed", 0))
            module = torchvision.models.get_model(architecture, weights=weights, **arguments)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SourceError(
            f"torchvision cannot make '{spec.text}': "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    return module.eval().float().requires_grad_(False)


def _fetch(spec: ModelSpec, weights: Any) -> Path:
    """The weights' file in torch's cache, where it is put if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if path.is_file():
        return path
    missing = f"The weights of '{spec.target}' ({weights.url}) are not in torch's cache and"
    if reason := hub.unreachable(weights.url):
        raise SourceError(
            f"{missing} cannot be downloaded ({reason}); connect once, or use "
            f"init:torchvision:{spec.target} for random ones."
        )
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"{missing} cannot be downloaded: {(str(error).strip() or 'no reply').splitlines()[0]}"
        ) from error
    return path
