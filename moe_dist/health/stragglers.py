"""Which rank do the others wait for? A step takes all ranks equally long: what differs is the time spent in own work.

Own seconds of a step are its seconds without those in which the rank waited inside collectives. They are measured where
the host waits (gloo); on GPUs the stream waits instead, all ranks look alike, and nothing is reported.
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
    """Context manager around each step, on every rank. Every `straggler_every` steps rank 0 tells of the slowest rank,
    if it takes `straggler_factor` times as long as the others do at the median: in its output, and as a line of
    RUN/stragglers.jsonl. That exchange is collective.
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
                if threading.get_ident() == thread:  # not the writer of a checkpoint
                    self._waited += time.perf_counter() - started

        # All collectives end here, DeepSpeed's as well, so it is the one place that knows of every wait.
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
            f"straggler: rank {slow['rank']} on {slow['host']} works {slow['own_seconds']:.3f} s in a step, the others "
            f"{slow['others_seconds']:.3f} s (median of {steps} steps up to {self.step})",
            flush=True,
        )


def find(everyone: list[tuple[float, str]], factor: float) -> dict[str, Any] | None:
    """The slowest of (own seconds, host) by rank, if it is `factor` times as slow as the others at the median."""
    if len(everyone) < 2:
        return None
    rank = max(range(len(everyone)), key=lambda rank: everyone[rank][0])
    others = statistics.median(seconds for other, (seconds, _) in enumerate(everyone) if other != rank)
    seconds, host = everyone[rank]
    if seconds < factor * others:
        return None
    return {"rank": rank, "host": host, "own_seconds": seconds, "others_seconds": others}
