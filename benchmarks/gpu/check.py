"""The tools that the parts of the GPU check share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.findings import Findings


class Check:
    """A running part of the check: its device and layout (created on first use) and the writer of its findings."""

    def __init__(self, part: str, findings: Findings, device: str):
        self.part, self.findings, self.small = part, findings, device == "cpu"
        self.scratch = Path(os.environ["GPU_CHECK_SCRATCH"])

    @cached_property
    def device(self) -> torch.device:
        """Start torch.distributed as the only rank and return its device."""
        from moe_dist.parallel.discovery import free_port
        from moe_dist.training.deepspeed import init_distributed

        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
        return init_distributed()

    @cached_property
    def layout(self) -> Any:
        from moe_dist.parallel.layout import make_layout

        return make_layout(expert=1, device=self.device)

    def note(self, what: str, result: str, **numbers: Any) -> None:
        self.findings.note(self.part, what, result, **numbers)

    def attempt(self, what: str, work: Callable[[], tuple[str, dict[str, Any]]]) -> None:
        """Run `work` and record its verdict and numbers, or the first line of its error."""
        try:
            verdict, numbers = work()
        except Exception as error:
            text = str(error).splitlines()[0][:300] if str(error) else ""
            verdict, numbers = f"ERROR {type(error).__name__}: {text}", {}
        self.note(what, verdict, **numbers)

    def sync(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], repeats: int = 20, warm_up: int = 5) -> float:
        """Return the median time of work(), measured by device events, on the CPU by the clock."""
        if self.small:
            work()
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        for _ in range(warm_up):
            work()
        taken = []
        for _ in range(repeats):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last))
        return statistics.median(taken)

    def poison(self) -> None:
        """Fill the memory that the allocator hands out next with NaN, so that unwritten results are visible."""
        for size in (2**12, 2**16, 2**20, 2**24, 2**26):
            pieces = [torch.full((size // 4,), float("nan"), device=self.device) for _ in range(4)]
            del pieces

    def seen(self, key: str) -> float:
        """Return a number of an earlier finding; nan if that finding is missing."""
        return next((line[key] for line in self.findings.lines() if key in line), float("nan"))


def relative(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|, in float64."""
    wanted, got = wanted.detach().double().cpu(), got.detach().double().cpu()
    if got.shape != wanted.shape:
        return float("inf")
    size = wanted.norm()
    return float((got - wanted).norm() / size) if size else float(got.norm())


def right_if(good: bool) -> str:
    return "right" if good else "WRONG"


def short(errors: list[float]) -> list[str]:
    return [f"{error:.1e}" for error in errors]
