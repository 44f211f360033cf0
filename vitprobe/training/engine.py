"""How updates are computed on this machine: precision, compilation, processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded_states
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vitprobe import distributed
from vitprobe.devices import slow_bf16
from vitprobe.errors import RecipeError
from vitprobe.training.graphs import Pass, Replayed, tried
from vitprobe.training.methods import Batch, Method
from vitprobe.training.recipe import Recipe

# On the CPU torch's fused attention loses to its plain products on few patches: by 15 % at 49 of
# them and 16 channels a head, where it gains as much at 196.
_FEW_PATCHES = 64


@dataclass(frozen=True)
class Execution:
    """What a recipe's "auto" became; runs that differ in it agree to rounding, not to the bit."""

    device: str
    precision: str
    compile: str
    processes: int
    sharded: bool
    torch: str
    threads: int

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What differs from the execution of a saved state, one phrase each."""
        return [
            f"{name} was {saved.get(name)}, now {value}"
            for name, value in asdict(self).items()
            if saved.get(name) != value
        ]


class Engine:
    """Forward and backward passes of a method, as the recipe and the machine ask for them.

    method: on its device, in training mode.
    sharded: split weights and optimiser over the processes (FSDP2), for models that do not fit one.

    Raises RecipeError where a sharded run has no processes to share between, and for graphs on
    another device than CUDA or in several processes.
    """

    def __init__(
        self, method: Method, recipe: Recipe, device: torch.device, *, sharded: bool = False
    ) -> None:
        self.method = method
        self.notes: list[str] = []
        self._device = device
        self._accumulate = recipe.accumulate
        on_gpu = device.type == "cuda"
        precision, compiling = recipe.precision, recipe.compile
        if precision == "auto":
            precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
        if precision == "bf16" and (reason := slow_bf16(device)):
            self.notes.append(reason)
        if compiling == "auto":
            compiling = "blocks" if on_gpu else "off"
        processes = distributed.world_size()
        if compiling == "graphs":
            if not on_gpu:
                raise RecipeError(
                    f'compile = "graphs" needs CUDA, but this is {device.type}; use "auto".'
                )
            if processes > 1:
                raise RecipeError(
                    'compile = "graphs" is for one process: gradients are exchanged outside of '
                    'what a graph records. Use "blocks".'
                )
        if device.type == "cpu" and recipe.encoder.grid**2 <= _FEW_PATCHES:
            for module in method.modules():
                if isinstance(module, Attention):
                    # timm marks it final for TorchScript's sake; nothing here is scripted.
                    module.fused_attn = False  # type: ignore[misc]
        if recipe.recompute:
            for block in _unheard_blocks(method):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compiling != "off":
            reason = _compile(_unheard_blocks(method), device)
            if reason:
                without = "it and CUDA graphs" if compiling == "graphs" else "it"
                self.notes.append(f"torch.compile failed ({reason}); running without {without}")
                compiling = "off"
        if sharded and processes == 1:
            raise RecipeError("Sharding needs several processes; start them with torchrun.")
        self.execution = Execution(
            device.type,
            precision,
            compiling,
            processes,
            sharded,
            str(torch.__version__),
            torch.get_num_threads() if device.type == "cpu" else 0,
        )
        self._module: nn.Module = method
        if sharded:
            for module in method.modules():
                if isinstance(module, Block):
                    fully_shard(module)
            fully_shard(method)
        elif processes > 1:
            # Buffers are functions of the global batch, so every process has the same already.
            # torch renamed the option in 2.15.
            known = inspect.signature(DistributedDataParallel).parameters
            name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
            options: dict[str, Any] = {name: False}
            self._module = DistributedDataParallel(
                method, device_ids=[device.index] if on_gpu else None, **options
            )
        self._pass: Pass = self._ordinary_pass
        if compiling == "graphs":
            replayed = Replayed(method, self._ordinary_pass)
            reason = tried(method, self._ordinary_pass, replayed, recipe, device)
            if reason:
                self.notes.append(f"CUDA graphs failed their trial ({reason}); running without")
                self.execution = replace(self.execution, compile="blocks")
            else:
                self._pass = replayed

    def gradients(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Gradients of one update, from the next parts of the batch; the loss and its terms."""
        means: dict[str, Tensor] = {}
        for part in range(self._accumulate):
            batch = next(batches)
            with self._synchronised(part == self._accumulate - 1):
                terms = self._pass(batch)
            for name, value in terms.items():
                means[name] = means.get(name, 0) + value.float() / self._accumulate
        return means

    def _ordinary_pass(self, batch: Batch) -> dict[str, Tensor]:
        with self._autocast():
            loss, terms = self._module(batch)
        (loss / self._accumulate).backward()
        return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.execution.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged once an update, with its last part."""
        if isinstance(self._module, DistributedDataParallel) and not last:
            with self._module.no_sync():
                yield
            return
        if self.execution.sharded:
            self.method.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    @contextmanager
    def evaluating(self) -> Iterator[Method]:
        """The method in eval mode, without gradients and with its weights whole."""
        shards = [part for part in self.method.modules() if isinstance(part, FSDPModule)]
        for part in shards:
            part.unshard()
        self.method.eval()
        try:
            with torch.no_grad():
                yield self.method
        finally:
            self.method.train()
            for part in shards:
                part.reshard()

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The method's and the optimiser's state; under sharding whole, and on process 0 only."""
        if not self.execution.sharded:
            return {"method": self.method.state_dict(), "optimizer": optimizer.state_dict()}
        options = sharded_states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = sharded_states.get_model_state_dict(self.method, options=options)
        moments: dict[str, Any] = {}
        if optimizer.state:
            # Asked before the first update, torch would make up moments by counting a step.
            moments = dict(
                sharded_states.get_optimizer_state_dict(self.method, optimizer, options=options)
            )
        return {"method": weights, "optimizer": moments}

    def encoder_state(self) -> dict[str, Tensor]:
        """The final encoder's state dict; under sharding whole, and on process 0 only."""
        if not self.execution.sharded:
            return dict(self.method.final_encoder.state_dict())
        options = sharded_states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        prefix = next(
            f"{name}."
            for name, part in self.method.named_modules()
            if part is self.method.final_encoder
        )
        whole = sharded_states.get_model_state_dict(self.method, options=options)
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in whole.items()
            if name.startswith(prefix) and isinstance(tensor, Tensor)
        }

    def restore(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take over what `state` returned."""
        if not self.execution.sharded:
            self.method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            return
        options = sharded_states.StateDictOptions(full_state_dict=True)
        sharded_states.set_model_state_dict(self.method, state["method"], options=options)
        if state["optimizer"]:
            sharded_states.set_optimizer_state_dict(
                self.method, optimizer, state["optimizer"], options=options
            )


def _unheard_blocks(method: Method) -> list[Block]:
    """Blocks that distillation does not listen to: what it hears must not be run a second time."""
    heard = method.heard_modules()
    return [
        module
        for module in method.modules()
        if isinstance(module, Block) and not heard.intersection(module.modules())
    ]


def _compile(blocks: list[Block], device: torch.device) -> str:
    """Compile blocks in place after one has been tried; the reason where it cannot be done."""
    if not blocks:
        return "there is no block that can be compiled"
    trial = blocks[0]
    width = next(trial.parameters()).shape[0]
    try:
        count = getattr(trial.attn, "tokens", 5)  # of a block that knows its grid
        tokens = torch.randn(2, count, width, device=device, requires_grad=True)
        torch.compile(trial)(tokens).sum().backward()
    except Exception as error:
        # Whatever a compiler, its linker or its driver raises.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    finally:
        trial.zero_grad()
    for block in blocks:
        block.compile()
    return ""
