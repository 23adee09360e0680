"""Build the neighbour store of a RoMA recipe (docs/roma.md) in two steps:

launch/align.py collect RECIPE [section.key=value ...]
    Run the model that the recipe starts from (init_from) on each sample of data.shards. Write each sample's routing,
    and whether its answer is correct, to the folder data.neighbours. Runs as a single process or under any launcher.
    If it is interrupted, run it again.
launch/align.py neighbours RECIPE EMBEDDER [section.key=value ...]
    Find the neighbours whose routing each sample should imitate, as losses.manifold.neighbours says. EMBEDDER is the
    folder of a sentence-embedding model. Runs as a single process.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_dist.alignment.embedder import embed
from moe_dist.alignment.nearest_neighbours import find_neighbours
from moe_dist.config.losses import ManifoldSettings
from moe_dist.config.recipe import Config, DataConfig, load_config
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.stream.neighbour_store import Samples, read_samples, write_neighbours, write_samples
from moe_dist.data.tasks.choice_items import read_instructions
from moe_dist.evaluate.answer_parts import answer_in_parts
from moe_dist.evaluate.choice_accuracy import Answers, Result, read_items
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import run_rank
from moe_dist.training.trained_run import open_start

PARTS = "parts"  # folder in the store for the samples that an unfinished collection has answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    for name in ("collect", "neighbours"):
        step = steps.add_parser(name)
        step.add_argument("recipe", type=Path)
        if name == "neighbours":
            step.add_argument("embedder", type=Path, help="folder of a sentence-embedding model")
        step.add_argument("overrides", nargs="*", metavar="section.key=value")
        step.set_defaults(step=name)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    config = load_config(arguments.recipe, arguments.overrides)
    if arguments.step == "collect":
        collect(config)
    else:
        write_nearest(config, arguments.embedder)


def collect(config: Config) -> None:
    """Run the model on every training sample, and write the results to a new store. Collective.

    The results are each sample's routing, and whether the model answers the sample correctly. If an earlier call was
    interrupted, the samples that it has finished are not run again.
    """
    store = store_of(config)
    run, origin = open_start(config, "train")
    documents, groups = run.documents["train"], config.train.micro_batch_groups
    data = config.data.model_dump(mode="json", exclude={"neighbours"})
    about = {"model": origin.identity, "data": data}
    choices, batches = read_items(
        documents, run.vocabulary, config.data, run.layout, split="train", batch_groups=groups
    )
    progress = {**about, "groups": groups, "bf16": config.deepspeed.bf16.enabled}
    answers = answer_in_parts(run.forward, batches, choices, run.layout, store / PARTS, progress)
    with raise_on_all_ranks():
        if answers is not None:
            samples = Samples(sample_N=answers.sample_N, right_N=answers.right_N, routing_NR=answers.routing_NR)
            write_samples(store, samples, {**about, "checkpoint": origin.source.checkpoint if origin.source else None})
            shutil.rmtree(store / PARTS)
            print(f"{store}: {int(answers.right_N.sum())} of {len(answers.right_N)} samples answered correctly")
            warn(answers, documents.domains)


def warn(answers: Answers, domains: Sequence[str]) -> None:
    """Print a warning for each task in which the model answers no sample correctly."""
    for task, items in Result.of(answers, domains).right.items():
        if not any(items.values()):
            sentence = f"none of the {len(items)} samples of the task '{task}' is answered correctly"
            print(f"warning: {sentence}: their neighbours come from other tasks", file=sys.stderr, flush=True)


def write_nearest(config: Config, embedder: Path) -> None:
    """Find the neighbours of each sample in the recipe's store, and write them to the store.

    The distance between two samples is the distance between the embeddings of their questions.
    """
    store, term = store_of(config), config.losses.get("manifold")
    if not isinstance(term, ManifoldSettings):
        raise UserError("the recipe has no losses.manifold, whose key `neighbours` says which neighbours to find")
    samples, about = read_samples(store)
    data = validate(DataConfig, about["data"], str(store))
    instructions = read_instructions(data, "train")
    by_sample = {sample: each.question or each.prompt for sample, each in instructions.items()}
    missing = [sample for sample in samples.sample_N.tolist() if sample not in by_sample]
    if missing:
        raise UserError(f"{len(missing)} samples of {store} are no longer in {data.shards}: collect it again")
    questions = [by_sample[sample] for sample in samples.sample_N.tolist()]
    settings = term.neighbours
    found, sigma = find_neighbours(embed(questions, embedder), questions, samples, settings)
    about = {"embedder": str(embedder), "sigma": sigma, "settings": settings.model_dump(mode="json")}
    write_neighbours(store, found, about)
    print(f"{store}: {found.covered} of {len(questions)} samples have neighbours, sigma {sigma:.3f}")


def store_of(config: Config) -> Path:
    """Return the folder of the recipe's neighbour store. Raises UserError if the recipe has none."""
    if config.data.neighbours is None:
        raise UserError("the recipe has no data.neighbours, the folder of the neighbour store")
    return Path(config.data.neighbours)


if __name__ == "__main__":
    run_rank(main)
