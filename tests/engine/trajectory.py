"""Trains for a few steps on any layout and returns what must not depend on it: losses, norms, final parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.batch import Batch
from moe_dist.config import Config
from moe_dist.engine.zero import Engine, init_distributed, make_engine
from moe_dist.parallel.layout import Layout, make_layout
from tests.distributed import run_ranks
from tests.engine.toy import EXPERTS, objective, step_batches

Build = Callable[[Config, Layout], nn.Module]


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]  # mean over the valid tokens of the global batch
    norms: list[float]
    parameters: dict[str, Tensor]  # final, full; an expert's under "name[expert]"
    loss_tokens: list[list[int]]  # [step][rank]: predictions that counted

    def deviation(self, other: Trajectory) -> dict[str, float]:
        """Largest difference: absolute for losses, relative for norms, relative to a parameter's largest entry."""
        assert self.parameters.keys() == other.parameters.keys()
        return {
            "loss": max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)),
            "norm": max(abs(a - b) / b for a, b in zip(self.norms, other.norms, strict=True)),
            "parameters": max(
                float((mine - theirs).abs().max() / theirs.abs().max())
                for mine, theirs in ((self.parameters[name], other.parameters[name]) for name in other.parameters)
            ),
        }


def train(build: Build, config: Config, world: int, *, steps: int = 8, plant: Callable | None = None) -> Trajectory:
    """Train on `world` ranks. plant(engine, layout) -> objective puts a fault in."""
    results = run_ranks(_train, world, build, config, steps, plant)
    losses, norms, _, _ = results[0]
    for other, others_norms, _, _ in results[1:]:
        assert other == losses and others_norms == norms, "ranks report different figures"
    parameters: dict[str, Tensor] = {}
    for _, _, part, _ in results:
        for name, value in part.items():
            # Ranks that share a parameter must hold the same one; a planted fault may break that, rank 0 speaks then.
            if name in parameters and plant is None:
                assert torch.equal(value, parameters[name]), f"ranks hold different {name}"
            parameters.setdefault(name, value)
    return Trajectory(losses, norms, parameters, [list(row) for row in zip(*(result[3] for result in results))])


def _train(rank: int, build: Build, config: Config, steps: int, plant: Callable | None) -> tuple:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    engine = make_engine(build(config, layout), config, layout, EXPERTS)
    goal = plant(engine, layout) if plant else objective
    losses, norms, loss_tokens = [], [], []
    for step in range(steps):
        batches = step_inputs(step, layout, config)
        loss_tokens.append(sum(batch.loss_tokens for batch in batches))
        result = engine.train_step(batches, goal, config.deepspeed["optimizer"]["params"]["lr"])
        assert not result.skipped
        losses.append(result.loss_sums["loss"] / result.counts["tokens"])
        norms.append(result.grad_norm)
    return losses, norms, full_parameters(engine), loss_tokens


def step_inputs(step: int, layout: Layout, config: Config) -> list[Batch]:
    """This rank's micro-batches: two global batches in turn, so that the loss falls."""
    groups, micro = config.train.global_batch_groups, config.train.micro_batch_groups
    return step_batches(step % 2, layout.rank, layout.world, groups=groups, micro=micro)


def full_parameters(engine: Engine) -> dict[str, Tensor]:
    """This rank's parameters in full, an expert's under its global number."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            value = parameter.detach().float().clone()
        if hasattr(parameter, "expert_ids"):
            parameters |= {f"{name}[{expert}]": value[row] for row, expert in enumerate(parameter.expert_ids)}
        else:
            parameters[name] = value
    return parameters


def assert_learns(trajectory: Trajectory, *, clip: float, tolerance: float) -> None:
    """The comparison can fail: every step clips, the loss moves, and ranks differ in what counts."""
    assert min(trajectory.norms) > clip, "clipping was not active"
    assert all(math.isfinite(loss) for loss in trajectory.losses)
    assert max(trajectory.losses) - min(trajectory.losses) > 1000 * tolerance
    if len(trajectory.loss_tokens[0]) > 1:
        assert max(max(row) / min(row) for row in trajectory.loss_tokens) > 1.5
