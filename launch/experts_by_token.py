"""Show which held-out tokens take many experts: launch/experts_by_token.py RUN [section.key=value ...]

Reads RUN/config.yaml and the run's newest checkpoint. Prints the mean number of experts of each class of token, and the
tokens with the lowest and the highest means. Writes RUN/experts_by_token.json, and RUN/experts_by_token.png if
matplotlib is installed. The setting eval.groups determines the number of selection groups to read.

Runs as a single process or under any launcher. By default, every process holds all experts.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.core.extras import MissingExtra
from moe_dist.core.files import json_text, write_file
from moe_dist.evaluate.experts_by_token import count_experts
from moe_dist.metrics.heat_map import draw_heat_map
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import run_rank
from moe_dist.training.trained_run import TrainedRun

FILE = "experts_by_token"
SHOWN = 10  # extreme tokens in the printed table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    run = TrainedRun.find(folder, arguments.overrides).open("validation")
    batches = run.held_out_split.batches(run.documents["validation"])
    counted = count_experts(run.forward, batches, run.model.embedding.num_embeddings, run.layout)
    with raise_on_all_ranks():
        if run.layout.is_main:
            summary = {"step": run.step, **counted.summary(run.vocabulary)}
            write_file(folder.path / f"{FILE}.json", json_text(summary))
            Console().print(*tables(summary), sep="\n")
            draw(summary, folder.path / f"{FILE}.png")


def tables(summary: dict[str, Any]) -> list[Table]:
    """Return the two tables to print.

    The first shows the mean number of experts for each class of token. The second shows the tokens with the fewest and
    the tokens with the most experts.
    """
    mean = summary["experts_per_token"]
    classes = Table("tokens", "number", "experts", title=f"{mean:.2f} experts per token and layer")
    for name, row in summary["classes"].items():
        classes.add_row(name, f"{row['tokens']:,}", f"{sum(row['experts']) / len(row['experts']):.2f}")
    extremes = Table("fewest", "experts", "times", "most", "experts", "times")
    for few, many in list(zip(summary["fewest"], summary["most"], strict=True))[:SHOWN]:
        cells = [(repr(row["text"]), f"{row['experts']:.2f}", f"{row['count']:,}") for row in (few, many)]
        extremes.add_row(*cells[0], *cells[1])
    return [classes, extremes]


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw the mean number of experts by layer and class of token. Without matplotlib, print that it is missing."""
    names = list(summary["classes"])
    rows = [[summary["classes"][name]["experts"][row] for name in names] for row in range(len(summary["layers"]))]
    try:
        draw_heat_map(rows, list(summary["layers"]), names, path, title="experts per token", row_label="layer")
    except MissingExtra as missing:
        Console(stderr=True).print(f"no {path.name}: {missing}")


if __name__ == "__main__":
    run_rank(main)
