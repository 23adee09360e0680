"""Measure how long training stands still for an asynchronous save, compared with a synchronous one.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint.py quickstart|300m [pairs]

Saves a model with AdamW's moments in pairs: synchronously, then asynchronously, then waits for the writer. Takes the
longest time over the ranks and prints one row of a Markdown table, in wall-clock seconds. For the stall it also prints
processor seconds, which other work on the machine disturbs less. Everything is fsynced, and no step is trained. The
first pair, which allocates the buffers, is reported separately.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint.checkpoint import checkpoint_path
from moe_dist.checkpoint.fragments import reset_optimizer
from moe_dist.checkpoint.saver import Saver
from moe_dist.config.recipe import load_config
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import gather_objects
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine

ROOT = Path(__file__).parent.parent
VOCABULARY = 1541  # the quickstart's
SIZES = {
    "quickstart": [],
    "300m": [
        "model.hidden_size=768",
        "model.num_layers=8",
        "model.num_heads=12",
        "model.ffn.hidden_size=1856",
        "deepspeed.bf16={enabled: true}",
    ],
}


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Return wall-clock and processor seconds of the slowest rank."""
    started = time.perf_counter(), time.process_time()
    work()
    took = gather_objects((time.perf_counter() - started[0], time.process_time() - started[1]))
    return max(wall for wall, _ in took), max(processor for _, processor in took)


def main(size: str, pairs: int) -> None:
    folder = ROOT / "runs" / "benchmark" / "checkpoint"
    config = load_config(ROOT / "configs" / "moma_quickstart.yaml", [*SIZES[size], f"run.dir={folder}"])
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    model = Transformer(config.model, VOCABULARY, layout, config.seed)
    engine = make_engine(model, config, layout)
    reset_optimizer(engine, with_moments=True)
    savers = [
        Saver(folder, engine, layout, config.checkpoint.model_copy(update={"asynchronous": mode, "keep": 1}))
        for mode in (False, True)
    ]
    rows = []
    for pair in range(pairs):
        synchronous, stall = (
            seconds(lambda saver=saver, step=2 * pair + mode: saver.save(step, {})) for mode, saver in enumerate(savers)
        )
        rows.append((synchronous[0], *stall, seconds(savers[1].wait)[0]))
        if layout.is_main:
            print(f"pair {pair}: synchronous, stall, its processor time, rest: {rows[-1]}", file=sys.stderr, flush=True)
    written = sum(file.stat().st_size for file in checkpoint_path(folder, 2 * pairs - 1).iterdir())
    memory = max(gather_objects(savers[1].buffers.nbytes))
    if layout.is_main:
        ratio = statistics.median(row[1] / row[0] for row in rows[1:])
        medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
        cells = [size, f"{written / 2**20:,.0f}", f"{memory / 2**20:,.0f}", *(f"{median:.3f}" for median in medians)]
        print("|", " | ".join([*cells, f"{ratio:.1%}", f"{rows[0][1]:.3f}"]), "|")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8)
