"""Compare a run's held-out loss with references: launch/evaluate.py RUN [section.key=value ...]

The references are the loss of a smoothed bigram model and the run's own loss with shuffled captions.

Reads RUN/config.yaml and the run's newest checkpoint, and writes RUN/evaluation.json. The setting eval.groups
determines the number of selection groups to evaluate.

Runs as a single process or under any launcher. By default, every process holds all experts. To shard the experts, set
parallel.expert to a divisor of the number of processes.
"""

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_dist.core.batch import MODALITIES
from moe_dist.core.files import json_text, write_file
from moe_dist.evaluate.comparison import compare_with_references
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import run_rank
from moe_dist.training.trained_run import TrainedRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    evaluate_run(RunFolder(arguments.run), arguments.overrides)


def evaluate_run(folder: RunFolder, overrides: list[str]) -> None:
    """Evaluate a run, print a table and write RUN/evaluation.json. Collective."""
    run = TrainedRun.find(folder, overrides).open("train", "validation")
    causal = run.model.causal_routing
    results = compare_with_references(
        run.forward,
        run.held_out_split,
        train=run.documents["train"],
        store=run.documents["validation"],
        causal_too=not causal and run.model.can_route_causally,
    )
    with raise_on_all_ranks():
        if run.layout.is_main:
            record = {"step": run.step, "causal": causal, **results}
            write_file(folder.path / "evaluation.json", json_text(record))
            Console().print(table(results, run.step, causal))
            for prefix, routing in (("eval/", "causal" if causal else "non-causal"), ("eval/causal/", "causal")):
                if f"{prefix}caption_gain" in results:
                    Console().print(worth_of_captions(results, prefix, routing))


def table(results: dict[str, float], step: int, causal: bool) -> Table:
    both = "eval/causal/loss" in results  # if the rows differ in routing, each row names its own
    label = "" if causal or both else ", non-causal (expert choice)"
    note = ", non-causal (as in training)" if both else ""
    rows = {f"model{note}": "loss", f"captions shuffled{note}": "shuffled/loss", "bigram model": "bigram"}
    given = {f"model{note}": ""}  # key prefixes of the rows that have losses of one modality given the other
    if both:
        name = "model, causal (auxiliary routers)"
        rows, given = {name: "causal/loss"} | rows, {name: "causal/"} | given
    headings = ("nats per token / perplexity", "all", *MODALITIES, "caption given image", "image given caption")
    grid = Table(*headings, title=f"held-out loss after {step} steps{label}", title_justify="left")
    for name, prefix in rows.items():
        keys = [prefix, *(f"{prefix}/{modality}" for modality in MODALITIES)]
        keys += [f"{given[name]}{task}" if name in given else "" for task in ("image_to_text", "text_to_image")]
        values = [results.get(f"eval/{key}") for key in keys]
        grid.add_row(name, *("-" if value is None else f"{value:.3f} / {perplexity(value):,.1f}" for value in values))
    return grid


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if exp(loss) is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def worth_of_captions(results: dict[str, float], prefix: str, routing: str) -> str:
    gain, low, high, captions = (results[f"{prefix}caption_gain{end}"] for end in ("", "/low", "/high", "/captions"))
    return (
        f"Before an image, its own caption is worth {gain:.3f} nats per code compared with "
        f"another's (95 % interval {low:.3f} to {high:.3f}, over {captions:.0f} captions; {routing})."
    )


if __name__ == "__main__":
    run_rank(main)
