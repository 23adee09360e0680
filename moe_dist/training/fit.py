"""Command that adapts a recipe to this machine: it chooses the number of ranks and overrides for the recipe.

  python -m moe_dist.training.fit configs/NAME.yaml [RANKS]

The Makefile runs this command and evaluates its output. The output assigns three shell variables: ranks, placement
(arguments for DeepSpeed's launcher) and overrides. If CUDA_VISIBLE_DEVICES is set, only the GPUs that it lists are
used. If the recipe has an error, there are no overrides, and launch/train.py reports the error.
"""

from __future__ import annotations

import os
import subprocess
import sys
from math import gcd

from moe_dist.config.recipe import Config, load_config
from moe_dist.core.errors import UserError

WITHOUT_GPU = 2  # ranks


def fit(config: Config, *, gpus: int, ranks: int | None = None) -> tuple[int, list[str]]:
    """Return the number of ranks for a recipe, and overrides that adapt the recipe to this number.

    gpus: the number of GPUs of this machine.
    ranks: the number of ranks to use. If it is None and there are GPUs, use the largest number up to `gpus` that
    divides both data.lanes and train.global_batch_groups. If it is None and there are no GPUs, use WITHOUT_GPU ranks.

    The overrides reduce parallel.expert and train.micro_batch_groups if the number of ranks requires it. This does not
    change the training result. On GPUs, the overrides also enable bfloat16, unless the recipe has a bf16 section.
    """
    lanes, groups = config.data.lanes, config.train.global_batch_groups
    if ranks is None:
        usable = (n for n in range(1, gpus + 1) if lanes % n == groups % n == 0)
        ranks = max(usable) if gpus else WITHOUT_GPU
    overrides = []
    if ranks % config.parallel.expert:
        overrides.append(f"parallel.expert={gcd(config.parallel.expert, ranks)}")
    micro = gcd(config.train.micro_batch_groups, max(groups // ranks, 1))
    if groups % ranks == 0 and micro != config.train.micro_batch_groups:
        overrides.append(f"train.micro_batch_groups={micro}")
    if gpus and "bf16" not in config.deepspeed.model_fields_set:
        overrides.append("deepspeed.bf16.enabled=true")
    return ranks, overrides


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
    """Return the indices of the GPUs that this process may use, as strings."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    numbers = [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return numbers if allowed is None else [number for number in allowed.split(",") if number in numbers]


if __name__ == "__main__":
    main()
