"""Ranks for a recipe on one machine, and the overrides with which the recipe suits them."""

from __future__ import annotations

from math import gcd

from moe_dist.config.recipe import Config

WITHOUT_GPU = 2  # ranks


def fit(config: Config, *, gpus: int, ranks: int | None = None) -> tuple[int, list[str]]:
    """Return the number of ranks and overrides for it. None of them changes what is trained.

    By default there is a rank for each GPU, or for the most of them that the lanes and the global batch divide among.
    Experts and micro-batches are spread as far as these ranks allow. GPUs train in bfloat16 unless the recipe says.
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
    if gpus and "bf16" not in config.deepspeed:
        overrides.append("deepspeed.bf16.enabled=true")
    return ranks, overrides
