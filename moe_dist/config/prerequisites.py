"""What a recipe needs and is not there yet; `make data` and `make train` make it.

  python -m moe_dist.config.prerequisites configs/NAME.yaml

Prints the commands that make it, one a line and in the recipe's order. What an earlier stage needs is its own matter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.needs import CorpusNeed, Need, RunNeed, TokenizersNeed
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Prerequisite:
    folder: Path  # what recipes name
    last: Path  # the file that is written last: with it the prerequisite is complete
    command: str


def prerequisite(need: Need) -> Prerequisite:
    """Raises UserError for a stage whose recipe is faulty."""
    if isinstance(need, CorpusNeed):
        more = "".join(f" {key}={value}" for key, value in need.settings.items())
        command = f"python launch/prepare_data.py corpus={need.corpus} out={need.out}{more}"
        return Prerequisite(Path(need.out), Path(need.out, "corpus.json"), command)
    if isinstance(need, TokenizersNeed):
        command = f"python launch/train_tokenizers.py shards={need.shards} out={need.out} vocab_size={need.vocab_size}"
        return Prerequisite(Path(need.out), Path(need.out, "vq/quality.json" if need.images else "text.model"), command)
    if isinstance(need, RunNeed):
        stage = load_config(need.recipe)
        last = Path(stage.run.dir, "checkpoints", f"step_{stage.train.steps:08d}", "manifest.json")
        return Prerequisite(Path(stage.run.dir), last, f"make train CONFIG={need.recipe} ARGS=")
    return Prerequisite(Path(need.path).parent, Path(need.path), f"make {need.path}")


def missing(config: Config) -> Iterator[Prerequisite]:
    """What the recipe needs and is not complete, in its order."""
    return (needed for needed in map(prerequisite, config.needs) if not needed.last.exists())


def main() -> None:
    try:
        for needed in missing(load_config(sys.argv[1])):
            print(needed.command)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
