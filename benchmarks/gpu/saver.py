"""Asynchronous checkpoints of the 90M model: how long training stands still, and how fast steps are during a write."""

from __future__ import annotations

import mmap
import shutil
import statistics
import time
from pathlib import Path

import torch

from gpu.check import Check, right_if
from gpu.steps import Steps
from moe_dist.checkpoint import pinned
from moe_dist.checkpoint.fragments import reset_optimizer
from moe_dist.checkpoint.saver import Saver
from moe_dist.config.recipe import CheckpointConfig


def run(check: Check) -> None:
    check.attempt("asynchronous save of 90M 4t4i (the first pins memory)", lambda: saved(check))
    if not check.small:
        check.attempt("page-locking that CUDA refuses", lambda: refused(check))


def saved(check: Check) -> tuple[str, dict]:
    small = ["model.hidden_size=64", "model.num_layers=2", "model.num_heads=2"] if check.small else []
    small += ["data.sequence_length=64", "data.group_sequences=2"] if check.small else []
    overrides = ["parallel.expert=1", "train.global_batch_groups=1", *small]
    vocabulary = 512 if check.small else 65536
    steps = Steps.build(check, "moma_90m", overrides, vocabulary=vocabulary, on_device=True)
    reset_optimizer(steps.engine, with_moments=True)
    folder = check.scratch / "saved"
    saver = Saver(folder, steps.engine, check.layout, CheckpointConfig(asynchronous=True, keep=1))
    stall, rest, before, taken = [], [], resident(), 0
    for number in range(3):
        check.sync()
        started = time.perf_counter()
        saver.save(number, {})
        stall.append(time.perf_counter() - started)
        taken = taken or resident() - before
        saver.wait()
        rest.append(time.perf_counter() - started - stall[-1])
    quiet = step_seconds(steps, 5)
    saver.save(9, {})
    busy = step_seconds(steps, 5)
    saver.wait()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return "measured", {
        "stall_s": [round(value, 3) for value in stall],
        "write_s": [round(value, 3) for value in rest],
        "MiB": size >> 20,
        "host_MiB": saver.buffers.nbytes >> 20,
        "host_taken_MiB": taken >> 20,
        "page_locked": all(buffer.is_pinned() for buffer in saver.buffers._of.values()),
        "step_ms": quiet,
        "step_ms_while_writing": busy,
    }


def refused(check: Check) -> tuple[str, dict]:
    """Register memory a second time. CUDA must refuse, and later kernels must not raise that error."""
    tensor = pinned.empty_pinned(1000, torch.float32)
    error = pinned.register(tensor.data_ptr(), mmap.PAGESIZE)
    total = float(torch.ones(2, device=check.device).sum())
    return right_if(error != 0 and total == 2 and tensor.is_pinned()), {"error": error}


def resident() -> int:
    """Return the bytes of host memory that this process uses."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) << 10


def step_seconds(steps: Steps, number: int) -> float:
    """Return the median milliseconds of some steps; each ends with a read of the device."""
    taken = []
    for _ in range(number):
        started = time.perf_counter()
        steps.take()
        taken.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(taken), 1)
