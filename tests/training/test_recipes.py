"""Every quickstart's model and losses, with SGD: two ranks with the recipe's expert parallelism equal one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
from torch import Tensor

from moe_dist.config.model_section import MoEFFN
from moe_dist.config.recipe import Config, load_config
from moe_dist.core.batch import Batch
from moe_dist.core.seeding import seeded_normal_
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.losses.test_manifold import samples_of
from tests.support import ROOT
from tests.support.distributed import run_ranks
from tests.support.long import REPEATED
from tests.support.selections import LOGITS, Selections, deviation, unite, watching
from tests.support.toy_model import VOCABULARY, make_config, sgd
from tests.support.trajectory import full_parameters, step_inputs

FOLDER = ROOT / "configs"
RECIPES = sorted(
    path.stem
    for path in FOLDER.glob("*_quickstart.yaml")
    if isinstance((config := load_config(path)).model.ffn, MoEFFN) and config.data.neighbours is None
)
ROMA = [  # six of SmolLM2's thirty layers: the routers of the last five are trained, the lowest one's is not
    "model.num_layers=6",
    f"trainable={[f'layers.{layer}.ffn.router.*' for layer in range(1, 6)]}",
]
STEPS, CLIP = 5, 0.2
# Where all but the auxiliary routers is frozen, the loss to look at, which a larger weight lets move.
AUXILIARY = ("loss/causal_routers", 0.01, ["losses.causal_routers.weight=10"])
GOALS = {"moma_causal_quickstart": AUXILIARY}
Outcome = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor], Selections]


def unchanged(batch: Batch) -> Batch:
    return batch


def steps_of(
    rank: int, config: Config, change: Callable[[Batch], Batch] = unchanged, follow: Selections | None = None
) -> Outcome:
    """Each step's losses and gradient norm; the parameters before and after; the selections. LoRA's B is drawn: where
    it is zero, as a new one is, neither A nor the router would have a gradient from the language loss."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    model = Transformer(config.model, VOCABULARY, layout, config.seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            seeded_normal_(parameter, seed=config.seed, name=name, std=0.05)
    engine = make_engine(model, config, layout)
    before, steps, selections = full_parameters(engine), [], {}
    for step in range(STEPS):
        objective = make_objective(config.losses, Context(layout=layout, group_sequences=2), step)
        batches = [change(batch) for batch in step_inputs(step, layout, config)]
        with watching(follow) as watch:
            watch.step = step
            result = engine.train_step(batches, objective, 0.5)
        selections |= watch.seen
        means = {name: total / result.counts[name] for name, total in result.loss_sums.items() if result.counts[name]}
        steps.append(means | {"grad_norm": result.grad_norm})
    return steps, before, full_parameters(engine), selections


def on_ranks(recipe: str, world: int, overrides: Sequence[str] = ()) -> Config:
    """Return the recipe with SGD and a small batch without accumulation, with which running shares would differ."""
    alone = ["parallel.expert=1"] if world == 1 else []
    config = load_config(FOLDER / f"{recipe}.yaml", [*overrides, *alone])
    train = config.train.model_copy(update={"global_batch_groups": 4, "micro_batch_groups": 4 // world})
    return config.model_copy(update={"train": train, "deepspeed": make_config(deepspeed=sgd(clip=CLIP)).deepspeed})


def assert_same(results: Sequence[Outcome], alone: Outcome) -> None:
    """Compare the losses and norms of every rank, and every parameter that any rank holds."""
    expected, before, after, selections = alone
    assert deviation(unite(result[3] for result in results), selections) < LOGITS
    for steps, *_ in results:
        for got, wanted in zip(steps, expected, strict=True):
            assert got == pytest.approx(wanted, rel=2e-5)
    parameters = {name: value for _, _, mine, _ in results for name, value in mine.items()}
    assert parameters.keys() == after.keys() == before.keys()
    for name, value in after.items():
        step = float((value - before[name]).abs().max())
        error = float((parameters[name] - value).abs().max())
        assert error <= 2e-3 * step + 1e-7, f"{name}: off by {error:.1e} after a change of {step:.1e}"


def moved(steps: Sequence[dict[str, float]], name: str) -> float:
    return max(step[name] for step in steps) - min(step[name] for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_train_the_same_model(recipe):
    goal, distance, overrides = GOALS.get(recipe, ("loss", 0.1, []))
    (alone,) = run_ranks(steps_of, 1, on_ranks(recipe, 1, overrides))
    assert min(step["grad_norm"] for step in alone[0]) > CLIP, "clipping was not active"
    assert moved(alone[0], goal) > distance, "nothing was learnt"
    assert_same(run_ranks(steps_of, 2, on_ranks(recipe, 2, overrides), unchanged, alone[3]), alone)


@pytest.mark.slow
@pytest.mark.parametrize("expert", [1, pytest.param(2, marks=REPEATED)], ids=["replicated", "spread"])
def test_two_ranks_align_the_same_routers(expert):
    """RoMA's recipe with replicated experts and with experts spread over ranks changes the routers only."""
    neighbours = partial(samples_of, values=5 * 4)  # of five layers of four experts
    (alone,) = run_ranks(steps_of, 1, on_ranks("roma_quickstart", 1, ROMA), neighbours)
    steps, before, after, selections = alone
    assert moved(steps, "loss/manifold") > 1e-3 and all(0.2 < step["manifold/coverage"] < 0.9 for step in steps)
    routers_of_five = {f"layers.{layer}.ffn.router.gate.weight" for layer in range(1, 6)}
    assert {name for name in after if not before[name].equal(after[name])} == routers_of_five
    config = on_ranks("roma_quickstart", 2, [*ROMA, f"parallel.expert={expert}"])
    assert_same(run_ranks(steps_of, 2, config, neighbours, selections), alone)
