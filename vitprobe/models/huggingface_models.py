"""Models of transformers, run by that library: from a saved folder, its cache, or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from torch import nn

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models import hub
from vitprobe.models.discovery import find_anatomy, find_input_size
from vitprobe.models.folders import folder_sha256, has_weights, read_config
from vitprobe.models.model import Fact, LoadReport, Model, live_model
from vitprobe.models.sources import ModelSpec

_T = TypeVar("_T")
# The image tower of a model that has others.
_TOWERS = ("vision_model", "vision_tower", "vision_encoder", "visual", "image_encoder")
# Models that leave out patches at random, and their like that sees them all.
_UNMASKED = {"vit_mae": "vit"}
# What stands behind the last layer: a file without it lacks nothing that is looked at.
_BEHIND = re.compile(r"(.*\.)?(pooler|head|classifier)\.")


def load_huggingface(spec: ModelSpec, name: str | None) -> Model:
    """The model of an "hf:FOLDER_OR_REPOSITORY" or "init:hf:FOLDER_OR_REPOSITORY" spec.

    It is transformers' AutoModel, of a model of images and text the image tower alone, and of a
    masked autoencoder the encoder without masking. Mean and std are those of its
    `preprocessor_config.json`. Random weights are drawn under `seed` (default 0) from the config.
    No code of the repository is executed.

    Raises SourceError where transformers is missing or knows no such model, and, within 10 s, where
    it is not cached and the hub cannot be reached or HF_HUB_OFFLINE is set; CheckpointError where
    the weights do not fill the model; CaptureError for a model that cannot be probed.
    """
    folder = _folder(spec)
    config = _config(spec, folder)
    report = sha256 = None
    if spec.kind == "hf":
        module, report = _pretrained(spec, folder, config)
        sha256 = folder_sha256(folder)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.options.get("seed", 0))
            module = _tower(spec, _run(spec, lambda: _auto().AutoModel.from_config(config)))
    module = module.eval().float().requires_grad_(False)
    channels, *size = find_input_size(module)
    height, width = spec.options.get("size") or size
    input_size = (channels, height, width)
    anatomy = find_anatomy(module, input_size)
    images = read_config(folder, "preprocessor_config")
    stem = spec.target.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return live_model(
        name or (stem if report else f"init:{stem}"),
        module,
        spec.text,
        input_size,
        anatomy,
        evidence="module",
        mean=[("user", spec.options.get("mean")), ("config", _numbers(images, "image_mean"))],
        std=[("user", spec.options.get("std")), ("config", _numbers(images, "image_std"))],
        position_embedding=Fact("as loaded" if report else "random", "config"),
        report=report,
        sha256=sha256,
    )


def _numbers(stated: dict[str, Any], key: str) -> list[float] | None:
    """One number, or one a channel."""
    value = stated.get(key)
    values: list[Any] = value if isinstance(value, list) else [value]
    whole = values and all(isinstance(number, int | float) for number in values)
    return [float(number) for number in values] if whole else None


def _auto() -> Any:
    try:
        import transformers
    except ImportError:
        raise SourceError(
            "hf: needs transformers, which is not installed; pip install 'vitprobe[hf]'."
        ) from None
    return transformers


def _folder(spec: ModelSpec) -> Path:
    """Where the model lies on this machine; what is not there is downloaded."""
    if Path(spec.target).is_dir():
        return Path(spec.target)
    try:
        cached = huggingface_hub.try_to_load_from_cache(spec.target, "config.json")
    except HFValidationError:
        raise SourceError(
            f"'{spec.target}' in '{spec.text}' is neither a folder nor the name of a repository, "
            "such as google/vit-base-patch16-224."
        ) from None
    # Of some models only the config was ever asked for.
    if isinstance(cached, str) and (spec.kind != "hf" or has_weights(Path(cached).parent)):
        return Path(cached).parent
    missing = f"'{spec.target}' is no folder, and a model of this name is not in the local cache"
    if hub.is_offline():
        raise SourceError(f"{missing} and HF_HUB_OFFLINE forbids downloading one; unset it once.")
    if reason := hub.unreachable(constants.ENDPOINT):
        raise SourceError(
            f"{missing} and {constants.ENDPOINT} cannot be reached ({reason}); connect once, or "
            "give the path of a saved folder."
        )
    return _run(spec, lambda: _download(spec))


def _download(spec: ModelSpec) -> Path:
    wanted = ["*.json"]
    if spec.kind == "hf":
        listed = huggingface_hub.list_repo_files(spec.target)
        safe = any(name.startswith("model") and name.endswith(".safetensors") for name in listed)
        wanted.append("model*.safetensors" if safe else "pytorch_model*.bin")
    return Path(huggingface_hub.snapshot_download(spec.target, allow_patterns=wanted))


def _run(spec: ModelSpec, call: Callable[[], _T]) -> _T:
    """What a call of transformers returns, which then neither logs nor shows its progress."""
    logs = _auto().utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        return call()
    except Exception as error:  # whatever a library raises on a folder it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"transformers cannot load '{spec.text}': {reason}") from error
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _config(spec: ModelSpec, folder: Path) -> Any:
    transformers = _auto()
    config = _run(
        spec, lambda: transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    )
    if config.model_type in _UNMASKED:
        stated = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(_UNMASKED[config.model_type], **stated)
    return config


def _pretrained(spec: ModelSpec, folder: Path, config: Any) -> tuple[nn.Module, LoadReport]:
    transformers = _auto()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        whole, info = _run(
            spec,
            lambda: transformers.AutoModel.from_pretrained(
                folder, config=config, output_loading_info=True, trust_remote_code=False
            ),
        )
    module = _tower(spec, whole)
    start = next(name for name, child in whole.named_modules() if child is module)
    prefix = f"{start}." if start else ""
    own = module.state_dict()
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = tuple(key for key in own if prefix + key in absent)
    if lacks := [key for key in missing if not _BEHIND.match(key)]:
        raise CheckpointError(
            f"'{spec.target}' does not fill its {type(module).__name__}: it lacks "
            f"{', '.join(lacks[:3])}{f' and {len(lacks) - 3} more' if len(lacks) > 3 else ''}."
        )
    matched = tuple(key for key in own if key not in missing)
    report = LoadReport(
        dialect="transformers",
        matched=matched,
        missing=missing,
        unexpected=tuple(info["unexpected_keys"]),
        ignored=(),
        branch=None,
        loaded_fraction=1.0,
    )
    return module, report


def _tower(spec: ModelSpec, module: nn.Module) -> nn.Module:
    """The part of a model that reads images."""
    if not hasattr(module.config, "vision_config"):
        return module
    for name in _TOWERS:
        if isinstance(tower := getattr(module, name, None), nn.Module):
            return tower
    raise SourceError(
        f"'{spec.target}' reads more than images, and vitprobe does not know which part of its "
        f"{type(module).__name__} does; take that part and give it to vitprobe.wrap."
    )
