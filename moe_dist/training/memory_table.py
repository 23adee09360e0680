"""Command that prints a table of the memory that recipes need on each GPU.

  python -m moe_dist.training.memory_table configs/NAME.yaml:VOCABULARY_SIZE ... [--gpus 8 16 64] [--room 64]

Each recipe is shown with all parameters trained, with LoRA, and with only the routers trained. For each of these, the
table has the lowest ZeRO stage at which the model, the gradients and the optimizer fit into `room` GiB. The rest of a
GPU is for activations. docs/weights.md has the table for published models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moe_dist.config.model_section import MoEFFN
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.errors import UserError
from moe_dist.metrics.memory import RankBytes, rank_bytes
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, check_layout
from moe_dist.training.trainable import freeze_others

VARIANTS = {  # overrides of a recipe
    "all": ["trainable=['*']"],
    "LoRA": ["trainable=['*.attention.*lora*']", "model.lora={rank: 16, alpha: 32}"],
    "routers": ["trainable=['*.router.*']"],
}


def recipe_bytes(config: Config, vocab_size: int, world: int) -> RankBytes:
    """Return the bytes of a recipe's model and optimizer on one of `world` ranks. Nothing is allocated.

    Raises UserError if the recipe does not fit the number of ranks, or trains no parameter.
    """
    check_layout(world=world, expert=config.parallel.expert)
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size, Layout(), config.seed)
    freeze_others(model, config.trainable)
    return rank_bytes(model, Layout(world=world, expert=config.parallel.expert), config.deepspeed)


def lowest_stage(recipe: Path, overrides: list[str], vocab_size: int, world: int, room: float) -> tuple[int, RankBytes]:
    """Return a ZeRO stage, and the bytes that a recipe needs on a rank at this stage.

    The stage is the lowest one at which the recipe needs at most `room` bytes, or 3 if every stage needs more.
    overrides: changes to the recipe, as in load_config.
    """
    stage, needed = 0, None
    while needed is None or (needed.total > room and stage < 3):
        stage += 1
        config = load_config(recipe, [*overrides, f"deepspeed.zero_optimization.stage={stage}"])
        needed = recipe_bytes(config, vocab_size, world)
    return stage, needed


def rows(recipe: Path, vocab_size: int, gpus: list[int], room: float) -> list[str]:
    """Return the recipe's rows of the table: one for each of VARIANTS. A dense model has no row for routers."""
    config = load_config(recipe)
    lines = []
    for variant, overrides in VARIANTS.items():
        if variant == "routers" and not isinstance(config.model.ffn, MoEFFN):
            continue
        cells = [_cell(*lowest_stage(recipe, overrides, vocab_size, world, room), room) for world in gpus]
        lines.append(f"| {recipe.stem} | {variant} | {config.parallel.expert} | {' | '.join(cells)} |")
    return lines


def _cell(stage: int, needed: RankBytes, room: float) -> str:
    state = needed.masters + needed.moments
    shown = [needed.parameters + needed.frozen + needed.buffers, needed.gradients, state]
    total = f"{needed.total / 2**30:.1f}" if needed.total <= room else f"**{needed.total / 2**30:.1f}**"
    return f"ZeRO-{stage}: {total} = {' + '.join(f'{part / 2**30:.1f}' for part in shown)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="GiB on each GPU")
    parser.add_argument("recipes", nargs="+", type=_with_size, metavar="RECIPE:VOCABULARY_SIZE")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--room", type=float, default=64, help="GiB for model, gradients and optimizer")
    options = parser.parse_args()
    print("| model | trained | EP |", " | ".join(f"{number} GPUs" for number in options.gpus), "|")
    print("|---" * (3 + len(options.gpus)) + "|")
    try:
        for recipe, vocab_size in options.recipes:
            print(*rows(recipe, vocab_size, options.gpus, options.room * 2**30), sep="\n", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


def _with_size(argument: str) -> tuple[Path, int]:
    recipe, _, size = argument.rpartition(":")
    if not recipe or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"'{argument}' is not a recipe and the size of its vocabulary, a.yaml:32000")
    return Path(recipe), int(size)


if __name__ == "__main__":
    main()
