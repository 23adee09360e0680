"""Find the best learning rate for each model of the efficiency study. python benchmarks/moma_eta_rates.py [STEPS]

Trains the study's models (benchmarks/moma_eta.py) for STEPS steps (default 240) at each of RATES, with one seed, two at
a time. Resumable. Writes benchmarks/results/<date>-moma_eta_rates.md.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from rich.progress import Progress

from moma_study import NAMES, RATE, RUNS, Study, at_constant, prepare
from runs import write_result

RATES = (4e-3, RATE, 1.6e-2)
JOBS, LAST = 2, 40
HEADER = "| learning rate | " + " | ".join(NAMES) + " |"
NOTE = (
    "Training loss (nats a token, non-causal for the sparse models), mean over the last {last} of {steps} steps; one "
    "seed, the same data in the same order for all. The efficiency study trains at {rate:g}."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="?", type=int, default=240)
    steps = parser.parse_args().steps
    prepare()
    folder = RUNS.with_name("moma_eta_rates")
    studies = {rate: Study(steps, [0], at_constant(rate), folder / f"{rate:g}") for rate in RATES}
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
