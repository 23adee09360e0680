"""Build RoMA's neighbour store (docs/roma.md) in two steps:

launch/align.py collect RUN STORE [section.key=value ...]
    Record how RUN's newest checkpoint routes and answers each sample of data.shards. Runs as a single process or under
    any launcher.
launch/align.py neighbours STORE EMBEDDER [--k 3] [--sigma S]
    Find the neighbours whose routing each sample should imitate. Runs as a single process.

To train with the store, set data.neighbours to STORE in a recipe.
"""

import argparse
from pathlib import Path

from moe_dist.alignment.embedder import embed
from moe_dist.alignment.nearest_neighbours import nearest
from moe_dist.checkpoint.manifest import identity
from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.stream.neighbour_store import Samples, read_samples, write_neighbours, write_samples
from moe_dist.data.tasks.choice_items import read_instructions
from moe_dist.evaluate.choice_accuracy import answer_all
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import run_rank
from moe_dist.training.trained_run import TrainedRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("collect")
    step.add_argument("run", type=Path, help="a run folder")
    step.add_argument("store", type=Path)
    step.add_argument("overrides", nargs="*", metavar="section.key=value")
    step.set_defaults(call=lambda a: collect(RunFolder(a.run), a.store, a.overrides))
    step = steps.add_parser("neighbours")
    step.add_argument("store", type=Path)
    step.add_argument("embedder", type=Path, help="folder of a sentence-embedding model")
    step.add_argument("--k", type=int, default=3, help="neighbours of a sample (default: 3, the paper's best)")
    step.add_argument("--sigma", type=float, help="width of the similarity (default: the median distance)")
    step.set_defaults(call=lambda a: find_neighbours(a.store, a.embedder, a.k, a.sigma))
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    arguments.call(arguments)


def collect(folder: RunFolder, store: Path, overrides: list[str]) -> None:
    """Run the model on every training sample, and write the results to a new store. Collective.

    The results are each sample's routing, and whether the model answers the sample correctly.
    """
    found = TrainedRun.find(folder, overrides)
    run, config = found.open("train"), found.config
    answers = answer_all(
        run.forward,
        run.documents["train"],
        run.vocabulary,
        config.data,
        run.layout,
        split="train",
        batch_groups=config.train.micro_batch_groups,
    )
    with raise_on_all_ranks():
        if run.layout.is_main:
            samples = Samples(sample_N=answers.sample_N, right_N=answers.right_N, routing_NR=answers.routing_NR)
            about = {
                "model": identity(found.checkpoint),
                "checkpoint": str(found.checkpoint),
                "data": config.data.model_dump(mode="json"),
            }
            write_samples(store, samples, about)
            print(f"{store}: {int(answers.right_N.sum())} of {len(answers.right_N)} samples answered correctly")


def find_neighbours(store: Path, embedder: Path, k: int, sigma: float | None) -> None:
    """Find the nearest neighbours of each sample in the store, and write them to the store.

    The distance between two samples is the distance between the embeddings of their questions.
    """
    samples, about = read_samples(store)
    data = validate(DataConfig, about["data"], str(store))
    instructions = read_instructions(data, "train")
    questions = {sample: each.question or each.prompt for sample, each in instructions.items()}
    missing = [sample for sample in samples.sample_N.tolist() if sample not in questions]
    if missing:
        raise UserError(f"{len(missing)} samples of {store} are no longer in {data.shards}: collect it again")
    embedding_NE = embed([questions[sample] for sample in samples.sample_N.tolist()], embedder)
    neighbours, sigma = nearest(embedding_NE, samples.right_N, k=k, sigma=sigma)
    write_neighbours(store, neighbours, {"embedder": str(embedder), "k": k, "sigma": sigma})
    covered = int((neighbours.weight_NK > 0).any(dim=1).sum())
    print(f"{store}: {covered} of {len(samples.sample_N)} samples have neighbours, sigma {sigma:.3f}")


if __name__ == "__main__":
    run_rank(main)
