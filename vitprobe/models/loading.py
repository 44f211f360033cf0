"""`load` and `wrap`: the two ways in which a model enters vitprobe."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitprobe.bundled import bundled_encoder
from vitprobe.errors import CaptureError, CheckpointError, SourceError
from vitprobe.models.architecture import infer_architecture
from vitprobe.models.branches import choose_branch, saved_settings
from vitprobe.models.checkpoint import CheckpointFile
from vitprobe.models.discovery import find_anatomy, find_input_size
from vitprobe.models.evidence import find_evidence
from vitprobe.models.filling import fill, fit, read_encoder
from vitprobe.models.folders import read_saved
from vitprobe.models.huggingface_models import load_huggingface
from vitprobe.models.inert import as_mapping
from vitprobe.models.model import ASSUMED, Claims, Fact, Model, live_model, statistics_facts
from vitprobe.models.sources import OPTIONS, RUN_ENCODER, ModelSpec, parse_spec, read_option
from vitprobe.models.timm_models import configured_statistics, load_timm
from vitprobe.models.torchvision_models import load_torchvision

_LIBRARIES = {
    "timm": load_timm,
    "init": load_timm,
    "hf": load_huggingface,
    "init_hf": load_huggingface,
    "torchvision": load_torchvision,
    "init_torchvision": load_torchvision,
}
_SUFFIXES = re.compile(r"(\.(pth|pt|bin|ckpt|tar|safetensors|npz))+$")


def load(
    spec: str | os.PathLike[str],
    *,
    name: str | None = None,
    heads: int | None = None,
    **options: Any,
) -> Model:
    """Load a model from a spec: "path/to/file", "path/to/saved/folder", "run:DIR", "bundled:NAME",
    "timm:NAME", "hf:FOLDER_OR_REPOSITORY", "torchvision:NAME", "init:NAME".

    "init:" before any of them takes only the architecture and draws the weights; "init:NAME" is a
    timm model.

    Options follow the source in the spec ("mae.pth,heads=12,branch=ema,size=224") or come as
    keywords, which win. `heads`, `branch` (which encoder of a file that holds several), `eps`
    (of LayerNorm) and `activation` are for files; `seed` is for init; `size`, `mean` and `std` are
    for all.
    The name defaults to the file's, the run's or the architecture's.

    Raises SourceError for a spec that names nothing loadable, CheckpointError for a file that
    cannot be read or does not fill a Vision Transformer, and CaptureError for a model that cannot
    be probed. Nothing in a checkpoint file is executed.
    """
    parsed = parse_spec(os.fspath(spec), heads=heads, **options)
    if parsed.kind == "probe":
        raise SourceError(
            f"'{parsed.target}' is a probe file, which holds no model to run; open_probe reads it "
            "and compare takes it among its models."
        )
    if parsed.kind in _LIBRARIES:
        return _LIBRARIES[parsed.kind](parsed, name)
    path = checkpoint_path(parsed)
    stem = _SUFFIXES.sub("", path.name)
    if parsed.kind == "run" or (parsed.kind == "init_file" and path.name == RUN_ENCODER):
        if not os.path.isfile(path):
            raise SourceError(
                f"'{path.parent}' is not a finished run of vitprobe pretrain: it holds no "
                f"{RUN_ENCODER}."
            )
        stem = path.parent.resolve().name
    return _load_file(
        path, parsed, name or (f"init:{stem}" if parsed.kind == "init_file" else stem)
    )


def checkpoint_path(spec: ModelSpec) -> Path:
    """Where the file or saved folder of a spec of one lies.

    Raises SourceError for an encoder that does not come with vitprobe.
    """
    if spec.kind == "bundled":
        return bundled_encoder(spec.target)
    return Path(spec.target) / RUN_ENCODER if spec.kind == "run" else Path(spec.target)


def wrap(
    module: nn.Module,
    *,
    name: str,
    input_size: tuple[int, int, int] | None = None,
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    blocks: Sequence[str] = (),
) -> Model:
    """Describe a live module of any family that takes images, so that it can be compared.

    The module itself is kept, not a copy: it is put in eval mode and otherwise left as it is, on
    its own device; of one that `torch.compile` made, the module that it was made from. It is run a
    few times on noise, which shows its layers and its attention, unless it is plainly a Vision
    Transformer of timm's. `input_size` is (channels, height, width), by default what the module
    itself or its config names; `mean` and `std` default to its `pretrained_cfg`, else to
    ImageNet's, as assumed. `blocks` names the modules whose outputs are its layers, in order, where
    they are not to be found out.

    Raises CaptureError, naming what was not found, for a module that cannot be probed.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"wrap takes a torch.nn.Module, not {type(module).__name__}; load takes a spec."
        )
    if input_size is not None and (not isinstance(input_size, tuple) or len(input_size) != 3):
        raise CaptureError(
            f"input_size={input_size} of '{name}' is not (channels, height, width), such as "
            "(3, 224, 224)."
        )
    if isinstance(blocks, str):
        raise CaptureError(f"blocks='{blocks}' of '{name}' is one path; give a list of them.")
    if any(tensor.is_meta for tensor in module.parameters()):
        raise CaptureError(
            f"'{name}' has parameters on the meta device, which have no values; load them first."
        )
    module = getattr(module, "_orig_mod", module)
    module.eval()
    input_size = input_size or find_input_size(module)
    anatomy = find_anatomy(module, input_size, blocks)
    configured = configured_statistics(module, input_size[0])
    given = {
        option: None if values is None else read_option(option, values, f"wrap of '{name}'")
        for option, values in (("mean", mean), ("std", std))
    }
    return live_model(
        name,
        module,
        "module",
        input_size,
        anatomy,
        evidence="module",
        mean=[("user", given["mean"]), ("timm", configured[0])],
        std=[("user", given["std"]), ("timm", configured[1])],
    )


def _load_file(path: Path, spec: ModelSpec, name: str) -> Model:
    file = read_saved(path)
    described = _own_metadata(file)
    settings = saved_settings(file.content)
    choice = choose_branch(path, file.content, settings, spec.options.get("branch"))
    encoder = read_encoder(path, choice)
    evidence = find_evidence(
        path,
        choice.dialect,
        encoder.renamed,
        options=spec.options,
        config=described.get("architecture", {}),
        settings=settings,
        saved_as="config" if "config" in as_mapping(file.content) else "args",
    )
    architecture = infer_architecture(path, encoder.tensors, evidence)
    tensors = fit(path, encoder, architecture)
    fresh = spec.kind == "init_file"
    module = architecture.build(spec.options.get("seed", 0) if fresh else None)
    module.eval().requires_grad_(False)
    input_size = (architecture.arguments["in_chans"], *architecture.arguments["img_size"])
    channels = input_size[0]
    mean, std = (
        [
            ("user", spec.options.get(key)),
            ("config", described.get(key)),
            (evidence.saved_as, _numbers(evidence.stated.get(key), channels)),
            (evidence.saved_as, _numbers(settings.get(key), channels)),
            ("dialect", _numbers(choice.dialect.fixed.get(key), channels)),
            (ASSUMED, _numbers(choice.dialect.usual.get(key), channels)),
        ]
        for key in ("mean", "std")
    )
    _check_statistics(path, mean, std)
    facts = {**architecture.facts, **statistics_facts(channels, mean, std)}
    if fresh:
        facts["position_embedding"] = Fact("random", "timm")
        report = sha256 = training = None
    else:
        name_of_dialect = "vitprobe" if described else choice.dialect.name
        report = fill(path, module, tensors, encoder, choice, name_of_dialect)
        sha256, training = file.sha256, _training(described)
    return Model(
        name=name,
        module=module,
        spec=spec.text,
        input_size=input_size,
        mean=facts["mean"].value,
        std=facts["std"].value,
        anatomy=find_anatomy(module, input_size),
        facts=facts,
        report=report,
        sha256=sha256,
        training=training,
    )


def _training(described: dict[str, Any]) -> dict[str, Any] | None:
    """How the encoder was trained, of what `vitprobe pretrain` wrote beside its weights."""
    about = ("architecture", "mean", "std")
    return {key: value for key, value in described.items() if key not in about} or None


def _own_metadata(file: CheckpointFile) -> dict[str, Any]:
    """What `vitprobe pretrain` wrote beside its weights; empty for any other file."""
    if "vitprobe" not in file.metadata:
        return {}
    try:
        described = json.loads(file.metadata["vitprobe"])
        architecture = described["architecture"]
        architecture["num_heads"]
        read = {"img_size": "size", "patch_size": "size"}
        architecture |= {
            key: OPTIONS[option].read(architecture[key])
            for key, option in read.items()
            if key in architecture
        }
        described |= {
            key: OPTIONS[key].read(described[key]) for key in ("mean", "std") if key in described
        }
    except (ValueError, TypeError, LookupError, OverflowError):
        raise CheckpointError(
            f"The metadata of '{file.path}' are damaged: they do not describe its architecture."
        ) from None
    return described


def _numbers(value: Any, channels: int) -> list[float] | None:
    """A mean or std of the file or its dialect, if it is one number a channel, or one for all."""
    fits = isinstance(value, list | tuple) and len(value) in (1, channels)
    return list(value) if fits and all(type(number) in (int, float) for number in value) else None


def _check_statistics(path: Path, mean: Claims, std: Claims) -> None:
    """Raise CheckpointError where the strongest mean or std is none to normalise by."""
    for name, claims, lowest in (("mean", mean, -math.inf), ("std", std, 0.0)):
        values = next((values for _, values in claims if values is not None), ())
        if not all(lowest < value < math.inf for value in values):
            raise CheckpointError(
                f"'{path}' states {name} {', '.join(map(str, values))}, by which no image can be "
                f"normalised; give it as {name}=."
            )
