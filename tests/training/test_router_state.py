"""A router with state: DeepSeek-V3's bias follows the load of the global batch, exactly at every layout."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from moe_dist.checkpoint.stored_weights import fill_model
from moe_dist.config.recipe import Config, InitFrom
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.checkpoint_jobs import CheckpointToy, Job, assert_same, attempt, run
from tests.support.distributed import run_ranks
from tests.support.routing_reference import bias_after
from tests.support.toy_model import TOP_K, VOCABULARY, make_config, objective, sgd, step_batches
from tests.support.trajectory import Trajectory, step_inputs, toy_engine, train
from tests.training import test_exactness as exactness

RATE, LR = 0.02, 0.1
DEEPSEEK = {"type": "deepseek_v3", "num_experts": 8, "top_k": 2, "groups": 4, "top_groups": 2, "bias_rate": RATE}
SMALL = {"type": "deepseek_v3", "num_experts": 4, "top_k": 2, "bias_rate": RATE}  # as many experts as the toy has
IN_TEXT = {"type": "modality", "text": SMALL, "image": {"type": "expert_choice", "num_experts": 4}}
BIAS = "layers.0.ffn.router.bias.value"
GROUPS = 16


def recipe(
    router: dict = DEEPSEEK, *, world: int = 1, expert: int = 1, accumulation: int = 1, stage: int = 1
) -> Config:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    micro = GROUPS // world // accumulation
    deepspeed = sgd(clip=exactness.CLIP) | {"zero_optimization": zero}
    return make_config(router=router, expert=expert, groups=GROUPS, micro=micro, deepspeed=deepspeed)


@cache
def reference() -> Trajectory:
    return train(exactness.build, recipe(), 1)


def test_the_bias_of_one_process_equals_the_oracle():
    """The oracle counts the load over the valid tokens of all groups, some of which end in padding."""
    (found,) = run_ranks(biases_and_loads, 1, recipe(accumulation=4))
    for before_E, load_E, after_E in found:
        assert after_E == pytest.approx(bias_after(before_E, load_E, RATE), abs=1e-7)
    valid = sum(int(batch.info.valid_T.sum()) for batch in step_batches(0, 0, 1, groups=GROUPS))
    padded = sum(batch.info.num_tokens for batch in step_batches(0, 0, 1, groups=GROUPS))
    assert sum(found[0][1]) == 2 * valid < 2 * padded
    assert len({tuple(after_E) for *_, after_E in found}) == len(found)


def biases_and_loads(rank: int, config: Config) -> list[tuple[list[float], list[int], list[float]]]:
    """Return, for three steps, the bias before, the load and the bias after."""
    layout = make_layout(expert=1, device=init_distributed())
    engine = make_engine(Transformer(config.model, VOCABULARY, layout, seed=3), config, layout)
    router, found = engine.module.layers[0].ffn.router, []
    loads: list[Tensor] = []
    router.register_forward_hook(lambda _, inputs, output: loads.append(output[0].counts_E))
    for step in range(3):
        loads.clear()
        before_E = router.bias.value.tolist()
        engine.train_step(step_inputs(step, layout, config), objective, LR)
        found.append((before_E, torch.stack(loads).sum(0).tolist(), router.bias.value.tolist()))
    return found


@pytest.mark.parametrize(
    ("world", "expert", "accumulation", "stage"),
    [
        (2, 2, 4, 1),
        pytest.param(1, 1, 4, 3, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, 4, 3, marks=pytest.mark.slow),
        pytest.param(4, 2, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_every_layout_moves_the_same_bias(world, expert, accumulation, stage):
    config = recipe(world=world, expert=expert, accumulation=accumulation, stage=stage)
    trajectory = train(exactness.build, config, world, follow=reference())
    exactness.assert_same(trajectory, reference(), exactness.FLOAT32, loss_moves=0.5)
    assert torch.equal(trajectory.masters[-1][BIAS], reference().masters[-1][BIAS])
    assert trajectory.masters[-1][BIAS].abs().max() > 3 * RATE


def the_last_micro_batch_alone(engine, layout: Layout):
    add = engine._states.add
    engine._states.add = lambda records: (engine._states.start_step(), add(records))
    return objective


def this_rank_alone(engine, layout: Layout):
    after = engine._states.after_step
    alone = [torch.distributed.new_group([rank]) for rank in range(layout.world)]
    engine._states.after_step = lambda group: after(alone[layout.rank])
    return objective


@pytest.mark.parametrize("plant", [the_last_micro_batch_alone, this_rank_alone], ids=lambda plant: plant.__name__)
def test_a_load_that_is_not_the_global_batchs_is_caught(plant):
    config = recipe(world=2, expert=2, accumulation=4)
    trajectory = train(exactness.build, config, 2, plant=plant, follow=reference())
    with pytest.raises(AssertionError, match="deviates"):
        exactness.assert_same(trajectory, reference(), exactness.FLOAT32)


class Spoiled:
    """The objective, with a NaN loss in step `when` on this rank."""

    names, counts = objective.names, staticmethod(objective.counts)

    def __init__(self, spoil: bool):
        self.spoil = spoil

    def __call__(self, output, batch, counts):
        result = objective(output, batch, counts)
        return replace(result, loss=result.loss + (math.nan if self.spoil else 0.0))


def _skip(rank: int, config: Config) -> tuple[list[bool], list[Tensor]]:
    engine, layout = toy_engine(config)
    skipped, biases = [], []
    for step in range(3):
        goal = Spoiled(step == 1 and rank == 1)
        skipped.append(engine.train_step(step_inputs(step, layout, config), goal, LR).skipped)
        biases.append(engine.module.ffn.router.bias.value.clone())
    return skipped, biases


def test_a_skipped_step_leaves_the_bias():
    config = make_config(router=SMALL, groups=4, micro=1, deepspeed=sgd(), non_finite="skip")
    for skipped, (first, second, third) in run_ranks(_skip, 2, config):
        assert skipped == [False, True, False]
        assert torch.equal(first, second) and not torch.equal(second, third)


def _in_bf16(rank: int, config: Config) -> list[Tensor]:
    engine, layout = toy_engine(config)
    for step in range(3):
        engine.train_step(step_inputs(step, layout, config), objective, LR)
    router = engine.module.ffn.router
    assert engine.module.output.weight.dtype == torch.bfloat16
    return [router.bias.value] if hasattr(router, "bias") else [router.text.bias.value]


@pytest.mark.parametrize("router", [SMALL, IN_TEXT], ids=["alone", "in_text"])
def test_the_bias_stays_float32_under_bf16(router):
    """This includes a child router of one modality, whose load is that of its own experts."""
    config = make_config(router=router, groups=4, micro=1, deepspeed=sgd(bf16={"enabled": True}))
    (first,), (second,) = run_ranks(_in_bf16, 2, config)
    assert first.dtype == torch.float32 and torch.equal(first, second)
    steps_E = first / RATE
    assert torch.allclose(steps_E, steps_E.round(), atol=1e-4) and steps_E.abs().max() >= 1


def test_resume_is_bitwise_and_any_layout_reads_the_bias(tmp_path):
    path = tmp_path / "step_00000002"
    job = Job(router=SMALL, stop=4, save=str(path), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert whole.at_save["ffn.router.bias.value"].abs().max() >= RATE
    assert_same(rest.at_end, whole.at_end)
    other = run(job.resumed(world=1, expert=1, stage=3), follow=whole)
    assert_same(other.at_save, whole.at_save)
    assert torch.equal(other.at_end["ffn.router.bias.value"], whole.at_end["ffn.router.bias.value"])


def test_a_model_that_is_not_trained_further_gets_its_bias(tmp_path):
    """The model is opened as for evaluation and generation."""
    path = tmp_path / "step_00000002"
    source = run(Job(router=SMALL, stop=2, save=str(path), save_at=2))
    model = CheckpointToy(SMALL, Layout(), gain=3)
    fill_model(model, path, Layout())
    assert torch.equal(model.ffn.router.bias.value, source.at_save["ffn.router.bias.value"])


def test_a_stage_accounts_for_the_bias(tmp_path):
    path = str(tmp_path / "step_00000002")
    source = run(Job(router=SMALL, stop=2, save=path, save_at=2))
    stage = Job(router=SMALL, init=InitFrom(checkpoint=path))
    loaded = run(stage)
    assert torch.equal(loaded.at_save["ffn.router.bias.value"], source.at_save["ffn.router.bias.value"])
    assert "ffn.router.bias.value" in {entry["name"] for entry in loaded.state["loaded"]["entries"]}
    for sentence in run_ranks(attempt, 2, replace(stage, router=TOP_K)):
        assert sentence is not None and "'ffn.router.bias.value'" in sentence and "init_from.left_out" in sentence
