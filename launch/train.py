"""Train a recipe: launch/train.py --config configs/NAME.yaml [section.key=value ...]

Started by the deepspeed launcher, torchrun, srun or mpiexec (or alone, on one rank).
"""

import argparse
import os
import sys

from moe_dist.errors import UserError
from moe_dist.parallel.launch import is_main_process
from moe_dist.train import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a value of the recipe")
    arguments = parser.parse_args()
    try:
        train(arguments.config, arguments.overrides)
    except UserError as error:
        if is_main_process():  # the others have the same sentence to tell
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # After an error other ranks may still wait in a collective; Python's clean-up would wait for them as well.
    os._exit(code) if code else sys.exit(0)
