"""The prerequisites of a recipe (the section `needs`), and the commands that create them.

  python -m moe_dist.config.prerequisites configs/NAME.yaml

Prints the command for each missing prerequisite, in the order of the section `needs`. The targets `make data` and
`make train` run these commands. For a missing earlier stage, the command is `make train` with the recipe of the
stage. Before `make train` trains a stage, it creates the prerequisites of the stage.
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
    folder: Path
    last: Path  # the file that is written last: once it exists, the prerequisite is complete
    command: str


def prerequisite(need: Need) -> Prerequisite:
    """Return the folder that a need requires, the file that is written there last, and the command that creates both.

    Once the file exists, the prerequisite is complete. Raises UserError if the need is an earlier stage whose recipe is
    invalid.
    """
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
    """Yield the prerequisites of a recipe that are missing or incomplete, in the order of its section `needs`.

    Raises UserError if an earlier stage's recipe is invalid.
    """
    return (needed for needed in map(prerequisite, config.needs) if not needed.last.exists())


def main() -> None:
    try:
        for needed in missing(load_config(sys.argv[1])):
            print(needed.command)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
