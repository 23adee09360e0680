"""Train a recipe: launch/train.py --config configs/NAME.yaml [section.key=value ...]

Start this script with the deepspeed launcher, torchrun, srun or mpiexec, or directly for a single rank. If any rank
receives SIGTERM, SIGUSR1, SIGUSR2 or SIGINT (Ctrl-C), the run saves a checkpoint and stops (docs/resuming.md).
"""

import argparse
import gc

from moe_dist.config.recipe import load_config
from moe_dist.parallel.signals import StopSignals


def main(stop: StopSignals) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a value of the recipe")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)  # before the slow imports
    gc.disable()  # otherwise the collector scans the imports' million objects repeatedly
    from moe_dist.training.run import train

    gc.freeze()
    gc.enable()
    train(config, stop)


if __name__ == "__main__":
    with StopSignals() as stop:  # before the imports, which take seconds
        from moe_dist.parallel.discovery import run_rank

        run_rank(lambda: main(stop))
