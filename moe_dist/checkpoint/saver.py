"""Saving a run's checkpoints, either synchronously or in a background thread during training (checkpoint.asynchronous).

An asynchronous save copies this rank's fragments into host memory. Training waits only for this copy. A thread then
plans, hashes, writes, fsyncs and commits the checkpoint, as a synchronous save does. The thread uses its own gloo
process group, so its collectives never interleave with those of training, whatever backend training uses.

A thread is enough, because hashing, writing and fsync take nearly all of its time and release Python's global lock. A
process would need its own interpreter with torch (several hundred MiB per rank) and could not use its parent's
page-locked buffers. It could also outlive a killed rank and continue writing. The thread ends when its rank is killed.
An interrupted save leaves only a .tmp folder, which is never read.
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
    """The writer of a run's checkpoints. It writes one checkpoint at a time and prunes old ones.

    All methods are collective. Use `with saver:` around training. At the end of the block, the saver waits for the last
    write, even if an exception is propagating.
    """

    def __init__(self, run_dir: str | Path, engine: ShardedModel, layout: Layout, settings: CheckpointConfig) -> None:
        self.run_dir, self.engine, self.layout, self.settings = Path(run_dir), engine, layout, settings
        self.buffers = HostBuffers(pinned=layout.device.type == "cuda")
        self._group = dist.new_group(backend="gloo")
        self._writing: Future[None] | None = None
        self._stalls: list[float] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save a checkpoint of the current step. Collective: every rank calls it between two optimizer steps.

        Raises UserError on every rank if this checkpoint or the previous asynchronous one cannot be written.
        """
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
        """Wait until the last write has finished. If the write failed, raise the same error on every rank."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def metrics(self) -> dict[str, float]:
        """Return the metric checkpoint_stall_seconds: how long training has waited for saves since the last call.

        If there were no saves, the result is empty.
        """
        stalls, self._stalls = self._stalls, []
        return {"checkpoint_stall_seconds": sum(stalls)} if stalls else {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
            dist.destroy_process_group(self._group)
        elif self._writing is not None:
            # Let the pending write finish (one more checkpoint to resume from). Ignore its error: another is already
            # propagating.
            wait([self._writing])

    def _write(self, path: Path, held: list[Fragment], header: dict[str, Any]) -> None:
        self.engine.frozen_store = write(path, held, header, self.layout, self._group, store=self.engine.frozen_store)
        if self.layout.is_main:
            prune(self.run_dir, self.settings.keep, self.settings.keep_every)


class HostBuffers:
    """Host memory that holds a snapshot of this rank's fragments. Every save reuses it.

    pinned: allocate page-locked memory, which makes copies from a GPU fast.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._of: dict[torch.dtype, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """The size of the snapshot in bytes.

        Each trained parameter in this rank's ZeRO partition takes 4 bytes, and 4 more for each of the parameter's
        moments (12 in all with Adam). The size of the model's buffers is added.
        """
        return sum(buffer.nbytes for buffer in self._of.values())

    def copy(self, held: Sequence[Fragment]) -> list[Fragment]:
        """Copy the current values of fragments over the previous snapshot. Return the fragments of the snapshot.

        Frozen parameters are not copied: their fragments are returned as they are. Raises UserError if there is not
        enough memory.
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
        if dtype not in self._of or self._of[dtype].numel() != numel:  # grows once: the first step creates the moments
            self._of.pop(dtype, None)
            try:
                self._of[dtype] = empty_pinned(numel, dtype) if self.pinned else torch.empty(numel, dtype=dtype)
            except RuntimeError as error:
                gib = numel * dtype.itemsize / 2**30
                raise UserError(
                    f"no memory for a snapshot of {gib:.1f} GiB per rank (checkpoint.asynchronous=false needs none)"
                ) from error
        return self._of[dtype]


def _size(fragment: Fragment) -> int:
    """Return the number of elements to copy.

    For a frozen parameter, this is 0, because training does not change its values.
    """
    return 0 if kind_of(fragment.name) == FROZEN else fragment.tensor.numel()


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a daemon thread. A rank that must exit does not wait for such a thread."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint-writer", daemon=True).start()
    return future
