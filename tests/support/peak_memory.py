"""The peak of this process's resident memory during a call, and the memory that a rank's model and optimizer need."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from moe_dist.checkpoint.fragments import MASTER, fragments, kind_of
from moe_dist.training.engine import Engine

Result = TypeVar("Result")


def resident(key: str) -> int:
    """Return VmRSS (resident now) or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak_during(function: Callable[[], Result]) -> tuple[int, Result]:
    """Call a function. Return by how many bytes the resident memory rose at most, and the function's result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    result = function()
    return resident("VmHWM") - before, result


@dataclass(frozen=True)
class Needed:
    """Bytes that a rank needs: its share of the parameters, its largest tensor, and what the optimizer needs."""

    share: int
    largest: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.share + self.largest + self.optimizer

    @classmethod
    def by(cls, engine: Engine) -> Needed:
        """Count what an engine with Adam holds.

        The largest tensor counts in float32, in which it is drawn and read; of experts, the rows of this rank. For each
        element of the rank's partition, the optimizer needs a master, two moments and a gradient, all in float32.
        """
        parameters = list(engine.module.parameters())
        share = sum(_bytes(getattr(p, "ds_tensor", p)) for p in parameters)
        largest = max(getattr(p, "ds_numel", p.numel()) for p in parameters) * torch.float32.itemsize
        masters = sum(_bytes(f.tensor) for f in fragments(engine) if kind_of(f.name) == MASTER)
        return cls(share, largest, 4 * masters)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
