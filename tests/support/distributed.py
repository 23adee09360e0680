"""Run functions on real gloo ranks, and start ranks that may die.

Imports take seconds. A fork server imports once, and every rank is a fresh process forked from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_dist.parallel.discovery import free_port
from tests.support.long import THREADS

_POOLS: dict[int, Pool] = {}
_TIMEOUT = 300.0  # seconds a rank may take before the pool is declared hung
# Every process group of a call keeps its gloo threads, which poll; some hundred of them slow everything down.
_CALLS_PER_POOL = 20
FORK_SERVER = mp.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["moe_dist.training.run"])


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call the module-level `function(rank, *args)` on `world` ranks and return their results by rank.

    Initialises torch.distributed on each; the default group is exactly these ranks. If any rank raises, this function
    raises with the traceback of every failing rank and discards the pool, whose ranks may be waiting for each other.
    """
    pool = _POOLS.get(world) or _POOLS.setdefault(world, Pool(world))
    try:
        results = pool.run(function, args)
    except BaseException:
        _POOLS.pop(world).close()
        raise
    pool.calls += 1
    if pool.calls >= _CALLS_PER_POOL:
        _POOLS.pop(world).close()
    return results


class Pool:
    """`world` processes, each with a pipe."""

    def __init__(self, world: int) -> None:
        port = free_port()
        self.pipes, self.processes, self.calls = [], [], 0
        for rank in range(world):
            ours, theirs = FORK_SERVER.Pipe()
            process = FORK_SERVER.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            # After one rank has failed, the others may hang in a collective, so wait only a moment for them.
            if not pipe.poll(_TIMEOUT if not failures else 2.0):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
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
    gc.freeze()  # as run_rank does: DeepSpeed collects garbage for every engine, which would scan all imported objects
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@atexit.register
def _close_pools() -> None:
    for pool in _POOLS.values():
        pool.close()
