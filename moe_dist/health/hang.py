"""Hang detection: if a run stops making progress, every rank writes its stacks to a file and exits."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GRACE = 5.0  # seconds for all ranks to write their stacks, before the first exit makes the launcher kill the others


class HangWatch:
    """Context manager around a training loop. It ends the run if the loop hangs.

    The loop must call `beat` after each step, evaluation and save. If `beat` is not called for `seconds` (0 disables
    the check), the stacks of all threads are appended to FOLDER/rank-RANK.txt. A C thread writes the stacks, so it does
    not matter if another thread holds the interpreter lock. The process then exits with status 1, which makes a
    scheduler start the run again. Each rank has its own watch. If one rank hangs, the other ranks wait for it, so all
    ranks write their stacks.
    tell: called on rank 0 before the exit, with one sentence that says why the run ended.
    Raises OSError if FOLDER cannot be written.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, tell: Callable[[str], None]) -> None:
        self.folder, self.rank, self.seconds, self.tell = folder, rank, seconds, tell
        self._closed = threading.Event()
        if seconds:  # open the file now: later the disk may be what hangs
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank-{rank}.txt").open("a")

    def __enter__(self) -> HangWatch:
        if self.seconds:
            self.beat()
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        return self

    def beat(self) -> None:
        """Restart the timeout, because the loop has made progress."""
        if self.seconds:
            self._deadline = time.monotonic() + self.seconds
            faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def __exit__(self, *_: object) -> None:
        if not self.seconds:
            return
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._file.close()
        with suppress(OSError):
            if not os.path.getsize(self._file.name):
                os.unlink(self._file.name)

    def _watch(self) -> None:
        # Rank 0 must exit first. If another rank exits first, rank 0's collective raises, and that error is recorded
        # instead of the hang.
        grace = GRACE if self.rank == 0 else 2 * GRACE
        while (left := self._deadline + grace - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        sentence = f"no progress for {self.seconds:g} seconds (health.hang_seconds); the stacks are in {self.folder}"
        if self.rank == 0:
            self.tell(sentence)
        print(f"error: rank {self.rank}: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)
