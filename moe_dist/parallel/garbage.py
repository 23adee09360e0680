"""Garbage collection at the same step on every rank.

Python collects by itself when enough objects have been made, at another moment on each rank, and every other rank then
waits for that one in the next collective: in a large job some rank is nearly always the one. torchtitan does the same.
"""

from __future__ import annotations

import gc

EVERY = 50  # steps between two collections of the young objects, which take milliseconds
FULL = 1000  # steps between two collections of all objects: cycles that were in use during a collection of the young


class AlignedCollection:
    """Context manager around a training loop: `after` every step. Inside it Python does not collect by itself."""

    def __enter__(self) -> AlignedCollection:
        self._automatic = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def after(self, step: int) -> None:
        """Collect if this step, which all ranks have finished, is due. step: its number in the run."""
        if step % FULL == 0:
            gc.collect()
        elif step % EVERY == 0:
            gc.collect(1)

    def __exit__(self, *_: object) -> None:
        if self._automatic:
            gc.enable()
