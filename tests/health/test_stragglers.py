"""Who keeps the others waiting is found by its own time in a step, which all ranks take equally long."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.config.recipe import HealthConfig
from moe_dist.health.stragglers import Stragglers, find
from moe_dist.metrics.run_folder import RunFolder
from tests.support.distributed import run_ranks


def _steps(rank, folder):
    """The steps' seconds; rank 1 takes its time before it meets the others."""
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    settings = HealthConfig(straggler_every=5, straggler_factor=1.5)
    stragglers, wait, seconds = Stragglers(settings, RunFolder(Path(folder)), rank=rank, step=10), dist.Work.wait, []
    for _ in range(5):
        dist.barrier()
        started = time.perf_counter()
        with stragglers:
            time.sleep(0.5 if rank == 1 else 0.01)
            dist.all_reduce(torch.ones(4))
        seconds.append(time.perf_counter() - started)
    assert dist.Work.wait is wait, "put back"
    del os.environ["SLURMD_NODENAME"]
    return seconds


def test_the_slow_rank_is_named_with_its_host(tmp_path):
    seconds = run_ranks(_steps, 3, str(tmp_path))
    assert min(min(of_rank) for of_rank in seconds) > 0.4, "every rank's step takes as long as the slow one's"
    (line,) = [json.loads(line) for line in (tmp_path / "stragglers.jsonl").read_text().splitlines()]
    assert (line["rank"], line["host"], line["step"], line["steps"]) == (1, "n1", 15, 5)


def test_twice_as_slow_as_the_rest():
    ranks = [(1.0, "a"), (1.1, "b"), (2.0, "c"), (0.9, "d")]
    assert find(ranks, 1.5) == {"rank": 2, "host": "c", "own_seconds": 2.0, "others_seconds": 1.0}
    assert find(ranks, 2.5) is None
    assert find(ranks[:1], 1.5) is None
