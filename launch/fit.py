"""For the Makefile: how many ranks a recipe gets on this machine, where, and which overrides suit them.

  launch/fit.py configs/NAME.yaml [RANKS]

Prints assignments for a shell: ranks, placement (arguments of DeepSpeed's launcher), overrides. GPUs are those of
CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists. A faulty recipe gets no overrides: launch/train.py says what is
wrong.
"""

import os
import subprocess
import sys

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.training.fit import WITHOUT_GPU, fit


def main() -> None:
    recipe, *given = sys.argv[1:]
    gpus, asked = visible_gpus(), int(given[0]) if given else None
    try:
        ranks, overrides = fit(load_config(recipe, []), gpus=len(gpus), ranks=asked)
    except UserError:
        ranks, overrides = asked or len(gpus) or WITHOUT_GPU, []
    if asked is None and ranks < len(gpus):
        print(f"{ranks} of {len(gpus)} GPUs: no more divide data.lanes and train.global_batch_groups", file=sys.stderr)
    chosen = "CUDA_VISIBLE_DEVICES" in os.environ and 0 < ranks <= len(gpus)
    placement = f"--include localhost:{','.join(gpus[:ranks])}" if chosen else f"--num_gpus {ranks}"
    print(f"ranks={ranks}; placement='{placement}'; overrides='{' '.join(overrides)}'")


def visible_gpus() -> list[str]:
    """The numbers of the GPUs that may be used."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    numbers = [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return numbers if allowed is None else [number for number in allowed.split(",") if number in numbers]


if __name__ == "__main__":
    main()
