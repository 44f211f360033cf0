"""One forward pass of a model, as it is seen from outside: which module ran when, on what.

What a survey of a foreign model goes by. A tensor is recognised by the memory that it lies in, so
that reshaping it hides nothing, and by how often it was written to, so that a block that adds to
its input in place is told from one that leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import CaptureError

Key = tuple[int, int, int]
"""A tensor's memory, version and size."""


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings (a ModelOutput is one), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


@dataclass
class Run:
    """One run of one module.

    start, end: when, on a clock that ticks with every event.
    keys: of the tensors that it read, before it ran.
    shape: of the first tensor that it returned; None where it returned none.
    read, returned: the tensors themselves, for modules that have children and for norms. What a
        module only passes on, it does not return.
    """

    path: str
    start: int
    end: int = -1
    keys: list[Key] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    read: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)


class Trace:
    """Watches a module while it is entered; `runs` has every run of every module in order.

    clock: counts events; whoever sees others (attention) may tick it too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.runs: list[Run] = []
        self.clock = 0
        self._hooks = ExitStack()

    def tick(self) -> int:
        """The time, which is never the same again."""
        self.clock += 1
        return self.clock

    def within(self, run: Run) -> list[Run]:
        """The runs that began and ended during another, in order."""
        return [other for other in self.runs if run.start < other.start and other.end < run.end]

    def __enter__(self) -> Trace:
        running: list[Run] = []
        for path, module in self.module.named_modules():
            composite = any(True for _ in module.children())
            keep = composite or "norm" in type(module).__name__.lower()

            def enter(_: nn.Module, args: Any, named: Any, path: str = path) -> None:
                run = Run(path, self.tick(), keys=[key(t) for t in tensors((args, named))])
                self.runs.append(run)
                running.append(run)

            def leave(_: nn.Module, args: Any, named: Any, result: Any, keep: bool = keep) -> None:
                run = running.pop()
                run.end = self.tick()
                run.shape = next((tuple(tensor.shape) for tensor in tensors(result)), None)
                if keep:
                    # Kept until all is over, since memory that is freed is used again.
                    run.read = list(tensors((args, named)))
                    passed = {id(tensor) for tensor in run.read}
                    run.returned = [t for t in tensors(result) if id(t) not in passed]

            self._hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()


def key(tensor: Tensor) -> Key:
    """What tells a tensor from others that are alive at the same time."""
    return tensor.data_ptr(), tensor._version, tensor.numel()


def run_once(module: nn.Module, images: Tensor) -> None:
    """Run a module without gradients, compiled parts eagerly.

    Raises CaptureError, with the module's own words, where it does not run on such images.
    """
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            module(images)
    except SeenEnoughError:
        pass
    except Exception as error:  # whatever a foreign module raises, the user learns on which input
        size = "x".join(map(str, images.shape[1:]))
        tower = next((name for name in _TOWERS if hasattr(module, name)), None)
        hint = f"; if it needs more than an image, wrap its .{tower} instead" if tower else ""
        raise CaptureError(
            f"This {type(module).__name__} does not run on an input of {size} (channels x height x "
            f"width): {(str(error).strip() or type(error).__name__).splitlines()[0]}{hint}"
        ) from error


_TOWERS = ("vision_model", "visual", "vision_tower", "vision_encoder")


class SeenEnoughError(Exception):
    """Ends a forward pass once what is wanted has run."""


def noise(module: nn.Module, count: int, input_size: tuple[int, int, int]) -> Tensor:
    """Random images of a module's own device and floating-point type, always the same."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *input_size, generator=generator)
    return images.to(dtype=like.dtype, device=like.device)
