"""RoMA's manifold term against plain loops, gradients included; its value and its effect at every layout.

Shape suffixes: T tokens, D model width, C columns, S samples, K neighbours, R routing values of a sample.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.config.losses import ManifoldSettings, loss_settings
from moe_dist.config.recipe import Config
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.losses.manifold import Manifold, sample_routing
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.parallel.layout import Layout
from tests.losses.test_balance import Output, make_batch, parts_of
from tests.support.distributed import run_ranks
from tests.support.moe_cases import TOKENS, WIDTH, close, make_layer
from tests.support.selections import LOGITS, Selections, deviation, unite, watching
from tests.support.toy_model import EXPERTS, make_config, sgd
from tests.support.trajectory import full_parameters, step_inputs, toy_engine

ONE_PROCESS = Context(layout=Layout(), group_sequences=1)
NEIGHBOURS = 3


def make_term(last_layers: int) -> Manifold:
    return Manifold(validate(ManifoldSettings, {"weight": 1.0, "last_layers": last_layers}, "test"), ONE_PROCESS)


def with_neighbours(batch: Batch, token_S: Tensor, values: int, uncovered: tuple[int, ...] = ()) -> Batch:
    """Samples that end at these tokens; a sample's neighbours depend on its global token id alone."""
    routing, weights = [], []
    for s, token in enumerate(batch.info.token_id_T[token_S].tolist()):
        generator = torch.Generator().manual_seed(token)
        routing.append(torch.rand(NEIGHBOURS, values, generator=generator))
        weights.append(torch.rand(NEIGHBOURS, generator=generator).softmax(0) * (s not in uncovered))
    sidecar = {
        "prompt_end_S": token_S,
        "neighbour_routing_SKR": torch.stack(routing) if routing else torch.zeros(0, NEIGHBOURS, values),
        "neighbour_weights_SK": torch.stack(weights) if weights else torch.zeros(0, NEIGHBOURS),
    }
    return replace(batch, sidecar=sidecar)


def naive(layers: list[list], batch: Batch) -> Tensor:
    """The equation in loops. layers: what test_balance.parts_of read of each layer's routers."""
    total, samples = torch.zeros((), dtype=torch.float64), 0
    for s, token in enumerate(batch.sidecar["prompt_end_S"].tolist()):
        weights = batch.sidecar["neighbour_weights_SK"][s].tolist()
        if not any(weights):
            continue
        samples += 1
        mine = []
        for parts in layers:
            for part in parts:
                columns = len(next(iter(part.logits.values())))
                exp = [z.exp() for z in part.logits[token]] if token in part.logits else [0.0] * columns
                mine += [value / max(sum(exp), 1e-300) for value in exp]
        for weight, theirs in zip(weights, batch.sidecar["neighbour_routing_SKR"][s].double()):
            total = total + weight * sum((a - b) ** 2 for a, b in zip(mine, theirs[-len(mine) :]))
    return total / max(samples, 1)


@pytest.mark.parametrize("router", ["top_1", "top_2_sigmoid", "biased", "by_position", "null", "null_in_text"])
def test_value_and_gradients_equal_the_oracle(router):
    """Two of three layers, of which the store holds all; one sample has no neighbours."""
    batch = make_batch()
    token_S = batch.info.valid_T.nonzero().squeeze(1)[[2, 3, 7, 10, 13]]
    batch = with_neighbours(batch, token_S, values=50, uncovered=(1,))
    layers = [make_layer(router) for _ in range(3)]
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    shapes = [lambda x: x, lambda x: x.flip(1) * 0.5, lambda x: x.roll(1, 1)]
    records = tuple(layer(change(x_TD), batch.info)[1] for layer, change in zip(layers, shapes))
    term = make_term(last_layers=2)
    assert term.counts(batch) == (4, 5)
    total, covered = term(Output(records), batch)
    value = total / 4
    value.backward()

    copy_TD = x_TD.detach().clone().requires_grad_()
    weights = [[p.detach().clone().requires_grad_() for p in layer.router.parameters()] for layer in layers]
    both = zip(layers, shapes, weights)
    parts = [parts_of(layer.router, change(copy_TD), w, batch.info) for layer, change, w in both]
    expected = naive(parts[1:], batch)
    expected.backward()
    assert covered.item() == 4
    close(value, expected, "the value")
    close(x_TD.grad, copy_TD.grad, "gradient of x")
    for layer, copies in zip(layers[1:], weights[1:]):
        for (name, parameter), copy in zip(layer.router.named_parameters(), copies):
            close(parameter.grad, copy.grad, f"gradient of {name}")
            assert copy.grad.any(), "nothing was compared"
    assert all(parameter.grad is None for parameter in layers[0].router.parameters()), "the first layer is left alone"


def test_a_sample_routed_as_its_neighbours_costs_nothing():
    batch = make_batch()
    token_S = batch.info.valid_T.nonzero().squeeze(1)[:4]
    record = make_layer("top_1")(torch.randn(TOKENS, WIDTH, dtype=torch.float64), batch.info)[1]
    routing_SR = sample_routing([record], token_S, TOKENS)
    batch = with_neighbours(batch, token_S, values=8)
    own = {"neighbour_routing_SKR": routing_SR[:, None].expand(-1, NEIGHBOURS, -1)}
    batch = replace(batch, sidecar={**batch.sidecar, **own})
    assert make_term(1)(Output((record,)), batch)[0].item() == 0
    assert routing_SR.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_a_micro_batch_without_samples_adds_nothing():
    batch = with_neighbours(make_batch(), torch.zeros(0, dtype=torch.int64), values=8)
    layer = make_layer("top_1")
    record = layer(torch.randn(TOKENS, WIDTH, dtype=torch.float64), batch.info)[1]
    term = make_term(1)
    loss, covered = term(Output((record,)), batch)
    loss.backward()  # every rank takes part in the backward pass
    assert term.counts(batch) == (0, 0) and loss.item() == covered.item() == 0


def test_what_does_not_fit_is_said():
    batch = make_batch()
    record = make_layer("top_1")(torch.randn(TOKENS, WIDTH, dtype=torch.float64), batch.info)[1]
    with pytest.raises(UserError, match=r"losses\.manifold needs the neighbours of every sample: set data\.neighbours"):
        make_term(1).counts(batch)
    token_S = batch.info.valid_T.nonzero().squeeze(1)[:2]
    with pytest.raises(UserError, match=r"last_layers=2, the model has 1 expert layers"):
        make_term(2)(Output((record,)), with_neighbours(batch, token_S, values=16))
    with pytest.raises(UserError, match=r"holds 7 routing values of each sample, but the last 1 .* have 8 columns"):
        make_term(1)(Output((record,)), with_neighbours(batch, token_S, values=7))


GROUPS, STEPS = 8, 4
LOSSES = {"manifold": {"weight": 3.0, "last_layers": 1}}


def samples_of(batch: Batch, values: int = EXPERTS) -> Batch:
    """Some of a group's tokens end prompts, unequally many in each group; every fourth of them has no neighbours.

    The neighbours' routing has a spread, as in a store of means.
    """
    id_T = batch.info.token_id_T
    token_S = (batch.info.valid_T & (id_T % 5 < 1 + id_T // 48 % 3)).nonzero().squeeze(1)
    uncovered = tuple((id_T[token_S] % 4 == 0).nonzero().squeeze(1).tolist())
    batch = with_neighbours(batch, token_S, values=values, uncovered=uncovered)
    is_covered_S = (batch.sidecar["neighbour_weights_SK"] > 0).any(dim=1)
    spread_SR = batch.sidecar["neighbour_routing_SKR"][:, 0] * 0.1 * is_covered_S[:, None]
    return replace(batch, sidecar={**batch.sidecar, "neighbour_spread_SR": spread_SR})


Outcome = tuple[list[dict[str, float]], dict[str, Tensor], Selections]


def train(rank: int, config: Config, losses: dict, follow: Selections | None = None) -> Outcome:
    engine, layout = toy_engine(config)
    steps, selections = [], {}
    for step in range(STEPS):
        objective = make_objective(loss_settings(losses), Context(layout=layout, group_sequences=2), step)
        batches = [samples_of(batch) for batch in step_inputs(step, layout, config)]
        with watching(follow) as watch:
            watch.step = step
            result = engine.train_step(batches, objective, 0.1)
        selections |= watch.seen
        assert result.grad_norm > 0.05, "clipping was not active"
        steps.append({name: total / result.counts[name] for name, total in result.loss_sums.items()})
    return steps, full_parameters(engine), selections


def recipe(world: int = 1, expert: int = 1, accumulation: int = 1) -> Config:
    router = {"type": "top_k", "num_experts": EXPERTS, "top_k": 2}
    micro = GROUPS // world // accumulation
    return make_config(router=router, expert=expert, groups=GROUPS, micro=micro, deepspeed=sgd(clip=0.05))


@pytest.mark.parametrize(
    ("world", "expert", "accumulation"),
    [
        (2, 2, 2),
        (2, 1, 1),
        pytest.param(1, 1, 8, marks=pytest.mark.slow),
        pytest.param(4, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_layouts_agree(world, expert, accumulation):
    expected_steps, expected, selections = run_ranks(train, 1, recipe(), LOSSES)[0]
    assert all(0.2 < step["manifold/coverage"] < 0.9 and step["loss/manifold"] > 0.01 for step in expected_steps)
    _, plain, _ = run_ranks(train, 1, recipe(), {})[0]
    results = run_ranks(train, world, recipe(world, expert, accumulation), LOSSES, selections)
    assert deviation(unite(result[2] for result in results), selections) < LOGITS
    for steps, *_ in results:
        for got, wanted in zip(steps, expected_steps, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
    parameters = {name: value for _, mine, _ in results for name, value in mine.items()}
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=name)
    gate = "ffn.router.gate.weight"
    assert float((plain[gate] - expected[gate]).abs().max()) > 1e-3, "the term changed nothing"
