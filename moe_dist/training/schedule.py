"""The learning rate as a pure function of the step: linear warm-up, then linear or cosine decay to `end_lr`.

DeepSpeed's WarmupDecayLR is not used, because it warms up logarithmically and always ends at 0.
"""

from __future__ import annotations

import math

from moe_dist.config.recipe import ScheduleConfig


def learning_rate(step: int, *, config: ScheduleConfig, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (counted from 0) in a run that is planned for `steps` steps.

    The rate rises linearly to `peak_lr` over the first `warmup_steps` steps; no step has rate 0. Then the rate decays
    and reaches `end_lr` in the last planned step, `steps - 1`. In later steps it stays at `end_lr`.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    # The decay starts at the last warm-up step, which is at the peak, or at the first step if there is no warm-up.
    start = max(config.warmup_steps - 1, 0)
    last = max(steps - 1, start + 1)
    progress = min((step - start) / (last - start), 1.0)
    share = (1.0 - progress) if config.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.end_lr + (config.peak_lr - config.end_lr) * share
