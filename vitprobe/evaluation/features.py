"""Pooled features of labelled images: one forward pass gives all that are asked for.

The choices are those of DINOv2's linear evaluation (Oquab et al., "DINOv2: learning robust visual
features without supervision", TMLR 2024, appendix B.3): class token, mean of patch tokens, both,
and the class tokens of the last n blocks; besides, the tokens of any layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from vitprobe.capture import Recorder
from vitprobe.capture.features import Convention, convention_of, feature_layouts, hook_features
from vitprobe.data.blocks import View
from vitprobe.data.parts import Part
from vitprobe.errors import MeasureError
from vitprobe.evaluation.base import Passes, Precision, running
from vitprobe.evaluation.batches import pixel_batches
from vitprobe.models import Model
from vitprobe.models.anatomy import Layout

AUTO: Final = "auto"
_TEXT: Final = re.compile(r"(cls|mean)(\d*)(\+mean)?")

Pool = Literal["cls", "mean"]


@dataclass(frozen=True)
class Choice:
    """What of a model's tokens is a feature.

    pool: of the class token, or the mean of patches.
    blocks: of how many of the last blocks these are put side by side, each normalised by the
        model's final norm, as DINOv2 does.
    with_mean: whether the mean of patches of the last block is put beside them.
    layer: of these tokens instead, 0 … L under `convention`; None for the final norm's.
    """

    pool: Pool
    blocks: int = 1
    with_mean: bool = False
    layer: int | None = None
    convention: Convention = "normed"

    def __str__(self) -> str:
        """As `parse_choice` reads it, such as `cls4+mean`; a layer is not part of it."""
        number = str(self.blocks) if self.blocks > 1 else ""
        return f"{self.pool}{number}{'+mean' if self.with_mean else ''}"

    @property
    def parts(self) -> tuple[_Pooled, ...]:
        """The vectors that make it up, in order."""
        last: _Place = (self.convention, self.layer) if self.layer is not None else ("final", 0)
        places = [("final", back) for back in range(self.blocks - 1, 0, -1)] + [last]
        mean: list[_Pooled] = [(last, "mean")] if self.with_mean else []
        return (*((place, self.pool) for place in places), *mean)


_Place = tuple[str, int]
"""("final", n): the block that n others follow, under the final norm; else convention and layer."""
_Pooled = tuple[_Place, Pool]


def parse_choice(text: str, model: Model) -> Choice:
    """A choice as it is written: `cls`, `mean`, `cls+mean`, `cls4`, `cls4+mean`, `mean4`, `auto`.

    `auto` is what the model's own head reads: the mean of patches where the model pools them, else
    its class token. Of a model without class token it is the mean that is taken for either.

    Raises:
        MeasureError: there is no such choice, or the model has no such tokens.
    """
    layout = feature_layouts(model, "normed")[-1]
    pools = getattr(model.module, "global_pool", "token")
    if text == AUTO:
        return Choice("cls" if _has_class(model, layout) and pools == "token" else "mean")
    found = _TEXT.fullmatch(text)
    if not found or found[2] in ("0", "1") or (found[1] == "mean" and found[3]):
        raise MeasureError(
            f"no features '{text}'; there are {AUTO}, cls, mean and cls+mean, and of the last "
            "blocks, such as four, cls4, mean4 and cls4+mean"
        )
    blocks = int(found[2] or 1)
    if not _has_class(model, layout):
        return _checked(Choice("mean", blocks), model)
    return _checked(Choice("cls" if found[1] == "cls" else "mean", blocks, bool(found[3])), model)


def at_layers(choice: Choice, model: Model, convention: Convention) -> list[Choice]:
    """The same pooling of every layer 0 … L; of layers without class token the mean of patches.

    Raises:
        CaptureError: no such convention.
        MeasureError: a choice of several blocks, which belongs to no single layer.
    """
    if choice.blocks > 1:
        raise MeasureError(
            f"features '{choice}' are of several blocks; by layer there are cls, mean and cls+mean"
        )
    own = convention_of(model, convention)
    return [
        Choice(choice.pool, 1, choice.with_mean, layer, own)
        if _has_class(model, layout)
        else Choice("mean", layer=layer, convention=own)
        for layer, layout in enumerate(feature_layouts(model, convention))
    ]


def extract(
    model: Model,
    parts: Sequence[tuple[Part, NDArray[np.int64] | None]],
    choices: Iterable[Choice],
    *,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    workers: int,
    progress: bool,
) -> list[dict[Choice, Tensor]]:
    """Features of images, in one pass: for each of `parts` (n, p) float32 by choice, on `device`.

    Args:
        parts: images and which of them, None for all.

    Raises:
        MeasureError: features that are not finite, or more of them than the device has room for.
        VitprobeError: no room for a single image.
        CaptureError: a layer stayed silent.
        DataError: as `pixel_batches`.
    """
    choices = list(dict.fromkeys(choices))
    counts = [len(part) if index is None else len(index) for part, index in parts]
    made = []
    with running(model, device, precision), _Pooling(model, choices) as pooling:
        passes = Passes(model, pooling.run)
        bar = tqdm(total=sum(counts), unit="image", disable=None if progress else True)
        with bar:
            for (part, index), count in zip(parts, counts, strict=True):
                bank: dict[_Pooled, Tensor] = {}
                first = 0
                for pixels in pixel_batches(
                    part,
                    index,
                    View(*model.input_size),
                    size=batch_size,
                    workers=workers,
                    device=device,
                ):
                    for found in passes(pixels):
                        if not bank:
                            _check_room(found, sum(counts), device)
                            bank = {
                                key: value.new_empty(count, value.shape[1])
                                for key, value in found.items()
                            }
                            _check(model, found)
                        last = first + len(next(iter(found.values())))
                        for key, value in found.items():
                            bank[key][first:last] = value
                        first = last
                    bar.update(len(pixels))
                _check(model, bank)
                made.append({choice: _joined(bank, choice) for choice in choices})
    return made


class _Pooling:
    """Runs a model and pools the tokens that the choices are made of."""

    def __init__(self, model: Model, choices: Sequence[Choice]) -> None:
        self._model = model
        self._wanted = list(dict.fromkeys(part for choice in choices for part in choice.parts))
        self._found: dict[_Pooled, Tensor] = {}
        self._last = len(model.anatomy.blocks)
        self._normed = convention_of(model, "normed")
        path = model.anatomy.final_norm
        self._norm = None if path is None else model.module.get_submodule(path)
        self._stack = ExitStack()
        self._recorder = Recorder(model, convention="normed", on_features=self._on_final)

    def __enter__(self) -> _Pooling:
        with ExitStack() as stack:
            stack.enter_context(self._recorder)
            earlier = any(place[0] == "final" and place[1] for place, _ in self._wanted)
            residual = any(place[0] == "residual" for place, _ in self._wanted)
            if earlier or (residual and self._normed != "residual"):
                for handle in hook_features(self._model, "residual", self._on_residual):
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, pixels: Tensor) -> dict[_Pooled, Tensor]:
        """What was asked for of these images, (n, width) float32 each, in the order wanted."""
        self._found = {}
        self._recorder.run(pixels)
        return {key: self._found[key] for key in self._wanted}

    def _on_final(self, layer: int, tokens: Tensor) -> None:
        layout = feature_layouts(self._model, "normed")[layer]
        self._keep((self._normed, layer), tokens, layout)
        if layer == self._last:
            self._keep(("final", 0), tokens, layout)

    def _on_residual(self, layer: int, tokens: Tensor) -> None:
        layout = feature_layouts(self._model, "residual")[layer]
        self._keep(("residual", layer), tokens, layout)
        place = ("final", self._last - layer)
        if 0 < layer < self._last and any(place == wanted for wanted, _ in self._wanted):
            # `.forward` and not a call: hooks on the norm must not see this extra use.
            self._keep(place, tokens if self._norm is None else self._norm.forward(tokens), layout)

    def _keep(self, place: _Place, tokens: Tensor, layout: Layout) -> None:
        for key in ((place, "cls"), (place, "mean")):
            if key in self._wanted:
                prefix = layout.prefix_tokens
                with torch.autocast(tokens.device.type, enabled=False):
                    chosen = tokens[:, 0] if key[1] == "cls" else tokens[:, prefix:]
                    pooled = chosen.float() if key[1] == "cls" else chosen.float().mean(dim=1)
                self._found[key] = pooled


def _has_class(model: Model, layout: Layout) -> bool:
    return model.anatomy.class_token and layout.prefix_tokens > 0


def _checked(choice: Choice, model: Model) -> Choice:
    depth = len(model.anatomy.blocks)
    if choice.blocks > depth:
        raise MeasureError(
            f"features '{choice}' are of {choice.blocks} blocks and model '{model.name}' has "
            f"{depth}; take fewer"
        )
    if choice.blocks > 1 and not model.anatomy.plain:
        raise MeasureError(
            f"the blocks of model '{model.name}' are not all alike, so that '{choice}' cannot be "
            "taken of it; leave out the number"
        )
    return choice


def _joined(bank: dict[_Pooled, Tensor], choice: Choice) -> Tensor:
    parts = [bank[part] for part in choice.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _check(model: Model, found: dict[_Pooled, Tensor]) -> None:
    """Raise MeasureError naming a feature and image that is not finite."""
    for ((where, layer), pool), values in found.items():
        # The sum of finite numbers may overflow, one that is not finite always shows in it.
        if torch.isfinite(values.sum()):
            continue
        bad = ~torch.isfinite(values).all(dim=1)
        if bad.any():
            what = "class token" if pool == "cls" else "mean of the patches"
            place = "" if where == "final" else f" at layer {layer}"
            raise MeasureError(
                f"the {what}{place} of model '{model.name}' is not finite for image "
                f"{int(bad.int().argmax())}; check its weights with 'vitprobe inspect'"
            )


def _check_room(found: dict[_Pooled, Tensor], images: int, device: torch.device) -> None:
    """Raise MeasureError where features of so many images plainly do not fit the device."""
    needed = 4 * images * sum(value.shape[1] for value in found.values())
    room = _free(device)
    if room is not None and needed > room:
        raise MeasureError(
            f"features of {images:,} images take {needed / 1e9:.1f} GB and {device} has "
            f"{room / 1e9:.1f} GB free; give fewer --features, no --layers, or a share of --labels"
        )


def _free(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            known = dict(line.split()[:2] for line in file)
        return 1024.0 * int(known["MemAvailable:"])
    except (OSError, KeyError, ValueError):
        return None
