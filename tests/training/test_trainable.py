"""A run that trains only some parameters is exact in every layout; frozen ones cost nothing and keep their bits."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moe_dist.config.recipe import Config
from moe_dist.core.errors import UserError
from moe_dist.model.block import Block
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.trainable import freeze_others
from tests.support.distributed import run_ranks
from tests.support.long import REPEATED
from tests.support.toy_model import VOCABULARY, make_config, objective, sgd
from tests.support.trajectory import Trajectory, full_parameters, step_inputs, train
from tests.training.test_exactness import CLIP, FLOAT32, GROUPS, MOMA, TOP_K, build

ROUTERS, EXPERT_STACKS = ("layers.*.ffn.router.*",), ("layers.*.ffn.experts.*",)
DENSE = ("layers.*.attention.*", "norm.weight")
ONE_MATRIX = ("layers.1.ffn.experts.down",)
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.3}}}


def recipe(trainable, *, router=TOP_K, world=1, expert=1, stage=1, recompute=False, **section) -> Config:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = make_config(
        router=router,
        expert=expert,
        groups=GROUPS,
        micro=GROUPS // world // 2,
        trainable=trainable,
        deepspeed=sgd(clip=CLIP, lr=0.3) | {"zero_optimization": zero} | section,
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"recompute": recompute})})


def is_trained(name: str, trainable: tuple[str, ...]) -> bool:
    """Match a name without the code under test. All patterns here are `head*` or `head*middle*`."""
    name = name.partition("[")[0]
    for pattern in trainable:
        head, *middle = pattern.split("*")
        if name == pattern or (middle and name.startswith(head) and middle[0] in name[len(head) :]):
            return True
    return False


@cache
def alone(trainable: tuple[str, ...], moma: bool = False) -> Trajectory:
    """Run the recipe in one process."""
    return train(build, recipe(trainable, router=MOMA if moma else TOP_K), 1)


def check(trajectory: Trajectory, expected: Trajectory, trainable: tuple[str, ...]) -> None:
    deviation = trajectory.deviation(expected)
    print("deviation", {name: f"{value:.1e}" for name, value in deviation.items()})
    assert all(deviation[name] <= tolerance for name, tolerance in FLOAT32.items()), f"deviates: {deviation}"
    moved = {name: distance for name, distance in trajectory.moved.items() if is_trained(name, trainable)}
    strayed = [name for name in trajectory.moved.keys() - moved.keys() if trajectory.moved[name] > 0.0]
    assert moved and min(moved.values()) > 1e-3, "a parameter that should train stands still"
    assert not strayed, f"frozen parameters moved: {strayed}"
    assert max(trajectory.losses) - min(trajectory.losses) > 1e-3


@pytest.mark.parametrize(
    ("trainable", "stage"),
    [
        (ROUTERS, 3),
        (EXPERT_STACKS, 1),
        (EXPERT_STACKS, 3),
        (ONE_MATRIX, 2),
        pytest.param(ROUTERS, 1, marks=pytest.mark.slow),
        pytest.param(ROUTERS, 2, marks=pytest.mark.slow),
        pytest.param(EXPERT_STACKS, 2, marks=pytest.mark.slow),
        pytest.param(ONE_MATRIX, 1, marks=pytest.mark.slow),
        pytest.param(ONE_MATRIX, 3, marks=pytest.mark.slow),
        *(
            pytest.param(patterns, stage, marks=pytest.mark.slow if stage in kept else REPEATED)
            for patterns, kept in ((DENSE, (1, 3)), ((*ROUTERS, "layers.0.ffn.experts.gate_up"), (2, 3)))
            for stage in (1, 2, 3)
        ),
    ],
)
def test_two_ranks_equal_one_process(trainable, stage):
    """The cases have no expert group, no dense group, or both groups in the optimizer."""
    expected = alone(trainable)
    check(train(build, recipe(trainable, world=2, expert=2, stage=stage), 2, follow=expected), expected, trainable)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "expert", "stage"),
    [(4, 2, 3), (2, 1, 2), *(pytest.param(*at, marks=REPEATED) for at in ((4, 2, 1), (4, 2, 2), (2, 1, 1), (2, 1, 3)))],
)
def test_other_layouts_and_routers(world, expert, stage):
    config, expected = recipe(ROUTERS, router=MOMA, world=world, expert=expert, stage=stage), alone(ROUTERS, moma=True)
    check(train(build, config, world, follow=expected), expected, ROUTERS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputation_changes_nothing(stage):
    config, expected = recipe(ROUTERS, world=2, expert=2, stage=stage, recompute=True), alone(ROUTERS)
    check(train(build, config, 2, follow=expected), expected, ROUTERS)


# --- nothing is spent on what is frozen


def _steps(rank, config):
    """Return (forward passes of each block per step, elements of optimizer state, frozen parameters that changed)."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    engine = make_engine(build(config, layout), config, layout)
    blocks = [module for module in engine.module.modules() if isinstance(module, Block)]
    passes = [0] * len(blocks)

    def count(block, *_):
        passes[blocks.index(block)] += 1

    before = full_parameters(engine)
    for block in blocks:
        block.register_forward_pre_hook(count)
    for step in range(2):
        result = engine.train_step(step_inputs(step, layout, config), objective, 0.1)
        assert not result.skipped
    held = sum(
        value.numel() for state in engine.optimizer.optimizer.state.values() for value in state.values() if value.dim()
    )
    after = full_parameters(engine)
    return passes, held, [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("stage", [1, 3])
def test_layers_below_the_lowest_trainable_one_have_no_backward_pass(stage):
    """Recomputation shows it: if the backward pass of a block runs, its forward pass runs twice."""
    config = recipe(("layers.1.ffn.router.*",), world=2, expert=2, stage=stage, recompute=True, **ADAM)
    for passes, _, changed in run_ranks(_steps, 2, config):
        micro_batches = 2 * 2
        assert passes == [micro_batches, 2 * micro_batches]
        assert changed == ["layers.1.ffn.router.gate.weight"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizer_holds_nothing_of_frozen_parameters(stage):
    results = run_ranks(_steps, 2, recipe(ONE_MATRIX, world=2, expert=2, stage=stage, **ADAM))
    trained = 2 * sum(value.numel() for value in _model().layers[1].ffn.experts.down)  # two moments of every element
    assert sum(held for _, held, _ in results) == trained
    assert all(all(name.startswith("layers.1.ffn.experts.down[") for name in names) for _, _, names in results)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_bf16_weights_keep_their_bits(stage):
    config = recipe(ROUTERS, world=2, expert=2, stage=stage, bf16={"enabled": True}, **ADAM)
    for _, _, changed in run_ranks(_steps, 2, config):
        assert changed == [f"layers.{layer}.ffn.router.gate.weight" for layer in range(2)]


# --- patterns


def _model() -> Transformer:
    config = recipe(("*",))
    return Transformer(config.model, VOCABULARY, Layout(), seed=3)


@pytest.mark.parametrize(
    ("patterns", "number"),
    [(("*",), 25), (("norm.weight",), 1), (("layers.1.*",), 11), (("*.router.*", "*.down"), 4), (("*norm*",), 13)],
)
def test_patterns_match_whole_names(patterns, number):
    model = _model()
    freeze_others(model, patterns)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == number


def test_what_a_module_keeps_frozen_stays_frozen():
    model = _model()
    model.layers[0].ffn.experts.requires_grad_(False)
    freeze_others(model, ["*.experts.*"])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        f"layers.1.ffn.experts.{key}" for key in ("gate_up", "down")
    ]
    with pytest.raises(UserError, match=r"trainable: 'layers\.0\.ffn\.experts\.\*' matches no parameter that the"):
        freeze_others(model, ["layers.0.ffn.experts.*"])


@pytest.mark.parametrize("pattern", ["*.ruoter.*", "router", "layers.0", "layers.[01].*", "layers.?.ffn.experts.down"])
def test_a_pattern_that_matches_nothing_is_named(pattern):
    with pytest.raises(UserError) as caught:
        freeze_others(_model(), ["norm.weight", pattern])
    assert str(caught.value).startswith(f"trainable: '{pattern}' matches no parameter that the model can train")


def _refused(rank, config):
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    try:
        make_engine(build(config, layout), config, layout)
    except UserError as error:
        return str(error)
    return None


def test_every_rank_ends_with_the_sentence():
    sentence = (
        "trainable: 'layers.1.ffn.ruoter.*' matches no parameter that the model can train "
        "(the closest is 'layers.1.ffn.router.gate.weight')"
    )
    sentences = run_ranks(_refused, 2, recipe(("layers.1.ffn.ruoter.*",), world=2, expert=2))
    assert sentences == [sentence] * 2


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="key 'trainable': "):
        recipe(())
