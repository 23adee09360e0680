"""Measure the peak of host memory while a model of 1.5 billion parameters is built, filled and trained on two ranks.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/build_memory.py CASE WORK

CASE: lora_zero3, lora_zero2_ep2 or train. The first two build the model from seeds, save a checkpoint to WORK, and
print the seconds that the initial values take. A second call with the same WORK loads the checkpoint instead. `train`
also takes two steps with LoRA. Prints one row of a Markdown table per rank, in MiB. The needed memory is that of
docs/weights.md ("Memory").
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed
from tests.support.peak_memory import Measured, MemoryJob, measure, resident
from tests.support.toy_model import objective, step_batches

SIZES = {"hidden_size": 2048, "num_layers": 22, "ffn_size": 1024, "vocabulary": 32000}  # 1.61 billion parameters
LORA = {"lora": {"rank": 8, "alpha": 16.0}, "trainable": ("*.lora.*", "*.router.*")}
LIVE = 50_000_000  # gathered parameters that ZeRO-3 keeps at a time; the default is a billion
CASES = {
    "lora_zero3": MemoryJob(**SIZES, **LORA, stage=3, expert=1),
    "lora_zero2_ep2": MemoryJob(**SIZES, **LORA, stage=2, expert=2),
    "train": MemoryJob(
        **SIZES,
        **LORA,
        stage=3,
        expert=1,
        recompute=True,
        deepspeed={
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    ),
}


def main(case: str, work: str) -> None:
    job, stored = CASES[case], Path(work) / case
    rank = init_distributed() and torch.distributed.get_rank()
    if case == "train":
        rows = gather_objects(train(job))
        header = "| rank | baseline | peak of the process |"
    else:
        changes = {"source": "checkpoint", "path": str(stored)} if stored.exists() else {"save": str(stored)}
        started = time.perf_counter()
        found = measure(rank, MemoryJob(**{**vars(job), **changes}))
        rows = gather_objects(row(found, time.perf_counter() - started))
        header = "| rank | baseline | peak above it | share | largest tensor | optimizer | peak / needed | seconds |"
    if rank == 0:
        print(header, "|---" * (header.count("|") - 1) + "|", sep="\n")
        for number, cells in enumerate(rows):
            print(f"| {number} | {' | '.join(cells)} |")


def row(found: Measured, seconds: float) -> list[str]:
    sizes = (found.baseline, found.peak, found.share, found.largest, found.optimizer)
    return [*(f"{size / 2**20:,.0f}" for size in sizes), f"{found.ratio:.2f}", f"{seconds:.0f}"]


def train(job: MemoryJob) -> list[str]:
    """Take two steps of one short micro-batch per rank."""
    layout = make_layout(expert=job.expert, device=torch.device("cpu"))
    baseline = resident("VmRSS")
    engine = job.start(layout)
    for step in range(2):
        batches = step_batches(step, layout.rank, layout.world, groups=2, tokens=64)
        result = engine.train_step(batches, objective, 1e-3)
        assert not result.skipped
    return [f"{size / 2**20:,.0f}" for size in (baseline, resident("VmHWM"))]


if __name__ == "__main__":
    main(*sys.argv[1:])
