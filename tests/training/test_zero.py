"""The engine on the toy model: against plain torch, weight-decay groups, evaluation, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.core.errors import UserError
from moe_dist.parallel.layout import Layout
from moe_dist.training.deepspeed import parameter_groups
from moe_dist.training.trainable import freeze_others
from tests.support.distributed import run_ranks
from tests.support.selections import LOGITS, deviation, watching
from tests.support.toy_model import MOMA, SUM, TOP_K, ToyModel, loss_count, make_config, objective, sgd
from tests.support.trajectory import full_parameters, step_inputs, toy_engine

LR = 0.1
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.3}}}
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0}


# --- one process: the same as a loop written in plain torch


def _both(rank, config, lrs):
    """Return the losses and norms of the engine and of plain torch, and the parameters of both."""
    engine, layout = toy_engine(config)
    model = ToyModel(config.model.ffn.router, layout)
    freeze_others(model, config.trainable)
    settings = config.deepspeed.optimizer.model_dump()
    settings["params"].pop("adam_w_mode", None)
    settings["params"]["lr"] = config.schedule.peak_lr
    decay = settings["params"].pop("weight_decay", 0.0)
    groups = [
        {"params": [p], "weight_decay": decay if "norm" not in name and "bias" not in name else 0.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    optimizer = getattr(torch.optim, settings["type"])(groups, **settings["params"])
    ours, plain = [], []
    for step, lr in enumerate(lrs):
        batches = step_inputs(step, layout, config)
        with watching() as watch:
            result = engine.train_step(batches, objective, lr)
        ours.append((result.loss_sums["loss"], result.grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with watching(watch.seen) as same:
            loss = sum(objective(model(batch.tokens_T, batch.info), batch, SUM).loss for batch in batches)
        assert deviation(same.seen, watch.seen) < LOGITS
        (loss / sum(loss_count(batch) for batch in batches)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        plain.append((loss.item(), norm.item()))
        assert result.counts["loss"] == sum(loss_count(batch) for batch in batches)
        assert result.counts["loss"] == result.counts["loss/text"] + result.counts["loss/image"]
    theirs = {}
    for name, parameter in model.named_parameters():
        experts = getattr(parameter, "expert_ids", ())
        theirs |= {f"{name}[{e}]": parameter[e].detach() for e in experts} or {name: parameter.detach()}
    return ours, plain, full_parameters(engine), theirs


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [{}, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("trainable", [("*",), ("*router*", "output.*")], ids=["all", "some"])
def test_one_process_equals_plain_torch(stage, optimizer, trainable):
    config = make_config(router=MOMA, groups=4, micro=2, deepspeed=sgd(stage) | optimizer, trainable=trainable)
    ((ours, plain, mine, theirs),) = run_ranks(_both, 1, config, [0.1, 0.05, 0.0, 0.02])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_weight_decay_groups():
    model = ToyModel(TOP_K, Layout())
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


def _refused(rank, config):
    try:
        toy_engine(config)
    except UserError as error:
        return str(error)


def test_layouts_and_batches_that_do_not_fit():
    assert "groups=3 is not a multiple of 2" in run_ranks(_refused, 2, make_config(groups=3))[0]
    with pytest.raises(UserError, match="gradient_cliping"):
        make_config(deepspeed=sgd() | {"gradient_cliping": 1.0})


# --- what DeepSpeed would do on the device at every step, and does not


class _Reads(TorchDispatchMode):
    """A counter of device reads, all of which use one operation, on CPU as on GPU."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def _reads_and_timer(rank, config):
    engine, layout = toy_engine(config)
    engine.train_step(step_inputs(0, layout, config), objective, LR)
    for batch in step_inputs(1, layout, config):
        output = engine._zero(batch.tokens_T, batch.info)
        engine._zero.backward(objective(output, batch, SUM).loss)
        with _Reads() as step:
            engine._zero.step()
    return step.reads, engine._zero.tput_timer


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_reads_nothing_but_the_norm_and_times_nothing(stage, bf16):
    config = make_config(deepspeed=sgd(stage) | {"bf16": {"enabled": bf16}})
    ((reads, timer),) = run_ranks(_reads_and_timer, 1, config)
    assert reads == (1 if stage == 3 else 4), "whether the norm is finite; stages 1 and 2 also ask each of three groups"
    assert not timer.config.enabled and timer.global_step_count == 0 and not timer.started


# --- evaluation


def _evaluate(rank, config):
    runs = []
    for evaluating in (False, True):
        engine, layout = toy_engine(config)
        figures = []
        for step in range(4):
            batches = step_inputs(step, layout, config)
            if evaluating:
                outputs = [engine.eval_forward(batch) for batch in batches]
                assert not any(output.logits_TV.requires_grad for output in outputs)
                loss = sum(objective(output, batch, SUM).loss for output, batch in zip(outputs, batches))
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
    engine, layout = toy_engine(config)
    before = full_parameters(engine)
    for _ in range(32):
        engine.train_step(step_inputs(0, layout, config), objective, config.schedule.peak_lr)
    after = full_parameters(engine)
    assert all(p.dtype == torch.bfloat16 for p in engine.module.parameters())
    return float((after["output.weight"] - before["output.weight"]).abs().max())


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_adds_up_updates_below_its_own_precision(stage):
    """Each step changes a weight by at most 1e-4 of it. In bfloat16, whose spacing is 4e-3, it would never change."""
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}
    config = make_config(expert=2, deepspeed=sgd(stage, bf16={"enabled": True}) | adam)
    moved = run_ranks(_tiny_updates, 2, config)
    assert 1.5e-3 < moved[0] < 1e-2
