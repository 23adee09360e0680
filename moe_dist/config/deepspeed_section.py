"""The section `deepspeed` of a recipe: the DeepSpeed settings that a recipe may set, under DeepSpeed's own keys.

DeepSpeed silently ignores misspelt keys (`gradient_cliping: 0.3` trains with 1.0). Therefore only the keys listed here
are accepted. training/deepspeed_config.py translates the section for DeepSpeed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from moe_dist.core.strict import Fraction, Strict

# DeepSpeed writes sizes as 5e8.
Size = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v), Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]

# DeepSpeed's keys that are refused, because they conflict with another key of the recipe or with a guarantee.
OWNED = {
    "train_batch_size": "the global batch is train.global_batch_groups",
    "train_micro_batch_size_per_gpu": "the micro-batch is train.micro_batch_groups",
    "gradient_accumulation_steps": "it follows from train.global_batch_groups and train.micro_batch_groups",
    "scheduler": "set the schedule section instead",
    "checkpoint": "set the checkpoint section instead",
    "activation_checkpointing": "set model.recompute instead",
    "steps_per_print": "set telemetry.every instead",
    "tensorboard": "set telemetry.tensorboard instead",
    "wandb": "set telemetry.wandb_project instead",
    "timers": "telemetry measures throughput",
    "fp16": "half precision is bfloat16 here: set deepspeed.bf16.enabled instead",
    "expert_parallel": "set parallel.expert instead",
    "prescale_gradients": "the loss is scaled exactly by the engine",
    "gradient_predivide_factor": "the loss is scaled exactly by the engine",
}
REFUSED_ZERO = {
    "round_robin_gradients": "checkpoints need ZeRO's partitions to be contiguous",
    "reduce_scatter": "without it DeepSpeed would average different experts with each other",
    "contiguous_gradients": "expert parallelism needs DeepSpeed's default",
}


class Offload(Strict):
    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


def _not_zero(stage: Any) -> Any:
    if stage == 0:
        raise ValueError("stage 0 has no true global gradient norm with experts; choose 1, 2 or 3")
    return stage


class ZeroSection(Strict):
    refused: ClassVar = {key: f"is refused: {reason}" for key, reason in REFUSED_ZERO.items()}
    stage: Annotated[Literal[1, 2, 3], BeforeValidator(_not_zero)] = 1
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None  # stage 3
    reduce_bucket_size: Size | None = None  # elements; default: 5e8 or the model, whichever is smaller
    allgather_bucket_size: Size | None = None
    overlap_comm: bool | None = None
    sub_group_size: Size | None = None  # these and below: stage 3
    stage3_prefetch_bucket_size: Size | None = None
    stage3_param_persistence_threshold: Size | None = None
    stage3_model_persistence_threshold: Size | None = None
    stage3_max_live_parameters: Size | None = None
    stage3_max_reuse_distance: Size | None = None

    def bucket_elements(self, num_parameters: int) -> int:
        """Return the size of the gradient bucket in elements. num_parameters: the number of trained parameters."""
        given = self.reduce_bucket_size
        return min(500_000_000, num_parameters) if given is None else given

    @model_validator(mode="after")
    def _parameters_are_partitioned(self):
        if self.offload_param is not None and self.stage != 3:
            raise ValueError("offload_param needs stage 3")
        return self


class BF16Section(Strict):
    enabled: bool = False


class AdamParams(Strict):  # the learning rate is schedule.peak_lr
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    adam_w_mode: bool = True  # as in DeepSpeed, `Adam` has decoupled decay like AdamW unless this is false


class SGDParams(Strict):
    momentum: Fraction = 0.0
    dampening: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0


class AdamSection(Strict):
    type: Literal["Adam", "AdamW"]
    params: AdamParams = AdamParams()


class SGDSection(Strict):
    type: Literal["SGD"]
    params: SGDParams = SGDParams()


class DataTypes(Strict):
    grad_accum_dtype: Literal["fp32", "bf16"]


class DeepSpeedSection(Strict):
    refused: ClassVar = {key: f"is not taken from the deepspeed section: {advice}" for key, advice in OWNED.items()}
    optimizer: Annotated[AdamSection | SGDSection, Field(discriminator="type")]
    gradient_clipping: NonNegative = 1.0  # global norm; 0: no clipping
    zero_optimization: ZeroSection = ZeroSection()
    bf16: BF16Section = BF16Section()
    data_types: DataTypes | None = None  # default: gradients are accumulated in float32
    communication_data_type: Literal["fp32", "bf16"] | None = None  # of gradient reduction; default: as accumulated
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
