"""The deepspeed section: accepted keys, refusals and their sentences, and DeepSpeed knows every key that is passed."""

import pytest

from moe_dist.config.deepspeed_section import OWNED, REFUSED_ZERO, BF16Section, DeepSpeedSection, Offload, ZeroSection
from moe_dist.config.recipe import TrainConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.training.deepspeed_config import accumulation_steps, to_deepspeed

ADAM = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "weight_decay": 0.1}}


def section(**more):
    return {"optimizer": ADAM} | more


def check(raw) -> DeepSpeedSection:
    return validate(DeepSpeedSection, raw, "recipe", "deepspeed")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            section(gradient_cliping=0.3),
            r"unknown key 'deepspeed.gradient_cliping' \(did you mean 'gradient_clipping'\?\)",
        ),
        (section(bf16={"enable": True}), r"'deepspeed.bf16.enable' \(did you mean 'enabled'\?\)"),
        (section(zero_optimization={"stag": 2}), r"'deepspeed.zero_optimization.stag' \(did you mean 'stage'\?\)"),
        (
            section(zero_optimization={"stage": 1, "offload_optimizer": {"devise": "cpu"}}),
            r"'deepspeed.zero_optimization.offload_optimizer.devise'",
        ),
        (section(zero_optimization={"offload_optimizer": {"device": "nvme"}}), r"offload_optimizer.device'.*'nvme'"),
        (
            section(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}),
            r"zero_optimization': offload_param needs stage 3",
        ),
        (section(zero_optimization={"stage": 0}), r"stage 0 has no true global gradient norm"),
        (section(zero_optimization={"stage": 4}), r"'deepspeed.zero_optimization.stage'"),
        (section(zero_optimization=3), r"'deepspeed.zero_optimization'"),
        (section(zero_optimization={"round_robin_gradients": False}), r"round_robin_gradients' is refused"),
        (section(train_batch_size=8), r"'deepspeed.train_batch_size'.*train.global_batch_groups"),
        (section(scheduler={"type": "WarmupLR"}), r"'deepspeed.scheduler'.*schedule section"),
        (section(fp16={"enabled": True}), r"'deepspeed.fp16'.*bf16.enabled"),
        (section(gradient_clipping=-1), r"'deepspeed.gradient_clipping'"),
        (section(gradient_clipping="1.0"), r"'deepspeed.gradient_clipping'"),
        ({}, r"key 'deepspeed.optimizer' is missing"),
        ({"optimizer": {"params": {}}}, r"key 'deepspeed.optimizer.type' is missing"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decy": 0.1}}}, r"weight_decy'"),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, r"betas'"),
        (
            {"optimizer": {"type": "Lamb", "params": {}}},
            r"'deepspeed.optimizer.type': there is no 'Lamb'",
        ),
    ],
)
def test_a_bad_key_or_value_is_named(raw, sentence):
    with pytest.raises(UserError, match=sentence):
        check(raw)


def test_defaults_and_sizes():
    checked = check(section(zero_optimization={"stage": 2, "reduce_bucket_size": 5e8}))
    assert checked.gradient_clipping == 1.0
    assert checked.zero_optimization.reduce_bucket_size == 500_000_000
    assert checked.optimizer.params.betas == (0.9, 0.95)
    assert check(section()).zero_optimization.stage == 1


def test_deepspeed_knows_every_key_that_we_take_or_pass():
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    def keys(model):
        return set(model.model_fields) | {field.alias for field in model.model_fields.values()}

    assert set(ZeroSection.model_fields) <= keys(DeepSpeedZeroConfig)
    assert set(REFUSED_ZERO) <= keys(DeepSpeedZeroConfig)
    assert set(Offload.model_fields) <= keys(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(BF16Section.model_fields) <= keys(DeepSpeedBF16Config)
    raw = section(bf16={"enabled": True}, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 7})
    config = DeepSpeedConfig(to_deepspeed(check(raw), accumulation=3, num_parameters=1000))
    assert config.gradient_accumulation_steps == 3
    assert config.gradient_clipping == 1.0
    assert config.bfloat16_config.enabled
    assert config.grad_accum_dtype == "fp32"
    assert config.zero_config.param_persistence_threshold == 7
    assert config.zero_config.reduce_bucket_size == 1000
    assert not config.timers_config.enabled


def test_no_key_is_both_taken_and_refused():
    assert not set(OWNED) & set(check(section()).model_dump())
    assert not set(REFUSED_ZERO) & set(ZeroSection.model_fields)


def test_accumulation_follows_from_the_batch():
    train = TrainConfig(steps=1, global_batch_groups=24, micro_batch_groups=3)
    assert [accumulation_steps(train, dp) for dp in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UserError, match=r"global_batch_groups=24 is not a multiple of 9 \(3 ranks times"):
        accumulation_steps(train, 3)
