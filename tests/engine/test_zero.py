"""The engine on the toy model: against plain torch, and everything that may go wrong in a step."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from moe_dist.engine.zero import Engine, init_distributed, make_engine, parameter_groups
from moe_dist.errors import UserError
from moe_dist.parallel.layout import make_layout
from tests.distributed import run_ranks
from tests.engine.toy import EXPERTS, MOMA, TOP_K, ToyModel, make_config, objective, sgd
from tests.engine.trajectory import full_parameters, step_inputs

LR = 0.1
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}}}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def build(config) -> tuple[Engine, object]:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    return make_engine(ToyModel(config.model.ffn.router, layout), config, layout, EXPERTS), layout


# --- one process: the same as a loop written in plain torch


def _both(rank, config, lrs):
    """(engine's figures, plain torch's figures), parameters of both."""
    engine, layout = build(config)
    model = ToyModel(config.model.ffn.router, layout)
    settings = copy.deepcopy(config.deepspeed["optimizer"])
    decay = settings["params"].pop("weight_decay", 0.0)
    groups = [
        {"params": [p], "weight_decay": decay if "norm" not in name and "bias" not in name else 0.0}
        for name, p in model.named_parameters()
    ]
    optimizer = getattr(torch.optim, settings["type"])(groups, **settings["params"])
    ours, plain = [], []
    for step, lr in enumerate(lrs):
        batches = step_inputs(step, layout, config)
        result = engine.train_step(batches, objective, lr)
        ours.append((result.loss_sums["loss"], result.grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = sum(objective(model(batch.tokens_T, batch.info), batch).loss for batch in batches)
        (loss / sum(batch.loss_tokens for batch in batches)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        plain.append((loss.item(), norm.item()))
        assert result.counts["tokens"] == sum(batch.loss_tokens for batch in batches)
        assert result.counts["tokens"] == result.counts["text"] + result.counts["image"]
    theirs = {}
    for name, parameter in model.named_parameters():
        experts = getattr(parameter, "expert_ids", ())
        theirs |= {f"{name}[{e}]": parameter[e].detach() for e in experts} or {name: parameter.detach()}
    return ours, plain, full_parameters(engine), theirs


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [{}, ADAM], ids=["sgd", "adamw"])
def test_one_process_equals_plain_torch(stage, optimizer):
    config = make_config(router=MOMA, groups=4, micro=2, deepspeed=sgd(stage) | optimizer)
    ((ours, plain, mine, theirs),) = run_ranks(_both, 1, config, [0.1, 0.05, 0.0, 0.02])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_weight_decay_groups():
    model = ToyModel(TOP_K, make_layout_of_one())
    model.ffn.router.gate.weight.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.allreduce = "experts" not in name
        parameter.group_name = "ep_size_1"
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        tuple(sorted(names[p] for p in group["params"])): (group.get("weight_decay"), group.get("moe", False))
        for group in parameter_groups(model)
    }
    assert groups == {
        ("embedding.weight", "output.weight"): (None, False),
        ("norm.weight", "output.bias"): (0.0, False),
        ("ffn.experts.down", "ffn.experts.gate_up"): (None, True),
    }


def make_layout_of_one():
    from moe_dist.parallel.layout import Layout

    return Layout()


# --- a step that must not happen


@dataclass(frozen=True)
class Spoiled:
    """The objective, but in micro-batch `when` of this rank's run something is not finite."""

    when: int
    how: str

    def __post_init__(self):
        object.__setattr__(self, "calls", [])

    def __call__(self, output, batch):
        self.calls.append(0)
        result = objective(output, batch)
        if len(self.calls) - 1 != self.when:
            return result
        if self.how == "gradient":
            result.loss.register_hook(lambda grad: grad * math.inf)
            return result
        # Its gradient is finite: only the loss tells.
        value = {"nan": math.nan, "inf": math.inf}[self.how]
        return result._replace(loss=result.loss + value, terms=result.terms | {"loss": result.loss.detach() + value})


def _skip(rank, config, how):
    """A run of 5 steps of which step 2 is spoiled on rank 1 alone, and one that leaves that step out."""
    outcomes = []
    for spoiled in (True, False):
        engine, layout = build(config)
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


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize(
    "deepspeed",
    [pytest.param(value, id=key, marks=pytest.mark.slow if "-" in key else ()) for key, value in SKIPPING.items()],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(deepspeed, how):
    run_ranks(_skip, 2, make_config(expert=2, groups=4, deepspeed=deepspeed, non_finite="skip"), how)


def _stop(rank, config, how, steps):
    engine, layout = build(config)
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
        "step 3: the loss term 'loss' is not finite; the step changed nothing (train.non_finite=skip would go on)"
    )
    assert run_ranks(_stop, 2, config, "nan", 4) == [sentence] * 2
    assert "step 3: the gradient norm is not finite" in run_ranks(_stop, 2, config, "gradient", 4)[0]


def test_too_many_skipped_steps():
    config = make_config(expert=2, deepspeed=sgd(2), non_finite="skip", max_skipped=0)
    sentence = "step 3: the loss term 'loss' is not finite, and 1 skipped steps are more than train.max_skipped"
    assert run_ranks(_stop, 2, config, "inf", 4) == [sentence] * 2


def _lost_data(rank, config):
    engine, layout = build(config)

    def reader(step, broken):
        batches = step_inputs(step, layout, config)
        yield batches[0]
        if broken:
            raise UserError("shard-000007.tar is truncated")
        yield from batches[1:]

    losses, sentence = [], None
    for step in range(4):
        try:
            losses.append(engine.train_step(reader(step, step == 2 and rank == 1), objective, LR).loss_sums)
        except UserError as error:
            sentence = str(error)
            losses.append(engine.train_step(reader(step, False), objective, LR).loss_sums)
    return losses, sentence


def test_a_rank_without_data_stops_all_ranks_before_anything_is_computed():
    config = make_config(expert=2, deepspeed=sgd(2))
    results = run_ranks(_lost_data, 2, config)
    assert [sentence for _, sentence in results] == [
        "shard-000007.tar is truncated (rank 1)",
        "shard-000007.tar is truncated",
    ]
    (alone, _) = run_ranks(_lost_data, 1, make_config(deepspeed=sgd(2)))[0]
    for mine, theirs in zip(results[0][0], alone, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def _wrong_batches(rank, config):
    engine, layout = build(config)
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


def _refused(rank, config):
    try:
        build(config)
    except UserError as error:
        return str(error)


def test_layouts_and_batches_that_do_not_fit():
    assert "groups=3 is not a multiple of 2" in run_ranks(_refused, 2, make_config(groups=3))[0]
    assert "gradient_cliping" in run_ranks(_refused, 1, make_config(deepspeed=sgd() | {"gradient_cliping": 1.0}))[0]


# --- evaluation


def _evaluate(rank, config):
    runs = []
    for evaluating in (False, True):
        engine, layout = build(config)
        figures = []
        for step in range(4):
            batches = step_inputs(step, layout, config)
            if evaluating:
                outputs = [engine.eval_forward(batch) for batch in batches]
                assert not any(output.logits_TV.requires_grad for output in outputs)
                loss = sum(objective(output, batch).loss for output, batch in zip(outputs, batches))
                held_out = sum(run_losses(loss, layout))
            result = engine.train_step(batches, objective, LR)
            assert engine.module.training
            if evaluating:
                assert result.loss_sums["loss"] == pytest.approx(held_out, rel=1e-6)
            figures.append((result.loss_sums, result.grad_norm))
        runs.append(figures)
    assert runs[0] == runs[1], "evaluation changed the training"


def run_losses(loss, layout) -> list[float]:
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(layout.world)]
    torch.distributed.all_gather(losses, loss.double())
    return [float(value) for value in losses]


@pytest.mark.parametrize(
    "deepspeed", [sgd(1), sgd(2), sgd(3), sgd(3, zero_optimization=PARTITIONED)], ids=["1", "2", "3", "3-partitioned"]
)
def test_evaluation_is_the_same_forward_pass_and_leaves_no_trace(deepspeed):
    run_ranks(_evaluate, 2, make_config(router=MOMA, expert=2, deepspeed=deepspeed))


# --- precision


def _tiny_updates(rank, config):
    engine, layout = build(config)
    before = full_parameters(engine)
    for _ in range(32):
        engine.train_step(step_inputs(0, layout, config), objective, config.deepspeed["optimizer"]["params"]["lr"])
    after = full_parameters(engine)
    assert all(p.dtype == torch.bfloat16 for p in engine.module.parameters())
    return float((after["output.weight"] - before["output.weight"]).abs().max())


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_adds_up_updates_below_its_own_precision(stage):
    """Each step moves a weight by at most 1e-4 of its size; bfloat16 alone, with steps of 4e-3, would never move."""
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    config = make_config(expert=2, deepspeed=sgd(stage, bf16={"enabled": True}) | adam)
    moved = run_ranks(_tiny_updates, 2, config)
    assert 1.5e-3 < moved[0] < 1e-2
