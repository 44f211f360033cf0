"""The anatomy of any model, by running it and watching.

A first pass of one image shows which modules run, on what, and where attention is computed; that
names the blocks and their norms. A second one, of the images of the locating experiment, shows
where in the image each token lies. No family of models is known here by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitprobe.errors import CaptureError
from vitprobe.models.anatomy import Anatomy, Layout, Site
from vitprobe.models.blocks import (
    entering,
    final_norm,
    find_blocks,
    pre_norm,
    stream,
)
from vitprobe.models.calls import AttentionCall, AttentionCalls
from vitprobe.models.layouts import layout_of_site, located_layout, shape_layouts
from vitprobe.models.locate import Locating
from vitprobe.models.places import Ramps
from vitprobe.models.trace import Run, SeenEnoughError, Trace, noise, run_once, tensors

MOST_NUMBERS: Final = 1 << 29
"""Most numbers of one tensor in the experiment (2 GB in single precision)."""


@dataclass(frozen=True)
class _Seen:
    """One computation of attention in the first pass."""

    path: str
    call: int
    shape: tuple[int, ...]
    time: int


class _Seeing(AttentionCalls):
    """Writes down what attention is computed while a trace is taken."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.module)
        self.found: list[_Seen] = []
        self._trace = trace

    def on_call(self, call: AttentionCall) -> None:
        self.found.append(_Seen(call.path, call.call, call.shape, self._trace.tick()))


@dataclass(frozen=True)
class _Point:
    """Where a layer's tokens pass: what a module reads, or returns; `shape` for one image."""

    path: str
    side: Literal["reads", "returns"]
    shape: tuple[int, ...]


def survey(
    module: nn.Module, input_size: tuple[int, int, int], blocks: Sequence[str] = ()
) -> Anatomy:
    """The anatomy of a module in eval mode, for inputs of (channels, height, width).

    blocks: paths of its blocks, where it is not to be found out which they are.

    Raises CaptureError where the module does not run on one such image, or has no list of blocks.
    """
    with Trace(module) as trace, _Seeing(trace) as seeing:
        run_once(module, noise(module, 1, input_size))
    found = find_blocks(trace, blocks)
    runs = found.runs
    norms = tuple(pre_norm(trace, run, _attention_of(run, seeing.found)) for run in runs)
    final = final_norm(trace, found)
    branches = found.branches and final is not None
    residual = _residual(runs, branches, final)
    last = residual[-1].shape
    pooled = final is not None and _pooled(final, last)
    if final is not None and not pooled and not _of_tokens(final, last):
        final = None
    normed: list[_Point] = []
    if None not in norms:
        normed = [_Point(run.path, "returns", run.shape or ()) for run in norms if run]
        if final is not None and not pooled:
            normed.append(_Point(final.path, "returns", final.shape or ()))
        normed += residual[len(normed) :]
    points = [*residual, *normed]
    layouts, sites = _Survey(module, input_size, trace, runs, seeing.found).located(points)
    prefixed = any(layout.prefix_tokens for layout in layouts.values())
    return Anatomy(
        blocks=tuple(run.path for run in runs),
        norms=tuple(run.path if run else None for run in norms),
        final_norm=final.path if final else None,
        final_norm_pooled=pooled,
        class_token=prefixed and _has_class_token(module),
        pre_norm=bool(normed),
        branches=branches,
        residual=tuple(layouts[point] for point in residual),
        normed=tuple(layouts[point] for point in normed),
        sites=sites,
        no_attention="" if sites else _why_none(module, len(seeing.found)),
    )


def _attention_of(block: Run, seen: Sequence[_Seen]) -> str | None:
    """The module in which the first attention of a block is computed."""
    return next((call.path for call in seen if block.start < call.time < block.end), None)


def _residual(runs: Sequence[Run], branches: bool, final: Run | None) -> list[_Point]:
    def reads(run: Run) -> _Point:
        tokens = entering(run)
        if tokens is None:
            raise CaptureError(f"The block '{run.path}' reads no tokens or maps.")
        return _Point(run.path, "reads", tuple(tokens.shape))

    if branches and final is not None:
        last = reads(runs[-1])
        return [*map(reads, runs), _Point(final.path, "reads", last.shape)]
    points = [reads(runs[0])]
    for run in runs:
        tokens = stream(run.returned)
        if tokens is None:
            raise CaptureError(f"The block '{run.path}' returns no tokens or maps.")
        points.append(_Point(run.path, "returns", tuple(tokens.shape)))
    return points


def _of_tokens(norm: Run, last: tuple[int, ...]) -> bool:
    """Whether a norm reads at least the tokens of the last layer, in its width."""
    shape = norm.shape or ()
    return math.prod(shape) >= math.prod(last) and bool({*shape} & {*last} - {1})


def _pooled(norm: Run, last: tuple[int, ...]) -> bool:
    """Whether a norm reads one vector, as wide as the tokens of the last layer."""
    return math.prod(norm.shape or ()) in last and math.prod(last) > max(last)


class _Survey:
    """The locating experiment, run as far and on as many images as is needed."""

    def __init__(
        self,
        module: nn.Module,
        input_size: tuple[int, int, int],
        trace: Trace,
        blocks: Sequence[Run],
        seen: Sequence[_Seen],
    ) -> None:
        self._module = module
        self._trace = trace
        self._input_size = input_size
        self._blocks = blocks
        self._seen = seen

    def located(self, points: Sequence[_Point]) -> tuple[dict[_Point, Layout], tuple[Site, ...]]:
        """The layout at each point, and the attention layers."""
        plain = {point: shape_layouts(point.shape, self._input_size) for point in points}
        if not self._seen and all(len(found) == 1 for found in plain.values()):
            return {point: found[0] for point, found in plain.items()}, ()
        if self._isotropic(points):
            layouts, sites = self._experiment(points[:1], only_first=True)
            copies = dict.fromkeys(points, layouts[points[0]])
            return copies, (*self._in_every_block(sites), *self._pooling(layouts[points[0]]))
        return self._experiment(points, only_first=False)

    def _within(self, block: Run) -> list[_Seen]:
        return [call for call in self._seen if block.start < call.time < block.end]

    def _after(self) -> list[_Seen]:
        return [call for call in self._seen if call.time > self._blocks[-1].end]

    def _isotropic(self, points: Sequence[_Point]) -> bool:
        """Whether all layers and blocks are like the first, with global attention.

        What comes after the blocks may pool with one query.
        """
        shape = points[0].shape
        tokens = max(shape[:2])
        if {point.shape for point in points} != {shape} or len(shape) != 3 or tokens == 1:
            return False

        def calls(block: Run) -> list[tuple[str, int, tuple[int, ...]]]:
            found = self._within(block)
            return [(c.path.removeprefix(block.path), c.call, c.shape) for c in found]

        first, after = calls(self._blocks[0]), self._after()
        return (
            all(calls(block) == first for block in self._blocks)
            and len(first) * len(self._blocks) + len(after) == len(self._seen)
            and all(shape[-2:] == (tokens, tokens) for *_, shape in first)
            and all(call.shape[-2] == 1 and call.shape[-1] <= tokens for call in after)
        )

    def _pooling(self, layout: Layout) -> tuple[Site, ...]:
        """The attention of one query with which the model pools its tokens."""
        return tuple(
            Site(
                path=call.path,
                call=call.call,
                heads=math.prod(call.shape[:-2]),
                queries=1,
                keys=call.shape[-1],
                key_prefix=max(0, call.shape[-1] - layout.patches),
                no_distance="its only query is no patch",
            )
            for call in self._after()
        )

    def _in_every_block(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        first = self._blocks[0].path
        return tuple(
            replace(site, path=block.path + site.path.removeprefix(first))
            for block in self._blocks
            for site in sites
        )

    def _experiment(
        self, points: Sequence[_Point], *, only_first: bool, draws: int = Ramps.draws
    ) -> tuple[dict[_Point, Layout], tuple[Site, ...]]:
        ramps = self._ramps(draws, only_first=only_first)
        layouts: dict[_Point, Layout] = {}
        unlike: dict[_Point, tuple[int, ...]] = {}

        def look(point: _Point, value: object) -> None:
            for tensor in tensors(value):
                if tensor.numel() == math.prod(point.shape) * ramps.count and tensor.ndim >= 3:
                    layouts[point] = located_layout(tensor, point.shape, ramps, self._input_size)
                    if layouts[point].read(tensor) is None:
                        unlike[point] = tuple(tensor.shape)
                    return

        locating = Locating(self._module, ramps, self._input_size)
        with ExitStack() as stack:
            stack.enter_context(locating)
            for point in points:
                stack.callback(_hook(self._module, point, look).remove)
            if only_first:
                stack.callback(self._stop_early().remove)
            images = ramps.images(self._input_size).to(noise(self._module, 0, self._input_size))
            run_once(self._module, images)
        for point, shape in unlike.items():
            raise CaptureError(
                f"'{point.path}' of this {type(self._module).__name__} handles {point.shape} for "
                f"one image and {shape} for {ramps.count}, so which tokens are whose is not known."
            )
        if locating.doubtful and ramps.draws == Ramps.draws:
            return self._experiment(points, only_first=only_first, draws=4 * draws)
        sites = locating.sites()
        for point in points:
            layouts.setdefault(point, shape_layouts(point.shape, self._input_size)[0])
        return self._completed(layouts, layouts[points[0]].prefix_tokens, sites), sites

    def _completed(
        self, layouts: dict[_Point, Layout], prefix: int, sites: Sequence[Site]
    ) -> dict[_Point, Layout]:
        """The layouts, with what is known elsewhere of those that were not located.

        Blocks add to their tokens and leave them where they are, so that layers of one shape have
        one layout, and attention reads its tokens where the layer has them.
        """
        known = {point.shape: layout for point, layout in layouts.items() if layout.grid}
        for point, layout in layouts.items():
            if layout.grid is not None or layout.form != "tokens":
                continue
            if prefix < layout.patches and layout.folded == 1:
                layout = replace(layout, prefix_tokens=prefix, patches=layout.patches - prefix)
            read = (layout_of_site(site, layout, self._input_size) for site in sites)
            seen = next((found for found in read if found is not None), None)
            layouts[point] = known.get(point.shape) or seen or layout
        return layouts

    def _stop_early(self) -> RemovableHandle:
        """End the pass after the last attention of the first block, or as it is entered."""
        calls = self._within(self._blocks[0])
        if calls:
            return self._module.get_submodule(calls[-1].path).register_forward_hook(_stop)
        return self._module.get_submodule(self._blocks[0].path).register_forward_pre_hook(_stop)

    def _ramps(self, draws: int, *, only_first: bool) -> Ramps:
        """So many draws, or as many as memory allows."""
        end = self._blocks[0].end if only_first else math.inf
        runs = (run for run in self._trace.runs if run.end < end and run.shape)
        largest = max(math.prod(run.shape or ()) for run in runs)
        return Ramps(max(1, min(draws, (MOST_NUMBERS // largest - 1) // 3)))


def _hook(
    module: nn.Module, point: _Point, look: Callable[[_Point, object], None]
) -> RemovableHandle:
    at = module.get_submodule(point.path)
    if point.side == "reads":
        return at.register_forward_pre_hook(
            lambda _, args, named: look(point, (args, named)), with_kwargs=True
        )
    return at.register_forward_hook(lambda _, args, result: look(point, result))


def _stop(*_: object) -> None:
    raise SeenEnoughError


def _has_class_token(module: nn.Module) -> bool:
    """Whether a module has a token of that name, or no registers to be its prefix tokens."""
    names = {
        name
        for owner in module.modules()
        for name in (*dict(owner.named_parameters(recurse=False)), *vars(owner))
        if isinstance(getattr(owner, name, None), Tensor)
    }
    if any("cls" in name or "class" in name for name in names):
        return True
    return not any("reg" in name for name in names)


def _why_none(module: nn.Module, softmaxes: int) -> str:
    if softmaxes:
        return f"none of the softmaxes that it computes ({softmaxes}) follows its images"
    kinds = {type(part).__name__ for part in module.modules()}
    attention = next((kind for kind in sorted(kinds) if _ATTENTION.search(kind)), None)
    if attention is not None:
        return f"its attention ({attention}) is computed without a softmax"
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    # A patch embedding is one whose windows do not overlap.
    if any(max(part.kernel_size) > max(part.stride) for part in convolutions):
        return "it is convolutional and computes no softmax attention"
    return "it mixes its tokens without a softmax"


_ATTENTION: Final = re.compile(r"att(ention|n)|mla", re.IGNORECASE)
