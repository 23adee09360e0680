"""Exact parallelism: no layout of the same run changes losses, gradient norms or final parameters.

The real Transformer with SGD (Adam would hide a wrong gradient scale), momentum, and clipping active in every step,
against one process without accumulation; that one process equals plain torch (test_zero.py). Faults that are planted on
purpose must be caught by the same comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch

from moe_dist.config.model_section import DenseFFN, DepthConfig, LayerConfig, SharedExpertConfig
from moe_dist.config.recipe import Config
from moe_dist.config.rope_scaling import YarnScaling
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.long import REPEATED
from tests.support.selections import LOGITS
from tests.support.toy_model import (
    MOMA,
    TOP_K,
    VOCABULARY,
    CrossEntropy,
    loss_count,
    make_config,
    objective,
    sgd,
    step_batches,
)
from tests.support.trajectory import Trajectory, assert_can_fail, train

CLIP = 0.5
GROUPS = 16  # selection groups of the global batch
ROUTERS = {"top_k": TOP_K, "moma": MOMA}
NOISY = {"noisy": MOMA | {name: MOMA[name] | {"gumbel_noise": True} for name in ("text", "image")}}
SLICED = {  # seven experts of text, one of images
    "7t1i": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 7},
        "image": {"type": "expert_choice", "num_experts": 1},
    }
}
BF16 = {"bf16": {"enabled": True}}
# The loss moves 0.9 at least: 90,000 times as far.
FLOAT32 = {"loss": 1e-5, "norm": 1e-5, "parameters": 1e-5, "update": 1e-4, "logits": LOGITS}
# bfloat16 takes steps of 4e-3: an update that differs in its last bit soon moves a token to another expert. So every
# step starts from the reference's weights, and losses agree as in float32. Gradients are rounded to bfloat16 and summed
# in another order at stage 3: norms, in which many roundings meet, come within 6e-4 (the loss moves 1,000 times the
# tolerance as well), the update of the least parameter (the bias of a norm over 8 keys) within 6e-2.
BFLOAT16 = {"loss": 1e-5, "norm": 9e-4, "update": 8e-2, "logits": LOGITS}


def build(config: Config, layout: Layout) -> Transformer:
    return Transformer(config.model, VOCABULARY, layout, seed=3)


def recipe(
    router: str,
    *,
    world: int = 1,
    expert: int = 1,
    accumulation: int = 1,
    stage: int = 1,
    zero: dict | None = None,
    **section,
) -> Config:
    """Make a recipe. All layouts share the global batch of GROUPS, and stage 3 partitions even small parameters."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}) | (zero or {})
    deepspeed = sgd(clip=CLIP) | {"zero_optimization": zero} | section
    micro = GROUPS // world // accumulation
    routers = ROUTERS | NOISY | SLICED
    return make_config(router=routers[router], expert=expert, groups=GROUPS, micro=micro, deepspeed=deepspeed)


@cache
def reference(router: str, bf16: bool = False) -> Trajectory:
    """Run one process with one micro-batch, or in bf16 with four, because long bf16 sums on CPU lose small terms."""
    return train(build, recipe(router, accumulation=4, **BF16) if bf16 else recipe(router), 1)


def assert_same(
    trajectory: Trajectory, expected: Trajectory, tolerances: dict[str, float], loss_moves: float = 0.9
) -> None:
    deviation = trajectory.deviation(expected)
    print("deviation", {name: f"{value:.1e}" for name, value in deviation.items()})
    exceeded = {name: deviation[name] for name, tolerance in tolerances.items() if not deviation[name] <= tolerance}
    assert not exceeded, f"deviates: {exceeded}"
    assert_can_fail(trajectory, clip=CLIP, loss_moves=loss_moves)


LAYOUTS = {  # world, expert, accumulation
    "ep2-accumulating": (2, 2, 4),
    "ep2": (2, 2, 1),
    "alone-accumulating": (1, 1, 4),
    "dp2": (2, 1, 1),
    "dp2-accumulating": (2, 1, 4),
    "ep2-on-4": (4, 2, 1),
    "ep2-on-4-accumulating": (4, 2, 4),
}


def cases(layouts: Iterable[str], whole: str) -> list[Any]:
    """Layouts x routers x ZeRO stages: one layout at every stage, the others at one stage each, and a router at another
    than the next; the rest is repetition."""
    return [
        pytest.param(
            layout,
            router,
            stage,
            id=f"{layout}-{router}-{stage}",
            marks=() if layout == whole or stage == 1 + (place + number) % 3 else REPEATED,
        )
        for place, layout in enumerate(layouts)
        for number, router in enumerate(ROUTERS)
        for stage in (1, 2, 3)
    ]


def slow(cases: list[Any], fast: Callable[..., bool]) -> list[Any]:
    """Mark cases slow, except those for which `fast` is true."""
    return [
        case if fast(*case.values) else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        for case in cases
    ]


@pytest.mark.parametrize(
    ("layout", "router", "stage"),
    slow(cases(LAYOUTS, "ep2-accumulating"), lambda layout, _, stage: layout == "ep2-accumulating" and stage != 2),
)
def test_float32(layout, router, stage):
    world, expert, accumulation = LAYOUTS[layout]
    config = recipe(router, world=world, expert=expert, accumulation=accumulation, stage=stage)
    expected = reference(router)
    assert_same(train(build, config, world, follow=expected), expected, FLOAT32)


def test_gumbel_noise_is_the_same_on_every_layout():
    """The noise is seeded by token, so it does not depend on the ranks. It does change the result."""
    alone = train(build, recipe("noisy"), 1, steps=3)
    spread = train(build, recipe("noisy", world=2, expert=2), 2, steps=3, follow=alone)
    deviation = spread.deviation(alone)
    assert all(deviation[name] <= tolerance for name, tolerance in FLOAT32.items()), deviation
    assert min(alone.moved.values()) > 1e-5 and min(alone.norms) > CLIP
    assert alone.deviation(train(build, recipe("moma"), 1, steps=3))["parameters"] > 0.01


BF16_LAYOUTS = ("alone", "ep2", "ep2-accumulating", "dp2-accumulating", "ep2-on-4", "ep2-on-4-accumulating")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "router", "stage"), cases(BF16_LAYOUTS, "ep2"))
def test_bf16(layout, router, stage):
    world, expert, accumulation = LAYOUTS.get(layout, (1, 1, 1))
    config = recipe(router, world=world, expert=expert, accumulation=accumulation, stage=stage, **BF16)
    expected = reference(router, bf16=True)
    assert_same(train(build, config, world, follow=expected, guide=expected), expected, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("expert", [pytest.param(1, marks=REPEATED), 2])
@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"offload_optimizer": {"device": "cpu"}}),
        (2, {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}),
        (3, {"offload_optimizer": {"device": "cpu"}}),
        (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (3, {"stage3_param_persistence_threshold": 100_000}),
        (3, {"reduce_bucket_size": 1000, "sub_group_size": 1000}),
        (3, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else f"zero{value}",
)
def test_ways_of_storing_change_nothing(stage, zero, expert):
    config = recipe("moma", world=2, expert=expert, accumulation=2, stage=stage, zero=zero)
    expected = reference("moma")
    assert_same(train(build, config, 2, follow=expected), expected, FLOAT32)


def overlapping(engine, layout):
    """Fail unless DeepSpeed reduces gradients during the backward pass, in more than one bucket."""
    zero = engine.optimizer
    assert getattr(zero, "overlap_comm", engine.zero_stage == 3)
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    assert elements > 2 * zero.reduce_bucket_size
    return objective


COMMUNICATION = [  # expert, stage
    pytest.param(1, 1, marks=pytest.mark.slow),
    pytest.param(1, 2, marks=pytest.mark.slow),
    (1, 3),
    (2, 1),
    (2, 2),
    pytest.param(2, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("expert", "stage"), COMMUNICATION)
def test_overlapped_reduction_changes_no_bit(expert, stage):
    """On a CPU nothing overlaps in time, but the order of the reductions and the alternating buckets are the same."""
    runs = {}
    for overlap in (True, False):
        zero = {"overlap_comm": overlap, "reduce_bucket_size": 1000}
        config = recipe("moma", world=2, expert=expert, accumulation=2, stage=stage, zero=zero)
        runs[overlap] = train(build, config, 2, plant=overlapping if overlap else None, follow=reference("moma"))
    assert_same(runs[True], reference("moma"), FLOAT32)
    assert not any(runs[True].deviation(runs[False]).values())


# Every gradient is rounded to bfloat16 once on each rank, and their sum once more: by 2e-3 of its size each time.
LOW_PRECISION = {"loss": 1e-5, "norm": 2e-3, "update": 8e-3, "logits": LOGITS}


@pytest.mark.parametrize(("expert", "stage"), COMMUNICATION)
def test_bf16_communication_rounds_gradients_and_nothing_else(expert, stage):
    """Every step starts from the reference's weights. The updates differ by far more than in float32."""
    config = recipe("moma", world=2, expert=expert, accumulation=2, stage=stage, communication_data_type="bf16")
    expected = reference("moma")
    trajectory = train(build, config, 2, follow=expected, guide=expected)
    assert_same(trajectory, expected, LOW_PRECISION)
    assert trajectory.deviation(expected)["update"] > 10 * FLOAT32["update"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputation_changes_nothing(stage):
    config = recipe("moma", world=2, expert=2, accumulation=2, stage=stage)
    config = config.model_copy(update={"model": config.model.model_copy(update={"recompute": True})})
    expected = reference("moma")
    assert_same(train(build, config, 2, follow=expected), expected, FLOAT32)


LLAMA = {"num_heads": 4, "num_query_groups": 2, "norm": "pre", "qk_norm": "none", "tie_embeddings": True}


@cache
def llama_reference() -> Trajectory:
    return train(build, _llama(recipe("top_k")), 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tied_embeddings_and_grouped_queries(stage, recompute):
    """ZeRO sees the shared matrix once, though two modules use it."""
    config = _llama(recipe("top_k", world=2, expert=2, accumulation=2, stage=stage), recompute=recompute)
    trajectory = train(build, config, 2, follow=llama_reference())
    assert "output.weight" not in trajectory.masters[-1]
    assert_same(trajectory, llama_reference(), FLOAT32, loss_moves=0.6)


def _llama(config: Config, **changes) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=LLAMA | changes)})


PRETRAINED = {  # settings of several pretrained models at once
    "num_heads": 4,
    "num_query_groups": 2,
    "norm": "pre",
    "qk_norm": "rms_norm_full",
    "attention_bias": "all",
    "clip_qkv": 2.5,
    "sliding_window": 3,
    "rope_scaling": YarnScaling(type="yarn", factor=4.0, original_max_position_embeddings=8),
    "layers": {"0": LayerConfig(ffn=DenseFFN(type="dense", hidden_size=24, bias=True), sliding_window=0)},
}


@cache
def pretrained_reference() -> Trajectory:
    return train(build, _pretrained(recipe("top_k")), 1)


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 2), (2, 1), (3, 2)])
def test_settings_of_pretrained_models(stage, accumulation):
    """Biases, norms, windows, a scaled rotary embedding, a dense first layer, a shared expert with a gate."""
    config = _pretrained(recipe("top_k", world=2, expert=2, accumulation=accumulation, stage=stage))
    expected = pretrained_reference()
    trajectory = train(build, config, 2, follow=expected, guide=expected)
    assert_same(trajectory, expected, FLOAT32, loss_moves=0.3)
    new = ("attention.core.linear_proj.bias", "attention.core.k_layernorm.weight", "ffn.shared_expert.gate.weight")
    assert all(trajectory.moved[f"layers.1.{name}"] > 1e-3 for name in new)
    assert trajectory.moved["layers.0.ffn.gate_up.bias"] > 1e-3


def _pretrained(config: Config) -> Config:
    shared = SharedExpertConfig(hidden_size=8, gate=True)
    ffn = config.model.ffn.model_copy(update={"shared_expert": shared})
    return config.model_copy(update={"model": config.model.model_copy(update=PRETRAINED | {"ffn": ffn})})


@cache
def depth_reference(scope: str) -> Trajectory:
    return train(build, _with_depth(recipe("moma"), scope), 1)


@pytest.mark.parametrize(
    ("scope", "world", "expert", "accumulation", "stage", "recompute"),
    [
        ("group", 2, 2, 4, 1, False),
        pytest.param("group", 2, 1, 2, 2, True, marks=pytest.mark.slow),
        pytest.param("modality", 2, 2, 1, 3, True, marks=pytest.mark.slow),
        pytest.param("sequence", 4, 2, 2, 1, False, marks=pytest.mark.slow),
    ],
)
def test_mixture_of_depths(scope, world, expert, accumulation, stage, recompute):
    """Every fourth selection group has no image, and padding differs. Every step starts from the reference's weights:
    float32's rounding may grow to 1.5e-4 of an update over eight steps."""
    config = _with_depth(recipe("moma", world=world, expert=expert, accumulation=accumulation, stage=stage), scope)
    config = config.model_copy(update={"model": config.model.model_copy(update={"recompute": recompute})})
    expected = depth_reference(scope)
    trajectory = train(build, config, world, follow=expected, guide=expected)
    assert_same(trajectory, expected, FLOAT32, loss_moves=0.3)
    assert trajectory.moved["depth.0.router.gate.weight"] > 1e-3


@cache
def sliced_reference() -> Trajectory:
    return train(build, _sliced(recipe("7t1i")), 1)


@pytest.mark.parametrize(
    ("world", "expert", "accumulation", "stage"),
    [(2, 2, 1, 1), pytest.param(2, 2, 4, 3, marks=pytest.mark.slow), pytest.param(4, 2, 2, 2, marks=pytest.mark.slow)],
)
def test_experts_in_slices(world, expert, accumulation, stage):
    """7t1i with mixture-of-depths, every expert in two slices. Pre-norm: after Swin's norm of what one expert alone
    returns, its gate would have no gradient."""
    config = _sliced(recipe("7t1i", world=world, expert=expert, accumulation=accumulation, stage=stage))
    expected = sliced_reference()
    trajectory = train(build, config, world, follow=expected, guide=expected)
    assert_same(trajectory, expected, FLOAT32, loss_moves=0.3)
    assert {f"layers.1.ffn.experts.down[{number}]" for number in range(16)} < set(trajectory.masters[0])


def _sliced(config: Config) -> Config:
    config = _with_depth(config, "modality")
    ffn = config.model.ffn.model_copy(update={"slices": 2})
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn": ffn, "norm": "pre"})})


def _with_depth(config: Config, scope: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"depth": DepthConfig(scope=scope)})})


# --- faults, planted in a layout that is exact without them


def expert_gradients_times_ep(engine, layout):
    for parameter in engine.module.parameters():
        if hasattr(parameter, "expert_ids"):
            parameter.register_hook(lambda gradient: gradient * layout.expert)
    return objective


def build_with_missing_reduction(config, layout):
    """Treat a shared norm as an expert's parameter, so its gradient is not summed over the expert-parallel ranks."""
    model = build(config, layout)
    model.layers[0].ffn_norm.weight.expert_ids = (layout.ep_rank,)
    return model


def missing_reduction(engine, layout):
    del engine.module.layers[0].ffn_norm.weight.expert_ids
    return objective


def local_norm(engine, layout):
    """Make each rank clip by the norm of its own gradients only."""
    zero = engine.optimizer
    zero.scaled_global_norm = lambda: torch.cat(
        [g.flatten() for gs in zero.averaged_gradients.values() for g in gs]
    ).norm()
    return objective


def mean_of_the_ranks_means(engine, layout):
    totals = cycle(loss_count(step_batches(step, 0, 1, groups=GROUPS, micro=GROUPS)[0]) for step in range(2))

    class LocalMean(CrossEntropy):
        def __call__(self, output, batch, counts):
            result = super().__call__(output, batch, counts)
            return replace(result, loss=result.loss * next(totals) / (layout.world * loss_count(batch)))

    return LocalMean()


FAULTS = {  # and what they show in
    expert_gradients_times_ep: "deviates: .*'norm'",
    missing_reduction: "deviates: .*'update'",
    local_norm: "ranks report different figures",
    mean_of_the_ranks_means: "deviates: .*'norm'",
}


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_caught(plant, router, bf16):
    """The layout is that of test_float32[ep2] and test_bf16[ep2], which are exact without the fault."""
    builder = build_with_missing_reduction if plant is missing_reduction else build
    config, expected = recipe(router, world=2, expert=2, **(BF16 if bf16 else {})), reference(router, bf16)
    with pytest.raises(AssertionError, match=FAULTS[plant]):
        trajectory = train(builder, config, 2, plant=plant, follow=expected, guide=expected if bf16 else None)
        assert_same(trajectory, expected, BFLOAT16 if bf16 else FLOAT32)
