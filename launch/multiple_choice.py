"""Measure the accuracy of runs on the multiple-choice items of their held-out split, and compare the runs in pairs:

  launch/multiple_choice.py RUN [RUN ...] [--out FILE.json] [section.key=value ...]

The newest checkpoint of each RUN answers the items. The answers are stored in RUN/multiple_choice.json, and a second
call reuses them. Prints the accuracy of each run, and the difference between each run and every run named before it,
all with 95 % intervals. The command works as a single process and under any launcher. To use the items of another
folder, give data.validation_shards=FOLDER.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.checkpoint.manifest import identity
from moe_dist.core.errors import UserError
from moe_dist.core.files import json_text, read_json, write_file
from moe_dist.evaluate.choice_accuracy import OVERALL, Comparison, Result, answer_all
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import is_main_process, run_rank
from moe_dist.training.trained_run import TrainedRun

ANSWERS = "multiple_choice.json"


def main() -> None:
    run(sys.argv[1:])


def run(argv: list[str]) -> None:
    """Measure the accuracy of every run named on the command line, then compare the runs. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RUN or section.key=value")
    parser.add_argument("--out", type=Path, help="also write the comparison to this JSON file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args(argv)
    overrides = [argument for argument in arguments.arguments if "=" in argument]
    folders = [RunFolder(Path(argument)) for argument in arguments.arguments if "=" not in argument]
    if not folders:
        raise UserError("no run folder is named: launch/multiple_choice.py RUN [RUN ...] [section.key=value ...]")
    results = {str(folder.path): result_of(folder, overrides) for folder in folders}
    with raise_on_all_ranks():
        summary = compare(results)
        if is_main_process():
            show(summary, Console())
            if arguments.out is not None:
                write_file(arguments.out, json_text(summary))


def result_of(folder: RunFolder, overrides: list[str]) -> Result:
    """Return a run's result. Stored answers are reused if they are for the same checkpoint and items. Collective."""
    found = TrainedRun.find(folder, overrides)
    config, kept = found.config, folder.path / ANSWERS
    with raise_on_all_ranks():
        about = {"checkpoint": identity(found.checkpoint), "data": config.data.model_dump(mode="json")}
        saved = read_json(kept) if kept.is_file() else {}
    if saved.get("of") == about:
        return Result.from_json(saved)
    run = found.open("validation")
    answers = answer_all(
        run.forward,
        run.documents["validation"],
        run.vocabulary,
        config.data,
        run.layout,
        split="validation",
        batch_groups=config.train.micro_batch_groups,
    )
    result = Result.of(answers, run.documents["validation"].domains)
    with raise_on_all_ranks():
        if run.layout.is_main:
            write_file(kept, json.dumps({"of": about, "step": run.step, **result.to_json()}) + "\n")
    return result


def compare(results: dict[str, Result]) -> dict[str, Any]:
    """Return the accuracies of each run, and a comparison of each run with every run named before it."""
    return {
        "accuracy": {name: result.to_json()["accuracy"] for name, result in results.items()},
        "comparisons": [
            {
                "first": first,
                "second": second,
                **{
                    task: Comparison.of(items, results[second].tasks().get(task, {})).to_json()
                    for task, items in results[first].tasks().items()
                },
            }
            for first, second in combinations(results, 2)
        ],
    }


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a table of accuracies in per cent, and a table of differences in percentage points."""
    accuracy = summary["accuracy"]
    table = Table("accuracy, % [95 % interval]", "items", *accuracy)
    for task, first in accuracy[next(iter(accuracy))].items():
        cells = [_interval(of[task]["share"], of[task]["interval_95"]) for of in accuracy.values()]
        table.add_row(task, str(first["items"]), *cells)
    console.print(table)
    if summary["comparisons"]:
        table = Table("difference in points [95 % interval]", OVERALL, "gained", "lost", "McNemar p")
        for pair in summary["comparisons"]:
            overall = pair[OVERALL]
            table.add_row(
                f"{pair['second']} - {pair['first']}",
                _interval(overall["difference"], overall["interval_95"], "+"),
                str(overall["gained"]),
                str(overall["lost"]),
                f"{overall['mcnemar_p']:.2g}",
            )
        console.print(table)


def _interval(value: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


if __name__ == "__main__":
    run_rank(main)
