"""The learning rate as a pure function of the step: linear warm-up, then linear or cosine decay to a stated end.

Ours rather than DeepSpeed's, whose WarmupDecayLR warms up logarithmically and always ends at 0.
"""

from __future__ import annotations

import math

from moe_dist.config.recipe import ScheduleConfig


def learning_rate(step: int, *, config: ScheduleConfig, steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) in a run whose horizon is `steps`.

    The first `warmup_steps` steps climb in equal parts to `peak_lr`; none is wasted at 0. The decay starts from there
    and reaches `end_lr` in the last step, `steps - 1`; beyond the horizon it stays there.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    # The last warm-up step is at the peak and starts the decay; without a warm-up the first step does.
    start = max(config.warmup_steps - 1, 0)
    last = max(steps - 1, start + 1)
    progress = min((step - start) / (last - start), 1.0)
    share = (1.0 - progress) if config.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.end_lr + (config.peak_lr - config.end_lr) * share
