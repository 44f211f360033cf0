"""The twin of a model that was never trained: the same architecture with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitprobe.errors import SourceError
from vitprobe.models.loading import checkpoint_path, load
from vitprobe.models.model import Model, Subject
from vitprobe.models.sources import LIBRARIES, RANDOM, parse_spec

# What decides over an encoder and cannot be seen in the shapes of its tensors.
_FACTS = ("heads", "norm_eps", "activation")


def is_untrained(model: Subject) -> bool:
    """Whether a model was loaded with random weights."""
    return model.spec != "module" and parse_spec(model.spec).kind in RANDOM


def untrained(model: Model, name: str) -> Model:
    """A model with the architecture, input and normalisation of another, weights drawn from seed 0.

    Raises SourceError for a wrapped module, of which nothing says how it is built, and for a file
    that is gone; and whatever `load` raises.
    """
    if model.spec == "module":
        raise SourceError(f"'{model.name}' is a wrapped module, which cannot be built again")
    spec = parse_spec(model.spec)
    options: dict[str, Any] = {"size": model.input_size[1:], "mean": model.mean, "std": model.std}
    target = spec.target
    if spec.kind in ("file", "run", "bundled", "init_file"):
        target = str(checkpoint_path(spec))
        if not Path(target).exists():
            raise SourceError(f"its file '{target}' is gone")
        options |= {"heads": model.facts["heads"].value, "eps": model.facts["norm_eps"].value}
        if model.facts["activation"].evidence == "user":
            options["activation"] = model.facts["activation"].value
        options |= {"branch": model.report.branch} if model.report else {}
    library = spec.kind.removeprefix("init_") + ":" if spec.kind.endswith(LIBRARIES) else ""
    return load(f"init:{library}{target}", name=name, seed=0, **options)


def same_architecture(a: Model, b: Model) -> bool:
    """Whether two models have the same encoder, input and normalisation but for the weights."""
    return _shape(a) == _shape(b)


def _shape(model: Model) -> tuple[Any, ...]:
    tensors = {
        name: tuple(parameter.shape)
        for name, parameter in model.module.named_parameters()
        if not name.startswith("head")
    }
    facts = [model.facts[name].value for name in _FACTS if name in model.facts]
    return tensors, facts, model.input_size, model.mean, model.std
