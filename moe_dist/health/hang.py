"""A run that no longer moves ends by itself, and leaves behind where every rank was stuck."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GRACE = 5.0  # seconds in which all ranks write their stacks, before the end of one cuts off the others


class HangWatch:
    """Context manager around a training loop: `beat` after every step, evaluation and checkpoint.

    Where none comes for `seconds` (0: for ever), the stacks of all threads are added to FOLDER/rank-RANK.txt, by a
    thread of C, which needs no interpreter lock; then `tell` is called and the process ends with status 1, so that a
    scheduler starts the run again. Every rank watches itself; all wait for one that hangs, so all write their stacks.
    tell: for rank 0, to say in the run folder why the run has ended, with one sentence.
    Raises OSError where FOLDER cannot be written.
    """

    def __init__(self, folder: Path, rank: int, seconds: float, tell: Callable[[str], None]) -> None:
        self.folder, self.rank, self.seconds, self.tell = folder, rank, seconds, tell
        self._closed = threading.Event()
        if seconds:  # here, not when it is needed: the disk may be what hangs then
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank-{rank}.txt").open("a")

    def __enter__(self) -> HangWatch:
        if self.seconds:
            self.beat()
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        return self

    def beat(self) -> None:
        """Something was finished: start counting anew."""
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
        # Rank 0 ends first: the end of another would make it raise, and tell of that instead.
        grace = GRACE if self.rank == 0 else 2 * GRACE
        while (left := self._deadline + grace - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        sentence = f"nothing was finished for {self.seconds:g} seconds (health.hang_seconds): stacks in {self.folder}"
        if self.rank == 0:
            self.tell(sentence)
        print(f"error: rank {self.rank}: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)
