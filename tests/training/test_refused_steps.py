"""Refused steps: if a value is not finite or data fails on only one rank, no rank changes anything."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch

from moe_dist.core.errors import UserError
from tests.support.distributed import run_ranks
from tests.support.long import REPEATED
from tests.support.selections import LOGITS, deviation, unite, watching
from tests.support.toy_model import make_config, objective, sgd
from tests.support.trajectory import full_parameters, step_inputs, toy_engine

LR = 0.1
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Spoiled:
    """The objective, with a non-finite value in micro-batch `when` of this rank."""

    when: int
    how: str

    def __post_init__(self):
        object.__setattr__(self, "calls", [])

    names = objective.names
    counts = staticmethod(objective.counts)

    def __call__(self, output, batch, counts):
        self.calls.append(0)
        result = objective(output, batch, counts)
        if len(self.calls) - 1 != self.when:
            return result
        if self.how == "gradient":
            result.loss.register_hook(lambda grad: grad * math.inf)
            return result
        # Its gradient is finite: only the loss tells.
        value = {"nan": math.nan, "inf": math.inf}[self.how]
        return replace(result, loss=result.loss + value, sums=result.sums | {"loss": result.loss.detach() + value})


def _skip(rank, config, how):
    """Run 5 steps with step 2 spoiled on rank 1 only, and a second run that leaves step 2 out."""
    outcomes = []
    for spoiled in (True, False):
        engine, layout = toy_engine(config)
        goal = Spoiled(2 * engine.accumulation if spoiled and rank == 1 else -1, how)
        figures, skipped = [], []
        for step in range(5):
            if step == 2 and not spoiled:
                continue
            result = engine.train_step(step_inputs(step, layout, config), goal, LR)
            skipped.append(result.skipped)
            if step != 2:
                figures.append((result.loss_sums, result.grad_norm))
            else:
                assert result.grad_norm == math.inf
                assert math.isfinite(result.loss_sums["loss"]) == (how == "gradient")
        outcomes.append((figures, full_parameters(engine), skipped, engine.skipped_steps, engine.steps))
    (figures, parameters, *told), (clean, clean_parameters, *_) = outcomes
    assert figures == clean
    assert all(torch.equal(parameters[name], clean_parameters[name]) for name in clean_parameters)
    assert told == [[False, False, True, False, False], 1, 5]


SKIPPING = {
    "1": sgd(1),
    "2": sgd(2),
    "3": sgd(3, zero_optimization=PARTITIONED),
    "1-offload": sgd(1, zero_optimization={"stage": 1} | OFFLOADED),
    "2-offload": sgd(2, zero_optimization={"stage": 2} | OFFLOADED),
    "3-offload": sgd(3, zero_optimization=PARTITIONED | OFFLOADED),
    "1-bf16": sgd(1, bf16={"enabled": True}),
    "2-bf16": sgd(2, bf16={"enabled": True}),
    "3-bf16": sgd(3, bf16={"enabled": True}),
}


@pytest.mark.parametrize(
    ("deepspeed", "how"),
    [
        # A loss that is not finite makes its gradients so (training/engine.py `_poison`), whatever stores them.
        pytest.param(
            value,
            how,
            id=f"{key}-{how}",
            marks=() if "-" not in key else pytest.mark.slow if how == "gradient" else REPEATED,
        )
        for key, value in SKIPPING.items()
        for how in ("nan", "inf", "gradient")
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(deepspeed, how):
    run_ranks(_skip, 2, make_config(expert=2, groups=4, deepspeed=deepspeed, non_finite="skip"), how)


def _stop(rank, config, how, steps):
    engine, layout = toy_engine(config)
    goal = Spoiled(engine.accumulation * 2 if rank == 1 else -1, how)
    before = None
    for step in range(steps):
        before = full_parameters(engine)
        try:
            engine.train_step(step_inputs(step, layout, config), goal, LR)
        except UserError as error:
            after = full_parameters(engine)
            assert all(torch.equal(before[name], after[name]) for name in before)
            return str(error)
    return None


@pytest.mark.parametrize("stage", [1, 3])
def test_stopping_names_the_step_and_the_term(stage):
    config = make_config(expert=2, deepspeed=sgd(stage))
    sentence = (
        "step 3: the loss term 'loss' is not finite; the step changed nothing (train.non_finite=skip would continue)"
    )
    assert run_ranks(_stop, 2, config, "nan", 4) == [sentence] * 2
    assert "step 3: the gradient norm is not finite" in run_ranks(_stop, 2, config, "gradient", 4)[0]


def test_too_many_skipped_steps():
    config = make_config(expert=2, deepspeed=sgd(2), non_finite="skip", max_skipped=0)
    sentence = "step 3: the loss term 'loss' is not finite, and 1 skipped steps are more than train.max_skipped"
    assert run_ranks(_stop, 2, config, "inf", 4) == [sentence] * 2


def _lost_data(rank, config, follow=None):
    engine, layout = toy_engine(config)
    selections = {}

    def reader(step, broken):
        batches = step_inputs(step, layout, config)
        yield batches[0]
        if broken:
            raise UserError("shard-000007.tar is truncated")
        yield from batches[1:]

    figures, sentence = [], None
    for step in range(4):
        with watching(follow) as watch:
            watch.step = step
            try:
                result = engine.train_step(reader(step, step == 2 and rank == 1), objective, LR)
            except UserError as error:
                sentence = str(error)
                result = engine.train_step(reader(step, False), objective, LR)
        figures.append(result.loss_sums | {"norm": result.grad_norm})
        selections |= watch.seen
    return figures, sentence, selections


def test_a_rank_without_data_stops_all_ranks_before_anything_is_computed():
    config = make_config(expert=2, deepspeed=sgd(2))
    ((alone, _, selections),) = run_ranks(_lost_data, 1, make_config(deepspeed=sgd(2)))
    results = run_ranks(_lost_data, 2, config, selections)
    assert [sentence for _, sentence, _ in results] == [
        "shard-000007.tar is truncated (rank 1)",
        "shard-000007.tar is truncated",
    ]
    assert deviation(unite(result[2] for result in results), selections) < LOGITS
    for figures, _, _ in results:
        for mine, theirs in zip(figures, alone, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


def _wrong_batches(rank, config):
    engine, layout = toy_engine(config)
    batches = step_inputs(0, layout, config)
    sentences = []
    blank = [copy.copy(batch) for batch in batches]
    for batch in blank:
        object.__setattr__(batch, "loss_mask_T", torch.zeros_like(batch.loss_mask_T))
    for given in (batches[:1], blank):
        try:
            engine.train_step(given, objective, LR)
        except (UserError, ValueError) as error:
            sentences.append(str(error))
    return sentences


def test_wrong_batches():
    for sentences in run_ranks(_wrong_batches, 2, make_config(expert=2)):
        assert sentences[0] == "1 micro-batches were given for an accumulation of 2"
        assert "no token of this step's global batch carries a loss" in sentences[1]
