"""Run a function in several processes that train as one, over gloo."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def together(function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list:
    """What `function(*arguments)` of a test file returns in each process, in rank order."""
    file, name = function.__code__.co_filename, function.__name__
    # A new process cannot import a test file by its name, so it is given the path.
    mp.spawn(_enter, args=(count, folder, file, name, arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _enter(rank: int, count: int, folder: Path, file: str, name: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    called = runpy.run_path(file)[name]
    warnings.simplefilter("error")
    torch.save(called(*arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()
