"""Facts about the machine, and the ceilings that other parts compare with."""

from __future__ import annotations

import sys
import time

import torch

from gpu.check import Check


def run(check: Check) -> None:
    numbers = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if not check.small:
        numbers |= card() | ceilings(check)
    check.note("machine", "seen", **numbers)


def card() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "GiB": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def ceilings(check: Check) -> dict:
    """Time a large bfloat16 product of random data, a large copy (bytes read and written), and a kernel launch."""
    device = torch.device("cuda", 0)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * 8192**3 / check.milliseconds(lambda: a @ b) / 1e9
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * 2**30 / check.milliseconds(lambda: target.copy_(source)) / 1e6
    x = torch.zeros(16, device=device)
    started = time.perf_counter()
    for _ in range(2000):
        x.add_(1)
    launch = (time.perf_counter() - started) / 2000
    return {"matmul_tflops": round(tflops), "copy_gb_s": round(bandwidth), "launch_us": round(launch * 1e6, 1)}
