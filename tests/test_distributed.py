"""Processes that hand one another objects, and the errors of one that end all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch.distributed as dist
from processes_for_tests import together as in_processes

from vitprobe.distributed import ALONE, team, together
from vitprobe.errors import DataError, ElsewhereError


def test_one_process_is_a_team_of_its_own():
    with team() as alone:
        assert alone is ALONE
        merged: list[Any] = []
        alone.to_leader(1, merged.append)
        assert (alone.exchange(3), alone.from_leader(lambda: 5), merged) == ([3], 5, [])
        assert alone.leads


def _share() -> dict[str, Any]:
    """What each of two processes sees of the other."""
    seen: dict[str, Any] = {}
    with team() as alone:
        seen["uninvited"] = alone.size
    with together() as processes, team() as same:
        assert same is processes
        rank = processes.rank
        seen["exchanged"] = processes.exchange(10 * rank)
        seen["merged"] = []
        processes.to_leader(f"of {rank}", seen["merged"].append)
        seen["given"] = processes.from_leader(lambda: f"from {rank}")
        seen["unpackable"] = _failing([], make=lambda: lambda: None)
        seen["inside"] = _failing([1])
        seen["exchanged again"] = processes.exchange(rank)
    seen["errors"] = [_failing([0]), _failing([1]), _failing([0, 1]), _failing([1], defect=True)]
    seen["group"] = dist.get_world_size()
    return seen


def _failing(ranks: list[int], defect: bool = False, make: Any = int) -> tuple[str, str]:
    """What a process raises where some of them fail between two exchanges."""
    try:
        with together(), team() as processes:
            processes.exchange(None)
            if processes.rank in ranks:
                error = KeyError if defect else DataError
                raise error(f"no images in process {processes.rank}")
            processes.from_leader(make)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_two_processes(tmp_path):
    first, second = in_processes(_share, tmp_path)
    for seen in (first, second):
        assert seen["uninvited"] == 1
        assert seen["exchanged"] == [0, 10]
        assert seen["given"] == "from 0"
        assert seen["exchanged again"] == [0, 1]
        assert "pickle" in seen["unpackable"][1]
        assert seen["group"] == 2
    assert (first["merged"], second["merged"]) == (["of 1"], [])
    zero, one = "no images in process 0", "no images in process 1"
    mine, other = DataError.__name__, ElsewhereError.__name__
    assert (first["inside"], second["inside"]) == ((other, one), (mine, one))
    assert first["errors"][:3] == [(mine, zero), (other, one), (mine, zero)]
    assert second["errors"][:3] == [(other, zero), (mine, one), (other, zero)]
    assert first["errors"][3] == (other, f"KeyError: '{one}'")
    assert second["errors"][3] == ("KeyError", f"'{one}'")


LOST = """
import os, signal
from vitprobe.distributed import together
from vitprobe.errors import VitprobeError
try:
    with together() as processes:
        processes.exchange(None)
        if processes.rank == 1:
            os._exit(7)
        processes.exchange(None)
except VitprobeError as error:
    print(error)
"""


def test_a_process_that_is_killed_is_not_waited_for():
    start = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", LOST]
    with subprocess.Popen(command, env=shared | {"RANK": "1"}) as killed:
        left = subprocess.run(
            command, env=shared | {"RANK": "0"}, capture_output=True, text=True, timeout=100
        )
    assert killed.returncode == 7
    assert left.stdout.strip() == "Another process of this run ended; its message says why."
    assert time.monotonic() - start < 90
