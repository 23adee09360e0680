"""Training steps of MoMa's recipes on one card: tokens per second, FLOP/s, memory, and where the time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.check import Check
from gpu.steps import Steps
from moe_dist.model.transformer import Transformer

ONE = ["parallel.expert=1", "train.global_batch_groups=1", "train.micro_batch_groups=1"]
TINY = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.sequence_length=64",
    "data.group_sequences=2",
]
KEPT, RECOMPUTED = ["model.recompute=false"], ["model.recompute=true"]
DENSE = "model.ffn={{type: dense, hidden_size: {}}}"
PAIR = (
    "model.ffn={{type: moe, hidden_size: {}, router: {{type: modality, "
    "text: {{type: expert_choice, num_experts: 1}}, image: {{type: expert_choice, num_experts: 1}}}}}}"
)
CASES = {  # recipe, changes, whether the step is profiled
    "90M 4t4i": ("moma_90m", KEPT, True),
    "90M dense": ("moma_90m", [*KEPT, DENSE.format(1376)], True),
    "435M 1t1i": ("moma_435m", [*KEPT, PAIR.format(2736)], True),
    "435M 4t4i": ("moma_435m", KEPT, True),
    "90M 4t4i, recomputed": ("moma_90m", RECOMPUTED, False),
    "435M 4t4i, recomputed": ("moma_435m", RECOMPUTED, False),
    "435M dense": ("moma_435m", [*KEPT, DENSE.format(2736)], False),
}
MATRIX = ("gemm", "cutlass", "nvjet", "sm90_xmma")  # parts of kernels' names


def run(check: Check) -> None:
    for name in ("90M 4t4i", "435M 1t1i") if check.small else CASES:
        check.attempt(name, lambda name=name: measured(check, name))
        gc.collect()
        if not check.small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measured(check: Check, name: str) -> tuple[str, dict]:
    recipe, changes, profiled = CASES[name]
    vocabulary = 512 if check.small else 65536
    overrides = [*ONE, *changes, *(TINY if check.small else [])]
    steps = Steps.build(check, recipe, overrides, vocabulary=vocabulary, on_device=True)
    for _ in range(1 if check.small else 4):
        result = steps.take()
    taken = []
    for _ in range(2 if check.small else 10):
        started = time.perf_counter()
        result = steps.take()  # ends with reads of the device
        taken.append(time.perf_counter() - started)
    seconds, info = statistics.median(taken), steps.batches[0].info
    assert result.counted is not None
    flops = result.counted.flops(cast(Transformer, steps.engine.module))
    numbers = {
        "ms": round(1e3 * seconds, 1),
        "tokens_s": round(info.num_tokens / seconds),
        "model_tflops": round(flops / seconds / 1e12, 1),
    }
    if not check.small:
        numbers["mfu_of_matmul"] = round(flops / seconds / 1e12 / check.seen("matmul_tflops"), 3)
        numbers["mfu_of_989"] = round(flops / seconds / 989e12, 3)
        numbers["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if profiled:
        numbers |= profile_step(check, steps.take)
    steps.engine._zero.destroy()
    return "measured", numbers


def profile_step(check: Check, step: Callable[[], Any]) -> dict[str, Any]:
    """Return the kernels of a step and their milliseconds by kind, the number of host waits,
    and the longest kernels.
    """
    activities = [ProfilerActivity.CPU] if check.small else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as recorded:
        step()
        check.sync()
    events = list(recorded.events())
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)

    def total(*words: str) -> float:
        return round(sum(sum(ms) for name, ms in by_name.items() if any(word in name.lower() for word in words)), 1)

    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    file = check.findings.folder / "kernels.txt"
    with file.open("a") as out:
        for name, ms in longest:
            out.write(f"{sum(ms):8.2f} ms {len(ms):5d} x {name[:200]}\n")
        out.write("\n")
    return {
        "kernels": len(kernels),
        "busy_ms": round(sum(map(sum, by_name.values())), 1),
        "matrix_ms": total(*MATRIX),
        "attention_ms": total("flash", "fmha"),
        "waits": waits,
    }
