"""Every quickstart's own model and losses: over two ranks, experts spread as it says, as in one process, with SGD."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from moe_dist.config import Config, load_config
from moe_dist.engine.zero import init_distributed, make_engine
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.train import routers
from tests.distributed import run_ranks
from tests.engine.toy import VOCABULARY, sgd
from tests.engine.trajectory import full_parameters, step_inputs

FOLDER = Path(__file__).parents[2] / "configs"
# RoMA's second stage needs a neighbour store and trained deltas: tests/losses/test_manifold.py and tests/test_roma.py.
RECIPES = sorted(
    path.stem
    for path in FOLDER.glob("*_quickstart.yaml")
    if "type: moe" in path.read_text() and load_config(path).data.neighbours is None
)
STEPS, CLIP = 5, 0.2
# Where all but the auxiliary routers is frozen, the loss to look at, which a larger weight lets move.
AUXILIARY = ("loss/causal_routers", 0.01, ["losses.causal_routers.weight=10"])
GOALS = {"moma_causal_quickstart": AUXILIARY}


def steps_of(rank: int, config: Config) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Each step's losses and gradient norm; the parameters before and after."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    model = Transformer(config.model, VOCABULARY, layout, config.seed)
    engine = make_engine(model, config, layout, routers(model)[0].num_experts)
    before, steps = full_parameters(engine), []
    for step in range(STEPS):
        objective = make_objective(config.losses, Context(layout=layout, group_sequences=2), step)
        result = engine.train_step(step_inputs(step, layout, config), objective, 0.5)
        means = {name: total / result.counts[name] for name, total in result.loss_sums.items() if result.counts[name]}
        steps.append(means | {"grad_norm": result.grad_norm})
    return steps, before, full_parameters(engine)


def on_ranks(recipe: str, world: int) -> Config:
    """The recipe, with SGD and a small batch, not accumulated (a running share of the global batch would differ)."""
    *_, overrides = GOALS.get(recipe, ([],))
    config = load_config(FOLDER / f"{recipe}.yaml", [*overrides, *(["parallel.expert=1"] if world == 1 else [])])
    train = config.train.model_copy(update={"global_batch_groups": 4, "micro_batch_groups": 4 // world})
    return config.model_copy(update={"train": train, "deepspeed": sgd(clip=CLIP)})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_train_the_same_model(recipe):
    ((expected, before, after),) = run_ranks(steps_of, 1, on_ranks(recipe, 1))
    results = run_ranks(steps_of, 2, on_ranks(recipe, 2))
    assert min(step["grad_norm"] for step in expected) > CLIP, "clipping was not active"
    goal, moves, _ = GOALS.get(recipe, ("loss", 0.1, []))
    assert max(step[goal] for step in expected) - min(step[goal] for step in expected) > moves, "nothing was learnt"
    for steps, *_ in results:
        for got, wanted in zip(steps, expected, strict=True):
            assert got == pytest.approx(wanted, rel=2e-5)
    parameters = {name: value for *_, mine in results for name, value in mine.items()}
    assert parameters.keys() == after.keys() == before.keys()
    for name, value in after.items():
        step = float((value - before[name]).abs().max())
        error = float((parameters[name] - value).abs().max())
        assert error <= 2e-3 * step + 1e-7, f"{name}: off by {error:.1e} after a change of {step:.1e}"
