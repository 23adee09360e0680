"""Metrics of a step count all its micro-batches and ranks: they do not depend on how its groups are divided."""

import pytest

from moe_dist.config.model_section import DepthConfig
from moe_dist.config.recipe import Config
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.step_metrics import StepMeter
from tests.support.distributed import run_ranks
from tests.support.selections import Selections, watching
from tests.support.toy_model import MOMA, VOCABULARY, make_config, objective
from tests.support.trajectory import step_inputs

NULLS = {"type": "null_experts", "num_experts": 4, "num_null_experts": 4, "top_k": 3, "reference_top_k": 2}
ROUTERS = {"moma": {n: r | {"auxiliary": True} if n != "type" else r for n, r in MOMA.items()}, "nulls": NULLS}
GROUPS = 8


def recipe(router: str, world: int, accumulation: int) -> Config:
    config = make_config(router=ROUTERS[router], expert=world, groups=GROUPS, micro=GROUPS // world // accumulation)
    depth = DepthConfig(auxiliary=True) if router == "moma" else None
    return config.model_copy(update={"model": config.model.model_copy(update={"depth": depth})})


def metrics_of(
    rank: int, config: Config, follow: Selections | None, only_the_last: bool = False
) -> tuple[dict, Selections]:
    """Return the metrics of one step, without times."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    engine = make_engine(Transformer(config.model, VOCABULARY, layout, seed=3), config, layout)
    meter = StepMeter.of(engine.module, config, layout, domains=())
    with watching(follow) as watch, pytest.MonkeyPatch.context() as patch:
        if only_the_last:
            patch.setattr(StepCounts, "__add__", lambda _, other: other)
        result = engine.train_step(step_inputs(0, layout, config), objective, 0.1, meter.count)
    metrics = meter.metrics(result.counted, seconds=2.0)
    assert metrics["model_flops_per_second"] == metrics["model_flops"] / 2
    assert not undeclared(metrics)
    if layout.dp > 1:
        metrics["moe/rank_imbalance"] = 1.0  # that of one rank
    lists = {
        f"{name}/{i}": x for name, found in metrics.items() if isinstance(found, list) for i, x in enumerate(found)
    }
    return {name: value for name, value in metrics.items() if not isinstance(value, list)} | lists, watch.seen


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_counts_all_its_micro_batches(router):
    """One micro-batch of eight groups, two of four, and two ranks with two of two each; groups differ strongly."""
    ((whole, selections),) = run_ranks(metrics_of, 1, recipe(router, 1, 1), None)
    assert whole["model_flops"] > 1e6 and any("/image" in key for key in whole)
    ((halves, _),) = run_ranks(metrics_of, 1, recipe(router, 1, 2), selections)
    assert halves == pytest.approx(whole, rel=1e-12)
    for quarters, _ in run_ranks(metrics_of, 2, recipe(router, 2, 2), selections):
        saved = {name: value for name, value in quarters.items() if name == "moe/flops_saved"}  # of this rank's tokens
        assert quarters == pytest.approx(whole | saved, rel=1e-12)


def test_the_last_micro_batch_alone_would_show():
    ((whole, selections),) = run_ranks(metrics_of, 1, recipe("moma", 1, 1), None)
    ((last, _),) = run_ranks(metrics_of, 1, recipe("moma", 1, 2), selections, True)
    assert last["model_flops"] < 0.6 * whole["model_flops"]
    assert last["moe/0/experts_per_token/text"] != pytest.approx(whole["moe/0/experts_per_token/text"], rel=1e-3)
