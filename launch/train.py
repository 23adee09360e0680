"""Train a recipe: launch/train.py --config configs/NAME.yaml [section.key=value ...]

Started by the deepspeed launcher, torchrun, srun or mpiexec (or alone, on one rank).
"""

import argparse

from moe_dist.parallel.launch import run_rank
from moe_dist.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a value of the recipe")
    arguments = parser.parse_args()
    train(arguments.config, arguments.overrides)


if __name__ == "__main__":
    run_rank(main)
