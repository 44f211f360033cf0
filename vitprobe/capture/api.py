"""`capture` and `capturing`: features and attention for an analysis of one's own.

Both see a model through the same hooks as a comparison does, and leave its output as it is.
`capture` runs a model over images; `capturing` watches forward passes that someone else makes.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from vitprobe import provenance
from vitprobe.capture.attention import AttentionTap
from vitprobe.capture.batches import batches
from vitprobe.capture.features import (
    Convention,
    OnFeatures,
    convention_of,
    feature_layouts,
    hook_features,
)
from vitprobe.capture.maps import Maps
from vitprobe.capture.recorder import Recorder
from vitprobe.capture.storing import Store, storing
from vitprobe.data.blocks import View
from vitprobe.devices import computing, find_device, placed, same_modes
from vitprobe.errors import CaptureError
from vitprobe.models import Model, wrap
from vitprobe.models.anatomy import Layout, Site

What = Literal["features", "attention", "both"]

_WHAT: Final = ("features", "attention", "both")
_PRECISIONS: Final = ("fp32", "bf16")
_UNSEEN: Final = (
    "it did not run, or ran where nothing can be seen: in a TorchScript module, or, for attention, "
    "in another thread or process"
)


class Layers(Mapping[int, Tensor]):
    """Tensors by layer, fetched when asked for."""

    def __init__(self, layers: Sequence[int], fetch: Callable[[int], Tensor]) -> None:
        self._layers = layers
        self._fetch = fetch

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._layers:
            kept = ", ".join(map(str, self._layers)) or "none"
            raise KeyError(f"layer {layer} was not captured; layers that were: {kept}")
        return self._fetch(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Layers({', '.join(map(str, self._layers))})"


@dataclass(frozen=True)
class Captured:
    """What was captured of a model, by layer. In files, tensors are read when they are asked for.

    model: as it was described; `model.anatomy` has all its layers.
    convention: what a feature layer is, "normed" or "residual" where the model has no other.
    features: (images, tokens, width) by layer from 0 to L; prefix tokens first, then patches row by
        row where their order is known.
    attention: post-softmax, (images, heads, queries, keys) by attention layer from 0; of attention
        in windows (images, windows, heads, queries, keys). Prefix tokens first.
    layouts, sites: where the tokens of each of these layers lie in the image.
    names: of the images, in order; empty for forward passes of one's own.
    path: of the file; None in memory.
    """

    model: Model
    convention: Convention
    features: Layers
    attention: Layers
    layouts: Mapping[int, Layout]
    sites: Mapping[int, Site]
    names: tuple[str, ...] = ()
    path: Path | None = None


def capture(
    model: Model | nn.Module,
    images: Any,
    layers: Iterable[int] | None = None,
    *,
    what: What = "features",
    convention: Convention = "normed",
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    workers: int = 2,
) -> Captured:
    """Run a model over images and keep what its layers compute, without gradients.

        captured = vp.capture(model, images, layers=[0, -1])
        captured.features[12]  # (images, tokens, width)

    Args:
        model: from `load` or `wrap`, or any `nn.Module`, which is wrapped under the defaults of
            `wrap`.
        images: an array or tensor (n, channels, height, width) in [0, 1], kept in its order, or
            whatever else `vitprobe.images` takes, files in the seeded order that gives; `names`
            says which. They are resized and normalised as the model wants them.
        layers: features 0 … L, attention layers 0 …, negative ones counted from the last; all
            unless given.
        what: `features`, `attention` or `both`.
        convention: of features, as in `compare`.
        out: a name ending in .safetensors or .zarr to write to, batch after batch, instead of
            memory: tensors "features.LAYER" and "attention.LAYER" (zarr: features/LAYER), where
            they are known "places.LAYER.query_xy" and ".key_xy" as in a `Site`, and JSON "capture"
            that describes them.
        force: replace an earlier file there.
        dtype: of what is kept. Attention is always computed in single precision.
        batch_size: images in one forward pass.
        device: `auto` (CUDA or MPS where there is one), or a torch device.
        precision: `fp32` (TF32 and autocast off) or `bf16` autocast.
        workers: threads that decode images ahead.

    Returns:
        What was captured.

    Raises:
        CaptureError: a model that cannot be described, layers that it does not have, a layer that
            stays silent, more than fits into memory.
        DataError: images that are none, or cannot be decoded.
        ResultError: `out` cannot be written.
    """
    _check(what)
    _check_run(dtype, batch_size, precision)
    chosen = _read(layers)
    with ExitStack() as stack:
        model = stack.enter_context(_described(model))
        plan = _plan(model, chosen, what, convention)
        where = find_device(device)
        view = View(*model.input_size)
        count, parts = batches(images, view, batch_size, workers)
        if out is None and count is not None:
            _check_room(plan, count, dtype)
        store = stack.enter_context(storing(out, dtype, count, force))

        def keep(group: str, layer: int, tensor: Tensor) -> None:
            store.append(f"{group}.{layer}", tensor.detach().to("cpu", dtype))

        maps = Maps(plan.sites, partial(keep, "attention"))
        names: list[str] = []
        recorder = Recorder(
            model,
            convention=convention,
            on_features=_only(plan.layouts, partial(keep, "features")) if plan.layouts else None,
            on_attention=maps.add if plan.sites else None,
        )
        for context in (
            computing(where, precision),
            placed(model.module, where),
            torch.no_grad(),
            recorder,
        ):
            stack.enter_context(context)
        for batch_names, batch in parts:
            recorder.run(batch.to(where), len(names))
            maps.flush()
            names += batch_names
        if out is not None:
            _keep_places(store, plan.sites)
        store.finish(_about(plan, names))
    return Captured(
        model,
        plan.convention,
        Layers(tuple(plan.layouts), lambda layer: store.read(f"features.{layer}")),
        Layers(tuple(plan.sites), lambda layer: store.read(f"attention.{layer}")),
        plan.layouts,
        plan.sites,
        tuple(names),
        None if out is None else Path(out),
    )


@contextmanager
def capturing(
    model: Model | nn.Module,
    layers: Iterable[int] | None = None,
    *,
    what: What = "features",
    convention: Convention = "normed",
) -> Iterator[Captured]:
    """Keep what a model's layers compute in forward passes that are made inside the `with` block::

        with vp.capturing(model, layers=[-1], what="both") as captured:
            loss = criterion(model.module(inputs), targets)
            loss = loss + captured.attention[11].square().mean()
        captured.features[12]

    The module, or any that contains it, is run as always: its inputs, mode, autocast and device are
    the caller's, and its output does not change. Where gradients are on, what is captured has its
    own. Features come in the model's dtype, attention in single precision and before dropout. Each
    forward pass adds its images to those before. A bare module is described by a few runs on noise
    at each use: before a loop, `wrap` it once.

    Not seen are TorchScript modules and, of attention, other threads and processes (DataParallel).
    What is compiled by `torch.compile` runs uncompiled inside the block.

    Args:
        model, layers, what, convention: as for `capture`.

    Raises:
        CaptureError: as for `capture`; at the end of the block, where a layer stayed silent or gave
            other images than the rest.
    """
    _check(what)
    chosen = _read(layers)
    with _described(model) as known:
        model = known
    plan = _plan(model, chosen, what, convention)
    features: dict[int, list[Tensor]] = {layer: [] for layer in plan.layouts}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in plan.sites}
    maps = Maps(plan.sites, lambda layer, tensor: attention[layer].append(tensor))

    def joined(parts: Mapping[int, list[Tensor]], layer: int) -> Tensor:
        maps.flush()
        if not parts[layer]:
            raise CaptureError(
                f"model '{model.name}' has given nothing in layer {layer} yet; run it first"
            )
        return torch.cat(parts[layer])

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if features:
            keep = _only(features, lambda layer, tokens: features[layer].append(tokens))
            for handle in hook_features(model, convention, keep):
                stack.callback(handle.remove)
        if attention:
            stack.enter_context(AttentionTap(model, maps.add, gradients=True))
        yield Captured(
            model,
            plan.convention,
            Layers(tuple(features), partial(joined, features)),
            Layers(tuple(attention), partial(joined, attention)),
            plan.layouts,
            plan.sites,
        )
    maps.flush()
    _check_heard(model, "features", features)
    _check_heard(model, "attention", attention)


@dataclass(frozen=True)
class _Plan:
    """What is to be captured: the chosen layers and how they lie."""

    model: Model
    convention: Convention
    layouts: dict[int, Layout]
    sites: dict[int, Site]


def _check(what: str) -> None:
    if what not in _WHAT:
        raise CaptureError(f"cannot capture '{what}': choose one of {', '.join(_WHAT)}")


def _check_run(dtype: object, batch_size: int, precision: str) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CaptureError(f"dtype={dtype!r} is no torch dtype of floats, such as torch.float16")
    if batch_size < 1:
        raise CaptureError(f"a batch of {batch_size} images is none; give 1 or more")
    if precision not in _PRECISIONS:
        raise CaptureError(f"unknown precision '{precision}': use {' or '.join(_PRECISIONS)}")


def _read(layers: Iterable[int] | None) -> list[int] | None:
    """The numbers of the chosen layers, read once: they may come from a generator or an array."""
    if layers is None:
        return None
    try:
        given = list(layers)
        chosen = [operator.index(layer) for layer in given]
    except TypeError:
        given = chosen = []
    # A mask of layers would be read as layers 0 and 1.
    if not chosen or any(isinstance(layer, bool) for layer in given):
        raise CaptureError(
            f"layers={layers!r} are no numbers of layers: give integers such as [0, -1], or leave "
            "it out for all"
        )
    return chosen


@contextmanager
def _described(model: Model | nn.Module) -> Iterator[Model]:
    """The model, or a module wrapped under its class's name; in the mode it was in afterwards."""
    module = model.module if isinstance(model, Model) else model
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"cannot capture {type(model).__name__}: give a torch.nn.Module, or a model from load "
            "or wrap"
        )
    with same_modes(module):
        kind = type(getattr(module, "_orig_mod", module)).__name__
        yield model if isinstance(model, Model) else wrap(module, name=kind)


def _plan(model: Model, layers: Sequence[int] | None, what: What, convention: Convention) -> _Plan:
    layouts: dict[int, Layout] = {}
    sites: dict[int, Site] = {}
    followed = convention_of(model, convention)
    if what != "attention":
        known = feature_layouts(model, convention)
        layouts = {i: known[i] for i in _chosen(model, "features", layers, len(known))}
    if what != "features":
        if not model.anatomy.sites:
            raise CaptureError(
                f"model '{model.name}' has no attention to capture: {model.anatomy.no_attention}"
            )
        chosen = _chosen(model, "attention", layers, len(model.anatomy.sites))
        sites = {i: model.anatomy.sites[i] for i in chosen}
    return _Plan(model, followed, layouts, sites)


def _chosen(model: Model, group: str, layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    for layer in layers:
        if not -count <= layer < count:
            raise CaptureError(
                f"model '{model.name}' has {group} in layers 0 to {count - 1}; there is no {layer}"
            )
    return sorted({layer % count for layer in layers})


def _only(layers: Mapping[int, Any], keep: OnFeatures) -> OnFeatures:
    """`keep` for these layers alone."""

    def on_features(layer: int, tokens: Tensor) -> None:
        if layer in layers:
            keep(layer, tokens)

    return on_features


def _check_room(plan: _Plan, images: int, dtype: torch.dtype) -> None:
    """Raise CaptureError where what is to be kept is more than the machine's memory."""
    numbers = sum(
        (layout.prefix_tokens + layout.patches) * layout.width for layout in plan.layouts.values()
    ) + sum(site.windows * site.heads * site.queries * site.keys for site in plan.sites.values())
    needed = images * numbers * dtype.itemsize
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return
    if needed > memory:
        raise CaptureError(
            f"{needed / 2**30:.1f} GiB of {images} images of model '{plan.model.name}' do not fit "
            f"into {memory / 2**30:.1f} GiB of memory: give fewer layers or images, or "
            "out='NAME.zarr' to write them to a file"
        )


def _keep_places(store: Store, sites: Mapping[int, Site]) -> None:
    for layer, site in sites.items():
        for name in ("query_xy", "key_xy"):
            places = getattr(site, name)
            if places is not None:
                store.append(f"places.{layer}.{name}", places)


def _about(plan: _Plan, names: Sequence[str]) -> dict[str, Any]:
    """What a reader of the tensors must know, as JSON-able values."""
    return {
        **provenance.collect(),
        "model": plan.model.describe(),
        "convention": plan.convention,
        "images": list(names),
        "features": {layer: asdict(layout) for layer, layout in plan.layouts.items()},
        "attention": {
            layer: {key: value for key, value in vars(site).items() if isinstance(value, str | int)}
            for layer, site in plan.sites.items()
        },
    }


def _check_heard(model: Model, group: str, heard: Mapping[int, Sequence[Tensor]]) -> None:
    """Raise CaptureError where layers gave nothing, or not all of them the same images."""
    images = {layer: sum(map(len, parts)) for layer, parts in heard.items()}
    silent = [layer for layer, count in images.items() if not count]
    if silent:
        which = ", ".join(map(str, silent))
        raise CaptureError(f"model '{model.name}' gave no {group} in layers {which}: {_UNSEEN}")
    if len(set(images.values())) > 1:
        raise CaptureError(
            f"model '{model.name}' gave {group} of unequal numbers of images, from "
            f"{min(images.values())} to {max(images.values())}: run all of it the same number of "
            "times"
        )
