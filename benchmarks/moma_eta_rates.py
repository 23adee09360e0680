"""Which learning rate is best for each model of the efficiency study? python benchmarks/moma_eta_rates.py [STEPS]

Trains the study's models (benchmarks/moma_eta.py) for STEPS steps (default 240) at each of RATES, one seed, two at a
time. Resumable. Writes benchmarks/results/<date>-moma_eta_rates.md.
"""

from __future__ import annotations

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from rich.progress import Progress

from moma_study import NAMES, RATE, RUNS, Study, prepare
from runs import write_result

RATES = (4e-3, RATE, 1.6e-2)
JOBS, LAST = 2, 40
HEADER = "| learning rate | " + " | ".join(NAMES) + " |"
NOTE = (
    "Training loss (nats a token, non-causal for the sparse models), mean over the last {last} of {steps} steps; one "
    "seed, the same data in the same order for all. The efficiency study trains at {rate:g}."
)


def at_rate(rate: float, steps: int) -> Study:
    schedule = f"schedule={{type: linear, warmup_steps: 40, end_lr: {rate}}}"
    overrides = [schedule, f"deepspeed.optimizer.params.lr={rate}"]
    return Study(steps, [0], overrides, RUNS.with_name("moma_eta_rates") / f"{rate:g}")


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    prepare()
    studies = {rate: at_rate(rate, steps) for rate in RATES}
    with Progress() as progress, ThreadPoolExecutor(JOBS) as pool:
        bar = progress.add_task("moma_eta_rates", total=len(RATES) * len(NAMES))
        todo = [pool.submit(study.train, name, 0) for study, name in product(studies.values(), NAMES)]
        for done in todo:
            done.result()
            progress.advance(bar)
    rows = []
    for rate, study in studies.items():
        losses = [statistics.mean(line["loss"] for line in study.lines(name, 0)[-LAST:]) for name in NAMES]
        rows.append(f"| {rate:g} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |")
    note = NOTE.format(last=LAST, steps=steps, rate=RATE)
    write_result("moma_eta_rates", "Learning rates of the efficiency study", note, HEADER, rows)


if __name__ == "__main__":
    main()
