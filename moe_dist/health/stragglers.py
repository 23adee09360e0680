"""Detection of slow ranks.

All ranks wait for the slowest in every step, so only the time of their own work is compared. A rank's own seconds in a
step are the step's seconds minus the seconds spent waiting inside collectives. Only the host's waiting time is
measured. With gloo, the host waits in collectives. On GPUs, it does not wait, so all ranks look equally fast and no
slow rank is reported.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from moe_dist.config.recipe import HealthConfig
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.discovery import host_name


class Stragglers:
    """Context manager that reports slow ranks. Every rank must enter it around each training step.

    Every `straggler_every` steps, the ranks exchange their median step times (collective). If the slowest rank's median
    is at least `straggler_factor` times the median over the other ranks, rank 0 prints a report and appends it to
    RUN/stragglers.jsonl.
    """

    def __init__(self, settings: HealthConfig, folder: RunFolder, *, rank: int, step: int = 0) -> None:
        self.settings, self.folder, self.rank, self.step = settings, folder, rank, step
        self.own: list[float] = []

    def __enter__(self) -> Stragglers:
        self._waited, wait, thread = 0.0, dist.Work.wait, threading.get_ident()

        def timed(work: dist.Work, *arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(work, *arguments, **named)
            finally:
                if threading.get_ident() == thread:  # exclude the thread that writes checkpoints
                    self._waited += time.perf_counter() - started

        # Every collective ends in Work.wait, including DeepSpeed's, so patching it measures every wait.
        self._wait, dist.Work.wait = wait, timed  # type: ignore[method-assign, assignment]
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        dist.Work.wait = self._wait  # type: ignore[method-assign]
        self.own.append(time.perf_counter() - self._started - self._waited)
        self.step += 1
        if kind is None and len(self.own) >= self.settings.straggler_every:
            self._report()

    def _report(self) -> None:
        everyone = gather_objects((statistics.median(self.own), host_name()))
        steps, self.own = len(self.own), []
        slow = find(everyone, self.settings.straggler_factor)
        if slow is None or self.rank:
            return
        line = {"step": self.step, "steps": steps, **slow}
        with suppress(OSError), (self.folder.path / "stragglers.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"straggler: rank {slow['rank']} on {slow['host']} works {slow['own_seconds']:.3f} s per step, the others "
            f"{slow['others_seconds']:.3f} s (median of {steps} steps up to {self.step})",
            flush=True,
        )


def find(everyone: list[tuple[float, str]], factor: float) -> dict[str, Any] | None:
    """Return the fields to report about the slowest rank, or None if that rank is not slow.

    The rank is slow if its own seconds are at least `factor` times the median over the other ranks.
    everyone: (own seconds, host) of each rank.
    """
    if len(everyone) < 2:
        return None
    rank = max(range(len(everyone)), key=lambda rank: everyone[rank][0])
    others = statistics.median(seconds for other, (seconds, _) in enumerate(everyone) if other != rank)
    seconds, host = everyone[rank]
    if seconds < factor * others:
        return None
    return {"rank": rank, "host": host, "own_seconds": seconds, "others_seconds": others}
