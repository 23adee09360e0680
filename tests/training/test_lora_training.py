"""LoRA experts and attention LoRA under ZeRO, as LLaVA-MoLE trains them: dropout on, deltas and routers trainable only.

Whether the experts are replicated or spread over expert-parallel ranks changes nothing, and the base keeps its bits.
"""

from __future__ import annotations

from functools import cache

import pytest

from moe_dist.config.model_section import LoRAExpertsConfig, LoRASection, ModelConfig
from moe_dist.config.recipe import Config
from moe_dist.core.seeding import seeded_normal_
from moe_dist.core.strict import validate
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.checkpoint_jobs import Job, assert_same, run
from tests.support.long import REPEATED
from tests.support.toy_model import EXPERTS, VOCABULARY, make_config, sgd
from tests.support.trajectory import Trajectory, train
from tests.training.test_exactness import BF16, BFLOAT16, CLIP, FLOAT32, GROUPS

ROUTER = {"type": "top_k", "num_experts": EXPERTS, "top_k": 1, "bias": True}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2}
TRAINABLE = ("*.lora.*", "*.router.*")


def recipe(
    *, weighting="straight_through", world=1, expert=1, accumulation=2, stage=1, recompute=False, **section
) -> Config:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = make_config(
        router=ROUTER | {"weighting": weighting},
        expert=expert,
        groups=GROUPS,
        micro=GROUPS // world // accumulation,
        trainable=TRAINABLE,
        deepspeed=sgd(clip=CLIP, lr=0.1) | {"zero_optimization": zero} | section,
    )
    ffn = config.model.ffn.model_copy(update={"experts": LoRAExpertsConfig(type="lora", **LORA)})
    changes = {"ffn": ffn, "lora": LoRASection(**LORA), "recompute": recompute}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def build(config: Config, layout: Layout) -> Transformer:
    """Build a model with random B, because A has no gradient if B is zero.

    Deltas twice as large would amplify float32's rounding a hundredfold over the eight steps.
    """
    model = Transformer(config.model, VOCABULARY, layout, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            seeded_normal_(parameter, seed=3, name=name, std=0.15)
    return model


@cache
def alone(weighting: str = "straight_through") -> Trajectory:
    return train(build, recipe(weighting=weighting), 1)


def check(trajectory: Trajectory, expected: Trajectory, tolerances: dict[str, float] = FLOAT32) -> None:
    deviation = trajectory.deviation(expected)
    print("deviation", {name: f"{value:.1e}" for name, value in deviation.items()})
    assert all(deviation[name] <= tolerance for name, tolerance in tolerances.items()), f"deviates: {deviation}"
    trained = {name: distance for name, distance in trajectory.moved.items() if ".lora." in name or "router" in name}
    frozen = {name: distance for name, distance in trajectory.moved.items() if name not in trained}
    assert len(trained) == 2 * (6 * EXPERTS + 8 + 2)
    assert min(trained.values()) > 1e-3, "a delta or a router stands still"
    assert not [name for name, distance in frozen.items() if distance > 0], "a frozen parameter moved"
    assert sum(".base." in name for name in frozen) == 4 and sum("linear" in name for name in frozen) == 4
    assert max(trajectory.losses) - min(trajectory.losses) > 0.1


@pytest.mark.parametrize(
    ("world", "expert", "stage"),
    [
        (2, 1, 2),
        (2, 2, 3),
        *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2, 1), (4, 2, 3), (4, 4, 2))),
        *(pytest.param(*layout, marks=REPEATED) for layout in ((2, 1, 1), (2, 2, 2), (2, 1, 3), (4, 2, 1))),
    ],
)
def test_replicated_and_spread_experts_equal_one_process(world, expert, stage):
    check(train(build, recipe(world=world, expert=expert, stage=stage), world, follow=alone()), alone())


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "stage"), [pytest.param(1, 1, marks=REPEATED), (2, 3)])
def test_weighted_deltas_too(expert, stage):
    config, expected = recipe(weighting="score", world=2, expert=expert, stage=stage), alone("score")
    check(train(build, config, 2, follow=expected), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "stage"), [(1, 2), pytest.param(2, 1, marks=REPEATED), (2, 3)])
def test_bf16(expert, stage):
    """With few trained parameters, bfloat16 rounding errors average out less, so norms agree only to 1e-3."""
    expected = train(build, recipe(accumulation=4, **BF16), 1)
    config = recipe(world=2, expert=expert, stage=stage, **BF16)
    trajectory = train(build, config, 2, follow=expected, guide=expected)
    check(trajectory, expected, BFLOAT16 | {"norm": 2e-3})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputation_and_accumulation_change_nothing(stage):
    """This includes dropout: a recomputed block draws the same masks."""
    recomputed = recipe(world=2, expert=2, stage=stage, recompute=True)
    check(train(build, recomputed, 2, follow=alone()), alone())
    check(train(build, recipe(accumulation=8, stage=stage), 1, follow=alone()), alone())


def test_dropout_matters_here():
    config = recipe()
    experts = config.model.ffn.experts.model_copy(update={"dropout": 0.0})
    ffn = config.model.ffn.model_copy(update={"experts": experts})
    config = config.model_copy(update={"model": config.model.model_copy(update={"ffn": ffn})})
    with pytest.raises(AssertionError, match="deviates"):
        check(train(build, config, 1), alone())


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_resume_is_bitwise_and_at_another_layout_exact(stage, tmp_path):
    """Base, deltas and their moments are stored; the masks after the resume are those of the uninterrupted run."""
    model = recipe().model
    job = Job(model=model, trainable=TRAINABLE, stage=stage, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert_same(rest.at_save, whole.at_save)
    assert_same(rest.at_end, whole.at_end)
    frozen = [name for name in whole.at_save if name.startswith("working") and ".base." in name]
    assert len(frozen) == 4 and not any(name.replace("working", "master", 1) in whole.at_save for name in frozen)
    other = run(job.resumed(world=1, expert=1, stage=4 - stage), follow=whole)
    assert_same(other.at_save, whole.at_save)
    assert other.losses == pytest.approx(whole.losses[2:], rel=1e-5)


# --- LoRA on every weight of a model with a dense layer, experts and a shared expert


def everywhere(*, world=1, expert=1, accumulation=2, stage=1, recompute=False, **section) -> Config:
    """Train the deltas alone, which is the default of a recipe with model.lora."""
    config = recipe(world=world, expert=expert, accumulation=accumulation, stage=stage, **section)
    changes = {
        "ffn": {
            "type": "moe",
            "hidden_size": 16,
            "shared_expert": {"hidden_size": 24, "gate": True},
            "router": ROUTER | {"top_k": 2, "renormalize": True},
        },
        "layers": {"0": {"ffn": {"type": "dense", "hidden_size": 24}}},
        "lora": LORA | {"targets": ["*"]},
        "recompute": recompute,
    }
    model = validate(ModelConfig, config.model.model_dump(mode="json") | changes, "test")
    return config.model_copy(update={"model": model, "trainable": ("*.lora.*",)})


@cache
def everywhere_alone() -> Trajectory:
    return train(build, everywhere(), 1)


@pytest.mark.parametrize(
    ("world", "expert", "stage"),
    [
        (2, 2, 1),
        (2, 1, 3),
        *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2, 2), (2, 2, 3), (4, 2, 3))),
        *(pytest.param(*layout, marks=REPEATED) for layout in ((2, 1, 1), (2, 1, 2), (4, 2, 1))),
    ],
)
def test_lora_on_every_weight_equals_one_process(world, expert, stage):
    expected = everywhere_alone()
    trajectory = train(build, everywhere(world=world, expert=expert, stage=stage), world, follow=expected)
    deviation = trajectory.deviation(expected)
    print("deviation", {name: f"{value:.1e}" for name, value in deviation.items()})
    assert all(deviation[name] <= tolerance for name, tolerance in FLOAT32.items()), f"deviates: {deviation}"
    trained = {name: distance for name, distance in trajectory.moved.items() if ".lora." in name}
    frozen = {name: distance for name, distance in trajectory.moved.items() if name not in trained}
    assert len(trained) == 2 * (2 * 4 + 3 + 3 * EXPERTS + 3 + 1), "two for each delta"
    assert min(trained.values()) > 1e-3, min(trained, key=trained.get)
    assert not any(frozen.values()) and max(trajectory.losses) - min(trajectory.losses) > 0.1


@pytest.mark.slow
def test_lora_on_every_weight_recomputed_and_in_bf16():
    expected = everywhere_alone()
    recomputed = train(build, everywhere(world=2, expert=2, recompute=True), 2, follow=expected)
    assert all(recomputed.deviation(expected)[name] <= tolerance for name, tolerance in FLOAT32.items())
    rounded = train(build, everywhere(accumulation=4, **BF16), 1)
    spread = train(build, everywhere(world=2, expert=2, stage=3, **BF16), 2, follow=rounded, guide=rounded)
    deviation = spread.deviation(rounded)
    assert all(deviation[name] <= bound for name, bound in (BFLOAT16 | {"norm": 2e-3}).items()), deviation


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_lora_on_every_weight_is_stored_and_resumed(stage, tmp_path):
    save = str(tmp_path / "step_00000002")
    job = Job(model=everywhere().model, trainable=("*.lora.*",), stage=stage, stop=4, save=save, save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert_same(rest.at_end, whole.at_end)
    working = {name.removeprefix("working ") for name in whole.at_save if name.startswith("working")}
    frozen = {name for name in working if f"master {name}" not in whole.at_save}
    assert {f"layers.1.ffn.experts.{name} of 3" for name in ("gate_up", "down")} < frozen
    assert "layers.1.ffn.experts.lora.down.b of 3" in working - frozen
    other = run(job.resumed(world=1, expert=1, stage=4 - stage), follow=whole)
    assert_same(other.at_save, whole.at_save)
    assert other.losses == pytest.approx(whole.losses[2:], rel=1e-5)
