"""Saves a run: at once, or from a background thread while training goes on (checkpoint.asynchronous).

An asynchronous save copies what this rank holds into host memory, which is all that training waits for; a thread then
plans, hashes, writes, fsyncs and commits as a synchronous save does, in a gloo process group of its own: its
collectives never get between those of training, whatever backend that uses.

Why a thread and not a process: hashing, writing and fsync, nearly all of its time, release Python's lock, and with few
cores a process would compete for them just the same. A process would need an interpreter with torch (several hundred
MiB a rank), could take no page-locked buffers from its parent, and could outlive a killed rank and go on writing. The
thread ends with its rank, and the next run finds what any kill leaves: a .tmp folder that is never read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.checkpoint import describe, write
from moe_dist.checkpoint.fragments import FROZEN, fragments, kind_of
from moe_dist.checkpoint.manifest import checkpoint_path, prune
from moe_dist.checkpoint.pinned import empty_pinned
from moe_dist.checkpoint.storage import Fragment
from moe_dist.config.recipe import CheckpointConfig
from moe_dist.core.errors import UserError
from moe_dist.core.step import ShardedModel
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout


class Saver:
    """Writes a run's checkpoints one after another and prunes the old ones. All methods are collective.

    Used as `with saver:` around training: its end waits for the last write, also after an error, which goes on then.
    """

    def __init__(self, run_dir: str | Path, engine: ShardedModel, layout: Layout, settings: CheckpointConfig) -> None:
        self.run_dir, self.engine, self.layout, self.settings = Path(run_dir), engine, layout, settings
        self.buffers = HostBuffers(pinned=layout.device.type == "cuda")
        self._group = dist.new_group(backend="gloo")
        self._writing: Future[None] | None = None
        self._stalls: list[float] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save this moment, between two optimizer steps. Raises UserError on every rank where the disk refuses this
        checkpoint or, if the save is asynchronous, the one before."""
        started = time.perf_counter()
        self.wait()
        path, header = checkpoint_path(self.run_dir, step), describe(self.engine, self.layout, state)
        held = fragments(self.engine)
        if self.settings.asynchronous:
            with raise_on_all_ranks():
                held = self.buffers.copy(held)
            self._writing = _in_background(partial(self._write, path, held, header))
        else:
            self._write(path, held, header)
        self._stalls.append(time.perf_counter() - started)

    def wait(self) -> None:
        """Return when nothing is being written any more; raises the error of the last write, the same on every rank."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def metrics(self) -> dict[str, float]:
        """How long training stood still for the saves since the last call; nothing if there were none."""
        stalls, self._stalls = self._stalls, []
        return {"checkpoint_stall_seconds": sum(stalls)} if stalls else {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
            dist.destroy_process_group(self._group)
        elif self._writing is not None:
            wait([self._writing])  # a whole checkpoint more to go on from; of its own error nobody needs to hear now

    def _write(self, path: Path, held: list[Fragment], header: dict[str, Any]) -> None:
        write(path, held, header, self.layout, self._group)
        if self.layout.is_main:
            prune(self.run_dir, self.settings.keep, self.settings.keep_every)


class HostBuffers:
    """Host memory for one snapshot of a rank, kept from save to save. pinned: page-locked, for copies from a GPU."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._of: dict[torch.dtype, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """4 bytes for every trained parameter of this rank's ZeRO partition and each of its moments (Adam: 12 in all),
        and the model's buffers."""
        return sum(buffer.nbytes for buffer in self._of.values())

    def copy(self, held: Sequence[Fragment]) -> list[Fragment]:
        """The fragments with their values of now, whatever becomes of the live ones; frozen parameters stay live ones.

        Overwrites the snapshot before. Raises UserError where there is not enough memory.
        """
        sizes = Counter[torch.dtype]()
        for fragment in held:
            sizes[fragment.tensor.dtype] += _size(fragment)
        rest = {dtype: self._buffer(dtype, size) for dtype, size in sizes.items()}
        copies = []
        for fragment in held:
            size, free = _size(fragment), rest[fragment.tensor.dtype]
            if size:
                rest[fragment.tensor.dtype] = free[size:]
                fragment = replace(fragment, tensor=free[:size].copy_(fragment.tensor, non_blocking=True))
            copies.append(fragment)
        if self.pinned:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, dtype: torch.dtype, numel: int) -> Tensor:
        if dtype not in self._of or self._of[dtype].numel() != numel:  # the moments come with the first step
            self._of.pop(dtype, None)
            try:
                self._of[dtype] = empty_pinned(numel, dtype) if self.pinned else torch.empty(numel, dtype=dtype)
            except RuntimeError as error:
                gib = numel * dtype.itemsize / 2**30
                raise UserError(
                    f"no memory for a snapshot of {gib:.1f} GiB a rank (checkpoint.asynchronous=false needs none)"
                ) from error
        return self._of[dtype]


def _size(fragment: Fragment) -> int:
    """Elements to copy: frozen parameters stay as they are, whatever training does."""
    return 0 if kind_of(fragment.name) == FROZEN else fragment.tensor.numel()


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Run it in a daemon thread: a rank that must end does not wait for it."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint-writer", daemon=True).start()
    return future
