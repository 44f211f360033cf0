"""What shapes cannot say of an architecture, from the strongest evidence there is.

The order: the user, the configuration or arguments saved beside the weights, what the dialect's
code fixes, and last what is usual, which is recorded as assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import GELUTanh, QuickGELU
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import CheckpointError, SourceError
from vitprobe.models.formats.base import Dialect, Settings, Tensors, architecture_name
from vitprobe.models.formats.timm import TIMM
from vitprobe.models.meta import on_meta
from vitprobe.models.model import ASSUMED, Fact

# Activations by the names that are in use for them, in small letters; the last are those of facts.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "gelu_new": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelutanh": GELUTanh,
    "quickgelu": QuickGELU,
}
# timm's convention is 64 channels a head; its largest models are the exceptions.
_USUAL_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
# What shows the number of heads: a table's columns, and a quarter of a head's channels.
RELATIVE_TABLE, ROPE_PERIODS = "relative_position_bias_table", "rope.periods"
# timm's modules whose models may have the encoder of a checkpoint file.
_NAMED = ["vision_transformer", "deit", "beit", "eva"]
# Blocks with nothing but what a rebuilt model has.
_PLAIN = (Block, BeitBlock, EvaBlock)
_HEAD_COUNTS = ("num_heads", "n_heads", "heads", "encoder_num_heads")


@dataclass(frozen=True)
class Evidence:
    """All that may say what shapes cannot.

    options: the user's (`vitprobe.models.sources.OPTIONS`).
    config: arguments of timm's VisionTransformer, complete, from the file's own metadata.
    settings: of the training run, saved beside the weights.
    stated: facts that the dialect reads in those settings.
    seen: facts that the dialect reads in the tensors.
    saved_as: what those settings are: "config" or "args".
    named: facts of timm's model whose name the settings have.
    """

    options: Mapping[str, Any]
    config: Mapping[str, Any]
    settings: Settings
    dialect: Dialect
    stated: Mapping[str, Any]
    seen: Mapping[str, Any]
    saved_as: str
    named: Mapping[str, Any] = field(default_factory=dict)

    def claims(self, name: str) -> Iterator[Fact]:
        """What is said of a fact of `Dialect` and not merely assumed, the strongest first."""
        option = {"num_heads": "heads", "norm_eps": "eps"}.get(name, name)
        sources: tuple[tuple[Mapping[str, Any], str, str], ...] = (
            (self.options, option, "user"),
            (self.config, name, "config"),
            (self.seen, name, "tensor shape"),
            (self.stated, name, self.saved_as),
            (self.dialect.fixed, name, "dialect"),
            (self.named, name, self.saved_as),
        )
        for said, key, evidence in sources:
            if said.get(key) is not None:
                note = f"that of {self.dialect.name}" if evidence == "dialect" else ""
                note = self.named["name"] if said is self.named else note
                yield Fact(said[key], evidence, note)

    def assumption(self, name: str) -> Fact | None:
        """What the dialect usually has."""
        value = self.dialect.usual.get(name)
        return None if value is None else Fact(value, ASSUMED, f"usual for {self.dialect.name}")

    def find(self, name: str) -> Fact | None:
        """What is said or assumed of a fact."""
        return next(self.claims(name), None) or self.assumption(name)


def find_evidence(
    path: Path,
    dialect: Dialect,
    renamed: Tensors,
    *,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    settings: Settings,
    saved_as: str,
) -> Evidence:
    """All the evidence for the encoder with these renamed tensors.

    Raises CheckpointError where they, or the settings, are not as the dialect writes them.
    """
    try:
        said, seen = dialect.stated(settings), dialect.seen(renamed)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' is not as the dialect {dialect.name} writes it: "
            f"{type(error).__name__}: {error}"
        ) from error
    # timm's folders and arguments say the same of whatever dialect its models are read in.
    stated = {**TIMM.stated(settings), **{key: said[key] for key in said if said[key] is not None}}
    return Evidence(options, config, settings, dialect, stated, seen, saved_as)


def with_named(path: Path, evidence: Evidence, width: int, depth: int) -> Evidence:
    """The evidence and what timm's model of the name in the settings has, if it is of this size.

    Raises CheckpointError where that model computes what no tensor shows.
    """
    stated = evidence.stated.get("timm_model")
    name = stated if isinstance(stated, str) else architecture_name(evidence.settings)
    if name.partition(".")[0] not in timm.list_models(module=_NAMED):
        return evidence
    with torch.random.fork_rng(devices=[]), on_meta():
        module = timm.create_model(name.partition(".")[0], pretrained=False)
    blocks: Any = getattr(module, "blocks", ())
    fits = isinstance(module, VisionTransformer | Beit | Eva)
    if not fits or (module.embed_dim, len(blocks)) != (width, depth):
        return evidence
    unseen = {
        "rotary positions": getattr(module, "rope", None) is not None
        and evidence.find("rope") is None,
        "norms behind its layers": isinstance(blocks[0], ResPostBlock | EvaBlockPostNorm),
    }
    if any(unseen.values()):
        what = " and ".join(thing for thing, has in unseen.items() if has)
        raise CheckpointError(
            f"'{path}' holds timm's {name}, whose {what} no tensor shows: load its weights with "
            "timm, and give the module to vitprobe.wrap."
        )
    if type(blocks[0]) not in _PLAIN:
        return evidence  # whose tensors show what it is
    facts = {
        "name": name,
        "heads": blocks[0].attn.num_heads,
        "norm_eps": blocks[0].norm1.eps,
        "activation": type(blocks[0].mlp.act).__name__,
    }
    return replace(evidence, named=facts)


def norm_eps(path: Path, evidence: Evidence) -> Fact:
    """The epsilon of the model's LayerNorms."""
    if evidence.config and "norm_eps" not in evidence.config and "eps" not in evidence.options:
        return Fact(1e-6, "config")
    fact = evidence.find("norm_eps") or Fact(1e-6, ASSUMED, "timm's default")
    if isinstance(fact.value, bool | str) or not _positive(fact.value):
        raise CheckpointError(
            f"'{path}' states the LayerNorm epsilon {fact.value}; give it as eps=."
        )
    return Fact(float(fact.value), fact.evidence, fact.note)


def _positive(value: Any) -> bool:
    try:
        return 0 < float(value) < 1
    except (TypeError, ValueError, OverflowError):
        return False


def activation(path: Path, evidence: Evidence) -> tuple[Fact, type[nn.Module]]:
    """The activation in the MLPs: the name of its class, and the class."""
    fact = evidence.find("activation")
    if fact is None:
        fact = Fact("gelu", "config") if evidence.config else Fact("gelu", ASSUMED)
    kind = ACTIVATIONS.get(str(fact.value).lower())
    if kind is None:
        raise CheckpointError(
            f"'{path}' is to have the activation '{fact.value}'; vitprobe knows "
            f"{', '.join(ACTIVATIONS)}: give one of them as activation=."
        )
    return Fact(kind.__name__, fact.evidence, fact.note), kind


def heads(path: Path, tensors: Mapping[str, Tensor], width: int, evidence: Evidence) -> Fact:
    """The number of attention heads.

    Raises CheckpointError where nothing gives one that divides the width; SourceError where the
    user's does not, or contradicts the tensors.
    """
    said = next((fact for fact in evidence.claims("num_heads") if _is_count(fact.value)), None)
    shaped = _heads_in_tensors(tensors, width)
    if said and said.evidence == "user":
        if width % said.value:
            raise SourceError(f"heads={said.value} does not divide the width {width} of '{path}'.")
        if shaped and shaped.value != said.value:
            raise SourceError(
                f"heads={said.value} contradicts '{path}', whose tensors have {shaped.value} "
                f"({shaped.note})."
            )
        return said
    fact = shaped or said or _heads_in_settings(evidence)
    fact = fact or evidence.assumption("num_heads") or _heads_by_convention(width, evidence.dialect)
    if fact and _is_count(fact.value) and width % fact.value:
        raise CheckpointError(
            f"'{path}' states {fact.value} attention heads ({fact.evidence}), which cannot share "
            f"its width of {width}; give the number as heads=N."
        )
    if fact is None or not _is_count(fact.value):
        raise CheckpointError(
            f"Nothing in '{path}' says how many attention heads share its width of {width}; "
            "give the number as heads=N."
        )
    return fact


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _heads_in_tensors(tensors: Mapping[str, Tensor], width: int) -> Fact | None:
    """From what there is once a head, or as wide as one."""
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    if norm is not None and norm.ndim == 1 and 0 < norm.numel() < width:
        return Fact(width // norm.numel(), "tensor shape", "width of q_norm")
    table = next((tensors[key] for key in tensors if key.endswith(RELATIVE_TABLE)), None)
    if table is not None and table.ndim == 2 and table.shape[1]:
        return Fact(table.shape[1], "tensor shape", "width of the relative position table")
    periods = tensors.get(ROPE_PERIODS)
    if periods is not None and periods.ndim == 1 and periods.numel():
        return Fact(width // (4 * periods.numel()), "tensor shape", "number of rotary periods")
    return None


def _heads_in_settings(evidence: Evidence) -> Fact | None:
    """From arguments of the training run: a number, or the name of an architecture."""
    settings, dialect = evidence.settings, evidence.dialect
    for name in _HEAD_COUNTS:
        if _is_count(settings.get(name)):
            return Fact(settings[name], evidence.saved_as, name)
    name = architecture_name(settings)
    if dialect.heads and name in dialect.heads:
        return Fact(dialect.heads[name], evidence.saved_as, name)
    if "heads" in evidence.named:
        return Fact(evidence.named["heads"], evidence.saved_as, evidence.named["name"])
    return None


def _heads_by_convention(width: int, dialect: Dialect) -> Fact | None:
    if dialect.usual_heads and width in dialect.usual_heads:
        return Fact(dialect.usual_heads[width], ASSUMED, f"the convention of {dialect.name}")
    if width in _USUAL_HEADS:
        return Fact(_USUAL_HEADS[width], ASSUMED, "timm's at this width")
    return Fact(width // 64, ASSUMED, "64 channels a head") if width % 64 == 0 else None
