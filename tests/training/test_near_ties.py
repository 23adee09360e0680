"""Rounding and near-ties: the effect of one ulp of gradient noise in one layout on a comparison of layouts.

With Adam at eps 1e-8 and free selections, two correct runs differ by more than rounding. The comparison in the tests of
layouts (eps 1e-3, the reference's selections, compared logits) tolerates the noise and still finds faults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_dist.data.stream.loader import make_loader
from moe_dist.model.moe.margins import Decisions, watch_decisions
from moe_dist.parallel.layout import Layout
from moe_dist.training.deepspeed import Engine
from tests.support.distributed import run_ranks
from tests.support.selections import LOGITS, ONE_DECISION, Selections, deviation, unite, watching
from tests.support.toy_model import CrossEntropy, objective
from tests.support.trajectory import train
from tests.training.test_any_layout import SYSTEMS, At, recipe, start
from tests.training.test_exactness import FLOAT32, ROUTERS, assert_same, build, reference
from tests.training.test_exactness import recipe as toy_recipe

STEPS, TOLERANCE = 6, 1e-5
SEEDS = [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]  # the naive comparison takes the next four if none has upset it
REFERENCE, OTHER = At(1, 1, 2), At(2, 2, 1)


def add_rounding(model: nn.Module, seed: int) -> None:
    """Move each entry of each gradient by one ulp of its largest entry, as a sum in another order would; 0 stays 0."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(gradient: Tensor) -> Tensor:
        largest = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
        ulp = torch.finfo(gradient.dtype).eps * largest.log2().floor().exp2()
        sign = torch.randint(0, 2, gradient.shape, generator=generator) * 2 - 1
        return gradient + sign * ulp * (gradient != 0)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(noisy)


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    selections: Selections
    decisions: list[list[Decisions]]  # of each step


def take_steps(
    rank: int, overrides: list[str], at: At, folder: Path, seeds: tuple[int, ...], follow: Selections | None
) -> list[Steps]:
    """Run the steps once for each noise seed; seed 0 means no noise."""
    runs = []
    for seed in seeds:
        run = start(recipe(overrides, at, folder))
        if seed:
            add_rounding(run.engine.module, seed)
        steps = Steps([], {}, [])
        for _ in range(STEPS):
            with watching(follow) as watch, watch_decisions(run.engine.module) as decisions:
                watch.step = run.step
                steps.losses.append(run.train_step()["loss"])
            steps.selections.update(watch.seen)
            steps.decisions.append(decisions)
        runs.append(steps)
    return runs


def first_difference(reference: Steps, of_ranks: list[Steps]) -> tuple[int, str, int, int, float] | None:
    """Return (step, router, token, column, reference margin) of the first decision that differs."""
    for step, expected in enumerate(reference.decisions):
        names = {decisions.router: None for decisions in expected}  # in the order of the forward pass
        mine, theirs = ([_by_token(steps.decisions[step]) for steps in runs] for runs in (of_ranks, [reference]))
        for name in names:
            for token, (chosen_C, margin_C) in theirs[0][name].items():
                (other_C, _), *_ = (found[name][token] for found in mine if token in found[name])
                if not torch.equal(chosen_C, other_C):
                    differ_C = (chosen_C != other_C).nonzero().flatten()
                    column = int(differ_C[margin_C[differ_C].argmin()])
                    return step, name, token, column, float(margin_C[column])
    return None


def _by_token(decisions: list[Decisions]) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for each in decisions:
        rows = zip(each.token_id_V.tolist(), zip(each.chosen_VC, each.margin_VC))
        found.setdefault(each.router, {}).update(rows)
    return found


def compare(overrides: list[str], folder: Path, seeds: tuple[int, ...], *, follow: bool) -> tuple[float, float]:
    """Return the largest deviations of losses and logits between two layouts, one with noise, over all seeds."""
    ((expected,),) = run_ranks(take_steps, 1, overrides, REFERENCE, folder, (0,), None)
    selections = expected.selections if follow else None
    losses, logits = [0.0], [0.0]
    for of_ranks in zip(*run_ranks(take_steps, 2, overrides, OTHER, folder, seeds, selections), strict=True):
        losses += [abs(a - b) for a, b in zip(of_ranks[0].losses, expected.losses, strict=True)]
        logits.append(deviation(unite(steps.selections for steps in of_ranks), expected.selections))
        print("losses off by", [f"{value:.1e}" for value in losses[-STEPS:]], f"logits by {logits[-1]:.1e}")
        difference = first_difference(expected, list(of_ranks))
        if difference is not None:
            print("first to differ: step {}, {}, token {}, column {}, margin {:.1e}".format(*difference))
        assert difference is None or not follow, "a run that follows decides as its reference"
    return max(losses), max(logits)


@pytest.mark.slow
def test_noise_of_one_ulp_upsets_a_naive_comparison_and_not_ours(overrides, tmp_path):
    """MoMa on one rank against two with noise: Adam turns rounding into steps, and then a near-tie flips."""
    overrides = [*overrides, *SYSTEMS["moma"]]
    naive = [*overrides, "deepspeed.optimizer.params.eps=1e-8"]
    assert any(compare(naive, tmp_path, seeds, follow=False)[0] > TOLERANCE for seeds in SEEDS)
    loss, logits = compare(overrides, tmp_path, SEEDS[0], follow=True)
    assert loss < TOLERANCE and logits < LOGITS


def rounding(engine: Engine, layout: Layout) -> CrossEntropy:
    add_rounding(engine.module, seed=layout.rank)
    return objective


@pytest.mark.parametrize("router", ROUTERS)
def test_noise_of_one_ulp_passes_where_faults_are_caught(router):
    """The layout is the one in which test_exactness.py plants its faults."""
    expected = reference(router)
    noisy = train(build, toy_recipe(router, world=2, expert=2), 2, plant=rounding, follow=expected)
    assert_same(noisy, expected, FLOAT32)
    assert noisy.deviation(expected)["update"] > 0, "no noise was planted"


def first_losses(rank: int, overrides: list[str], at: At, folder: Path, same_share: bool) -> list[float]:
    """Return the losses of two steps. same_share: every rank reads rank 0's data, as if it did not know its rank."""
    run = start(recipe(overrides, at, folder))
    if same_share:
        loader = make_loader(
            run.documents,
            run.vocabulary,
            run.config.data,
            seed=run.config.seed,
            dp_rank=0,
            dp=run.layout.world,
            batch_groups=run.config.train.micro_batch_groups,
        )
        run = replace(run, loader=loader)
    return [run.train_step()["loss"] for _ in range(2)]


@pytest.mark.slow
def test_runs_under_launchers_are_compared_closely_enough_to_see_a_wrong_share(overrides, tmp_path):
    """Such runs cannot share selections, so a flipped decision may change their losses (tests/launch/test_train.py)."""
    (alone,) = run_ranks(first_losses, 1, overrides, REFERENCE, tmp_path, False)
    spread, *_ = run_ranks(first_losses, 2, overrides, OTHER, tmp_path, False)
    wrong, *_ = run_ranks(first_losses, 2, overrides, OTHER, tmp_path, True)
    print(alone, spread, wrong)
    assert spread == pytest.approx(alone, abs=ONE_DECISION)
    assert min(abs(a - b) for a, b in zip(wrong, alone, strict=True)) > 2 * ONE_DECISION
