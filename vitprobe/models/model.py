"""A loaded model together with all that is known of it, and from where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vitprobe import notebook
from vitprobe.errors import SourceError
from vitprobe.models.anatomy import Anatomy

ASSUMED = "assumed"


@dataclass(frozen=True)
class Fact:
    """One architectural fact and where it came from.

    evidence: "tensor shape", "config", "args", "dialect", "user", "timm", "torchvision", "module"
        or "assumed".
    note: what the evidence says in detail, such as the convention behind an assumption.
    """

    value: Any
    evidence: str
    note: str = ""


@dataclass(frozen=True)
class LoadReport:
    """How a checkpoint file filled the model.

    dialect: who writes files of this shape ("timm", "mae", "moco_v3", …).
    matched, missing: parameters of the model that the file holds, or lacks.
    unexpected: keys of the file that nothing is known about; none of them belongs to the encoder.
    ignored: keys known not to belong to it (decoder, projector, the other branch, …).
    branch: which of several encoders in the file this is, None where there is one.
    loaded_fraction: share of the encoder's parameters, by element, that came from the file.
    """

    dialect: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    branch: str | None
    loaded_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _repr_html_(self) -> str:
        return notebook.of_load_report(self)


class Subject(Protocol):
    """What a comparison knows of a model, which may be at hand or in a probe file."""

    @property
    def name(self) -> str: ...
    @property
    def input_size(self) -> tuple[int, int, int]: ...
    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def spec(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    def weights_sha256(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...


def assumed_notes(model: Subject) -> list[str]:
    """What a reader must know of facts of a model that nothing says."""
    described = model.describe()
    assumed, facts = described["assumed"], described["facts"]
    notes = []
    if "heads" in assumed:
        notes.append(
            f"{model.name}: {facts['heads']['value']} heads assumed, which nothing in the "
            "file says and which changes every result; give heads=N to state them."
        )
    others = [f"{name} {facts[name]['value']}" for name in assumed if name != "heads"]
    if others:
        notes.append(f"{model.name}: assumed, not read anywhere: {', '.join(others)}.")
    return notes


@dataclass(repr=False)
class Model:
    """A runnable model and its description.

    module: in eval mode. Loaded models are on the CPU, in fp32, without gradients; a wrapped
        module keeps its own device, dtype and gradients.
    spec: the text it was loaded from, or "module" for a wrapped one.
    input_size: (channels, height, width).
    mean, std: per channel, of images in [0, 1].
    report: how the checkpoint file filled the model; None where there was no file.
    sha256: of the checkpoint file.
    training: method, recipe, seed, … where the file says how it was trained.
    """

    name: str
    module: nn.Module
    spec: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    anatomy: Anatomy
    facts: dict[str, Fact]
    report: LoadReport | None = None
    sha256: str | None = None
    training: dict[str, Any] | None = None

    def __repr__(self) -> str:
        facts = ", ".join(
            f"{name} {self.facts[name].value}"
            for name in ("width", "depth", "heads")
            if name in self.facts
        )
        size = "x".join(map(str, self.input_size))
        return f"Model('{self.name}' from '{self.spec}': {facts}, input {size})"

    def _repr_html_(self) -> str:
        return notebook.of_model(self)

    @property
    def dtype(self) -> str:
        """Of its weights, such as "torch.float32"."""
        return str(next((p.dtype for p in self.module.parameters()), torch.float32))

    def weights_sha256(self) -> str:
        """Hash over the names, shapes, types and values of its parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
                values = tensor.detach().cpu().contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (b, c, h, w), as this model was trained to see them."""
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images - mean) / std

    @property
    def nonfinite(self) -> list[str]:
        """Names of the parameters with nan or infinity among their weights."""
        return [
            name
            for name, parameter in self.module.named_parameters()
            if not torch.isfinite(parameter).all()
        ]

    def describe(self) -> dict[str, Any]:
        """All that is known of the model, as JSON-able values."""
        return {
            "name": self.name,
            "spec": self.spec,
            "dialect": self.report.dialect if self.report else None,
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "facts": {
                name: {key: value for key, value in asdict(fact).items() if value != ""}
                for name, fact in self.facts.items()
            },
            "assumed": [name for name, fact in self.facts.items() if fact.evidence == ASSUMED],
            "report": self.report.to_dict() if self.report else None,
            "nonfinite": self.nonfinite,
            "training": self.training,
            "sha256": self.sha256,
        }


Claims = Sequence[tuple[str, Sequence[float] | None]]


def live_model(
    name: str,
    module: nn.Module,
    spec: str,
    input_size: tuple[int, int, int],
    anatomy: Anatomy,
    *,
    evidence: str,
    mean: Claims,
    std: Claims,
    position_embedding: Fact | None = None,
    report: LoadReport | None = None,
    sha256: str | None = None,
) -> Model:
    """The model of a module that speaks for itself: what is not given it is asked for.

    evidence: what the facts of its architecture are said to be known by; mean, std: as of
    `statistics_facts`.

    Raises SourceError as `statistics_facts`.
    """
    facts = module_facts(module, anatomy, evidence)
    if position_embedding is not None:
        facts["position_embedding"] = position_embedding
    facts |= statistics_facts(input_size[0], mean, std)
    return Model(
        name=name,
        module=module,
        spec=spec,
        input_size=input_size,
        mean=facts["mean"].value,
        std=facts["std"].value,
        anatomy=anatomy,
        facts=facts,
        report=report,
        sha256=sha256,
    )


def statistics_facts(channels: int, mean: Claims, std: Claims) -> dict[str, Fact]:
    """The facts "mean" and "std" for images of this many channels.

    mean, std: (evidence, values) of each source, the strongest first; None where it is silent.
    A single value stands for all channels. Where every source is silent the values are ImageNet's,
    and for other than 3 channels the average of ImageNet's three, evidence "assumed".

    Raises SourceError where a source gives a number of values that does not fit the channels.
    """
    return {
        "mean": _statistic("mean", channels, mean, IMAGENET_DEFAULT_MEAN),
        "std": _statistic("std", channels, std, IMAGENET_DEFAULT_STD),
    }


def _statistic(name: str, channels: int, claims: Claims, imagenet: Sequence[float]) -> Fact:
    for evidence, values in claims:
        if values is None:
            continue
        if len(values) not in (1, channels):
            raise SourceError(
                f"{name}={'/'.join(map(str, values))} gives {len(values)} values for images of "
                f"{channels} channel{'s' * (channels > 1)}."
            )
        repeats = channels if len(values) == 1 else 1
        return Fact(tuple(float(value) for value in values) * repeats, evidence)
    if channels == 3:
        return Fact(tuple(imagenet), ASSUMED, "ImageNet's")
    return Fact((round(sum(imagenet) / 3, 4),) * channels, ASSUMED, "average of ImageNet's")


def module_facts(module: nn.Module, anatomy: Anatomy, evidence: str) -> dict[str, Fact]:
    """What a live module says of itself, or was seen of it, all under one kind of evidence.

    What differs between its layers is a tuple, one value a stage; what is not known is left out.
    """
    block = module.get_submodule(anatomy.blocks[0])
    mlp = getattr(block, "mlp", None)
    hidden = getattr(getattr(mlp, "fc1", None), "out_features", None)
    activation = getattr(mlp, "act", None)
    norm = module.get_submodule(anatomy.norms[0]) if anatomy.norms[0] else None
    layers = anatomy.residual
    values = {
        "width": _by_stage(layer.width for layer in layers),
        "depth": len(anatomy.blocks),
        "heads": _by_stage(anatomy.heads),
        "patch_size": _by_stage(layer.patch_size for layer in layers),
        "grid": _by_stage(layer.grid for layer in layers),
        "prefix_tokens": _by_stage(layer.prefix_tokens for layer in layers),
        "mlp_ratio": hidden / anatomy.width if hidden else None,
        "norm_eps": getattr(norm, "eps", getattr(norm, "variance_epsilon", None)),
        "activation": type(activation).__name__ if activation is not None else None,
        "final_norm": anatomy.final_norm,
    }
    return {name: Fact(value, evidence) for name, value in values.items() if value is not None}


def _by_stage(values: Iterable[Any]) -> Any:
    """The value that all layers share, or else one a stage; None where nothing is known."""
    stages = [value for value, _ in groupby(values)]
    return tuple(stages) if len(stages) > 1 else next(iter(stages), None)
