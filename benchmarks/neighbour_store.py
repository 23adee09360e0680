"""How large is a neighbour store of a million samples, and how fast is it? python benchmarks/neighbour_store.py

Writes a store with random contents to a temporary folder: five layers of 64 experts, three neighbours of each sample.
The neighbours themselves are found among fewer samples. Writes benchmarks/results/<date>-neighbour_store.md.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from moe_dist.alignment.nearest_neighbours import find_neighbours
from moe_dist.config.losses import NeighbourSettings
from moe_dist.data.stream.neighbour_store import Neighbours, NeighbourStore, Samples, write_neighbours, write_samples
from runs import write_result
from tests.support.model_batches import make_batch

SAMPLES, VALUES, K, BATCH = 1_000_000, 5 * 64, 3, 32
POOL, EMBEDDING = 16_384, 384
NOTE = (
    f"{SAMPLES:,} samples of {VALUES} routing values. A lookup is that of {BATCH} random samples and their neighbours."
)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Return this process's resident memory in MiB, its own and that of mapped files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0]: int(words[1]) // 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def store_rows(folder: Path) -> list[str]:
    sample_N = torch.randint(2**62, (SAMPLES,)).sort().values
    routing_NR = torch.rand(SAMPLES, VALUES)
    right_N = torch.ones(SAMPLES, dtype=torch.bool)
    write_samples(folder, Samples(sample_N=sample_N, right_N=right_N, routing_NR=routing_NR), {"model": "random"})
    neighbours = Neighbours(
        neighbour_NK=torch.randint(SAMPLES, (SAMPLES, K)), weight_NK=torch.full((SAMPLES, K), 1 / K)
    )
    write_neighbours(folder, neighbours, {})
    del routing_NR, neighbours
    size = sum(file.stat().st_size for file in folder.iterdir())
    before, opened = memory(), []
    seconds = timed(lambda: opened.append(NeighbourStore(folder, model=None, settings=None)))
    (store,) = opened
    own = memory()["RssAnon:"] - before["RssAnon:"]
    batch = make_batch([9, 9])
    batches = [replace(batch, sidecar={"sample_S": sample_N[torch.randint(SAMPLES, (BATCH,))]}) for _ in range(1000)]
    lookups = [timed(lambda batch=batch: store.join(batch)) for batch in batches]
    return [
        f"| size on disk | {size / 2**30:.2f} GiB |",
        f"| opening it | {1e3 * seconds:.1f} ms, {own} MiB of memory that is not shared |",
        f"| a lookup, median of 1,000 | {1e3 * statistics.median(lookups):.2f} ms |",
        f"| its digest, once at the start of a run | {timed(lambda: store.identity):.1f} s |",
    ]


def neighbour_row(**changes: object) -> str:
    embedding_NE = F.normalize(torch.randn(POOL, EMBEDDING), dim=1)
    right_N = torch.rand(POOL) < 0.5
    samples = Samples(sample_N=torch.arange(POOL), right_N=right_N, routing_NR=torch.rand(POOL, VALUES))
    settings, questions = NeighbourSettings(**changes), [str(n) for n in range(POOL)]
    seconds = timed(lambda: find_neighbours(embedding_NE, questions, samples, settings))
    return f"| neighbours of {POOL:,} samples, half of them successful, kind {settings.kind} | {seconds:.1f} s |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = store_rows(Path(folder) / "store")
    rows += [neighbour_row(kind=kind, sigma=0.5) for kind in ("nearest", "random", "all")]
    write_result("neighbour_store", "RoMA's neighbour store", NOTE, "| | |", rows)
