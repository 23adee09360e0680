"""The terms beside the language loss, trained with: no layout changes their values, nor what training makes of them.

The toy model with SGD and clipping, on real ranks and the real engine.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from moe_dist.config.losses import loss_settings
from moe_dist.config.recipe import Config
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from tests.support.distributed import run_ranks
from tests.support.selections import LOGITS, Selections, deviation, unite, watching
from tests.support.toy_model import EXPERTS, make_config, sgd
from tests.support.trajectory import full_parameters, step_inputs, toy_engine

GROUPS, STEPS = 8, 4
LOSSES = {
    "load_balance": {"weight": [[0, 0.5], [2, 0.1]], "scope": "group"},
    "pooled_balance": {"weight": 0.5},
    "router_z": {"weight": 0.1},
}
SEQUENCE = LOSSES | {"load_balance": {"weight": 0.5, "scope": "sequence"}}
GLOBAL = LOSSES | {"load_balance": {"weight": 0.5, "scope": "global"}}
NULLS = {"type": "null_experts", "num_experts": EXPERTS, "num_null_experts": 4, "top_k": 3}


Outcome = tuple[list[dict[str, float]], dict[str, Tensor], Selections]


def train(rank: int, config: Config, losses: dict, follow: Selections | None = None) -> Outcome:
    engine, layout = toy_engine(config)
    steps, selections = [], {}
    for step in range(STEPS):
        objective = make_objective(loss_settings(losses), Context(layout=layout, group_sequences=2), step)
        with watching(follow) as watch:
            watch.step = step
            result = engine.train_step(step_inputs(step, layout, config), objective, 0.1)
        selections |= watch.seen
        assert result.grad_norm > 0.05, "clipping was not active"
        steps.append({name: total / result.counts[name] for name, total in result.loss_sums.items()})
    return steps, full_parameters(engine), selections


def recipe(world: int = 1, expert: int = 1, accumulation: int = 1) -> Config:
    micro = GROUPS // world // accumulation
    return make_config(router=NULLS, expert=expert, groups=GROUPS, micro=micro, deepspeed=sgd(clip=0.05))


@cache
def alone(scope: str) -> Outcome:
    return run_ranks(train, 1, recipe(), SCOPES[scope])[0]


SCOPES = {"group": LOSSES, "sequence": SEQUENCE, "global": GLOBAL}


@pytest.mark.parametrize(
    ("scope", "world", "expert", "accumulation"),
    [
        ("group", 2, 2, 4),
        ("sequence", 2, 2, 2),
        ("global", 2, 2, 1),  # over accumulation steps its shares are a running mean
        pytest.param("group", 1, 1, 4, marks=pytest.mark.slow),
        pytest.param("group", 4, 2, 2, marks=pytest.mark.slow),
        pytest.param("global", 4, 2, 1, marks=pytest.mark.slow),
        pytest.param("global", 2, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_layouts_agree(scope, world, expert, accumulation):
    expected_steps, expected, selections = alone(scope)
    results = run_ranks(train, world, recipe(world, expert, accumulation), SCOPES[scope], selections)
    assert deviation(unite(result[2] for result in results), selections) < LOGITS
    for steps, *_ in results:
        for got, wanted in zip(steps, expected_steps, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
    parameters = {name: value for _, mine, _ in results for name, value in mine.items()}
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)


def test_the_terms_change_what_is_learnt():
    """Without them the router ends elsewhere, so the comparison above can fail."""
    _, plain, _ = run_ranks(train, 1, recipe(), {})[0]
    _, trained, _ = alone("group")
    name = "ffn.router.gate.weight"
    assert float((plain[name] - trained[name]).abs().max()) > 1e-3 * float(plain[name].abs().max())
