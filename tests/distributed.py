"""Runs a function on real gloo ranks. A pool of processes lives as long as pytest, since imports cost seconds."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d

_POOLS: dict[int, Pool] = {}
_TIMEOUT = 300.0  # seconds a rank may take before the pool is declared hung
# A gloo group keeps three threads, one of which polls: after some hundred groups everything crawls. A call's groups go
# with it, but for those that a DeepSpeed engine holds: they are never freed.
_MAX_THREADS = 300


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call the module-level `function(rank, *args)` on `world` ranks; results by rank.

    torch.distributed is initialised on each, the default group being exactly these ranks. If any rank raises, so does
    this, with every failing rank's traceback; the pool is then thrown away: its ranks may be waiting for each other.
    """
    pool = _POOLS.get(world) or _POOLS.setdefault(world, Pool(world))
    try:
        results = pool.run(function, args)
    except BaseException:
        _POOLS.pop(world).close()
        raise
    if pool.threads > _MAX_THREADS:
        _POOLS.pop(world).close()
    return results


class Pool:
    """`world` spawned processes, each with a pipe."""

    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes, self.threads = [], [], 0
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            # After one rank has failed the others may hang in a collective: give them a moment only.
            if not pipe.poll(_TIMEOUT if not failures else 2.0):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                ok, value, threads = pipe.recv()
            except EOFError:
                ok, value, threads = False, "the process died", 0
            self.threads = max(self.threads, threads)
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        _forget_groups()
        try:
            answer = True, function(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send((*answer, len(os.listdir("/proc/self/task"))))


def _forget_groups() -> None:
    """Destroy the process groups of the call before, which every rank has left by now."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # DeepSpeed keeps its own copy of the default group


@atexit.register
def _close_pools() -> None:
    for pool in _POOLS.values():
        pool.close()
