"""Translation of a recipe's `deepspeed` section (config/deepspeed_section.py) into DeepSpeed's configuration.

This file also computes the number of accumulation steps. It does not import DeepSpeed.
"""

from __future__ import annotations

from typing import Any

from moe_dist.config.deepspeed_section import DeepSpeedSection
from moe_dist.config.recipe import TrainConfig
from moe_dist.core.errors import UserError


def accumulation_steps(train: TrainConfig, dp: int) -> int:
    """Return the number of micro-batches per rank and step: global_batch_groups / (dp * micro_batch_groups).

    Raises UserError if this is not a whole number.
    """
    per_pass = dp * train.micro_batch_groups
    if train.global_batch_groups % per_pass:
        raise UserError(
            f"train.global_batch_groups={train.global_batch_groups} is not a multiple of {per_pass} "
            f"({dp} ranks times train.micro_batch_groups={train.micro_batch_groups})"
        )
    return train.global_batch_groups // per_pass


def to_deepspeed(section: DeepSpeedSection, *, accumulation: int, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the settings of the section, plus those that moe_dist always sets.

    accumulation: number of accumulation steps. num_parameters: number of trained parameters, which limits the default
    size of DeepSpeed's gradient bucket.
    """
    zero = section.zero_optimization.model_dump(exclude_none=True)
    # DeepSpeed allocates it in every step.
    zero["reduce_bucket_size"] = section.zero_optimization.bucket_elements(num_parameters)
    accumulation_type = section.data_types.grad_accum_dtype if section.data_types else "fp32"
    config = section.model_dump(exclude={"optimizer", "zero_optimization", "data_types"}, exclude_none=True)
    return config | {
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": accumulation_type},
        "communication_data_type": section.communication_data_type or accumulation_type,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,  # SGD, which our tests cover
        "zero_force_ds_cpu_optimizer": False,  # torch's fused Adam works with offloading and needs no compilation
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every forward pass and step
    }
