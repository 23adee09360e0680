"""Garbage collection at the same steps on every rank.

Python collects garbage automatically once enough objects have been allocated. This happens at a different moment on
each rank, and all other ranks then wait for the collecting rank in the next collective. In a large job, some rank would
be collecting nearly all the time. The collections are therefore aligned, as in torchtitan.
"""

from __future__ import annotations

import gc

EVERY = 50  # steps between two collections of the young generations, which take milliseconds
FULL = 1000  # steps between two collections of all generations: cycles can outlive a collection of the young ones


class AlignedCollection:
    """Context manager that aligns garbage collection between ranks during a training loop.

    It turns automatic collection off. Instead, the loop must call `after` after every step.
    """

    def __enter__(self) -> AlignedCollection:
        self._automatic = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def after(self, step: int) -> None:
        """Collect garbage if it is due after this step. step: number of the step in the run, equal on all ranks."""
        if step % FULL == 0:
            gc.collect()
        elif step % EVERY == 0:
            gc.collect(1)

    def __exit__(self, *_: object) -> None:
        if self._automatic:
            gc.enable()
