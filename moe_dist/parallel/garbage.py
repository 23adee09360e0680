"""Garbage collection at the same step on every rank.

Python collects automatically once enough objects have been allocated, which happens at a different moment on each rank.
All other ranks then wait for the collecting rank in the next collective. In a large job some rank is nearly always
collecting. torchtitan aligns the collections, too.
"""

from __future__ import annotations

import gc

EVERY = 50  # steps between two collections of the young generations, which take milliseconds
FULL = 1000  # steps between two collections of all generations: cycles can outlive a collection of the young ones


class AlignedCollection:
    """Context manager around a training loop that turns off automatic collection. Call `after` after every step."""

    def __enter__(self) -> AlignedCollection:
        self._automatic = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def after(self, step: int) -> None:
        """Collect garbage if it is due after this step, which all ranks have finished. step: its number in the run."""
        if step % FULL == 0:
            gc.collect()
        elif step % EVERY == 0:
            gc.collect(1)

    def __exit__(self, *_: object) -> None:
        if self._automatic:
            gc.enable()
