"""Plot the curves of finished or running runs: `python launch/report.py RUN [RUN ...]`.

Writes loss.png to every run folder, routing.png if the run has experts, and domains.png if its data have domains. If
several runs are given, their losses are also plotted together in the file that --out names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_dist.metrics.curves import loss_figure, read_baseline, read_run, save_figure, write_report
from moe_dist.parallel.discovery import run_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help='bigram losses, JSON: {"text": 4.1, "image": 5.8}'
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison.png"),
        metavar="PNG",
        help="overlay of the runs (default: %(default)s)",
    )
    arguments = parser.parse_args()
    baseline = read_baseline(arguments.baseline) if arguments.baseline else {}
    files = [file for run in arguments.runs for file in write_report(run, baseline)]
    if len(arguments.runs) > 1:
        save_figure(loss_figure([read_run(run) for run in arguments.runs], baseline), arguments.out)
        files.append(arguments.out)
    print("\n".join(str(file) for file in files))


if __name__ == "__main__":
    run_rank(main)
