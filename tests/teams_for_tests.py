"""Teams whose processes are threads of this one: quick enough for hypothesis."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vitprobe.distributed import Team


@dataclass(frozen=True)
class ThreadTeam(Team):
    board: list[Any] = field(default_factory=list)
    barrier: Any = None

    def exchange(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(30)
        found = list(self.board)
        self.barrier.wait(30)
        return found


def in_threads(count: int, function: Callable[[Team], Any]) -> list[Any]:
    """What `function(team)` gives each member, in rank order."""
    barrier, board = threading.Barrier(count), [None] * count

    def run(rank: int) -> Any:
        try:
            return function(ThreadTeam(rank, count, board=board, barrier=barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        members = [pool.submit(run, rank) for rank in range(count)]
    errors = [member.exception() for member in members]
    first = next((e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)), None)
    if first is not None:
        raise first
    return [member.result() for member in members]
