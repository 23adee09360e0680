"""Trains for a few steps on any layout and returns what must not depend on it: losses, norms, final parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.batch import Batch
from moe_dist.config import Config
from moe_dist.engine.zero import Engine, init_distributed, make_engine
from moe_dist.parallel.layout import Layout, make_layout
from tests.distributed import run_ranks
from tests.engine.toy import EXPERTS, ToyModel, objective, step_batches

Build = Callable[[Config, Layout], nn.Module]


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]  # mean over the valid tokens of the global batch
    norms: list[float]
    parameters: dict[str, Tensor]  # final, full; an expert's under "name[expert]"
    loss_tokens: list[list[int]]  # [step][rank]: predictions that counted
    moved: dict[str, float]  # how far each parameter went, relative to its largest entry

    def deviation(self, other: Trajectory) -> dict[str, float]:
        """Largest difference: absolute for losses, relative for norms, relative to a parameter's largest entry."""
        assert self.parameters.keys() == other.parameters.keys()
        losses = [abs(mine - theirs) for mine, theirs in zip(self.losses, other.losses, strict=True)]
        norms = [abs(mine - theirs) / theirs for mine, theirs in zip(self.norms, other.norms, strict=True)]
        parameters = [
            float((self.parameters[name] - theirs).abs().max() / theirs.abs().max())
            for name, theirs in other.parameters.items()
        ]
        return {
            "loss": max(losses), "norm": max(norms), "parameters": max(parameters),
            "first loss": losses[0], "first norm": norms[0],
        }  # fmt: skip


def train(build: Build, config: Config, world: int, *, steps: int = 8, plant: Callable | None = None) -> Trajectory:
    """Train on `world` ranks. plant(engine, layout) -> objective puts a fault in."""
    results = run_ranks(_train, world, build, config, steps, plant)
    losses, norms, *_ = results[0]
    for other, others_norms, *_ in results[1:]:
        assert other == losses and others_norms == norms, "ranks report different figures"
    initial = {name: value for result in results for name, value in result[2].items()}
    parameters: dict[str, Tensor] = {}
    for result in results:
        for name, value in result[3].items():
            # Ranks that share a parameter must hold the same one; a planted fault may break that, rank 0 speaks then.
            if name in parameters and plant is None:
                assert torch.equal(value, parameters[name]), f"ranks hold different {name}"
            parameters.setdefault(name, value)
    moved = {name: float((value - initial[name]).abs().max() / value.abs().max()) for name, value in parameters.items()}
    return Trajectory(losses, norms, parameters, [list(row) for row in zip(*(result[4] for result in results))], moved)


def _train(rank: int, build: Build, config: Config, steps: int, plant: Callable | None) -> tuple:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    engine = make_engine(build(config, layout), config, layout, EXPERTS)
    goal = plant(engine, layout) if plant else objective
    initial = full_parameters(engine)
    losses, norms, loss_tokens = [], [], []
    for step in range(steps):
        batches = step_inputs(step, layout, config)
        loss_tokens.append(sum(batch.loss_tokens for batch in batches))
        result = engine.train_step(batches, goal, config.deepspeed["optimizer"]["params"]["lr"])
        assert not result.skipped
        losses.append(result.loss_sums["loss"] / result.counts["tokens"])
        norms.append(result.grad_norm)
    return losses, norms, initial, full_parameters(engine), loss_tokens


def step_inputs(step: int, layout: Layout, config: Config) -> list[Batch]:
    """This rank's micro-batches: two global batches in turn, so that the loss falls."""
    groups, micro = config.train.global_batch_groups, config.train.micro_batch_groups
    return step_batches(step % 2, layout.rank, layout.world, groups=groups, micro=micro)


def toy_engine(config: Config) -> tuple[Engine, Layout]:
    """An engine around the toy model, on the ranks that call it."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    return make_engine(ToyModel(config.model.ffn.router, layout), config, layout, EXPERTS), layout


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


def assert_can_fail(trajectory: Trajectory, *, clip: float, loss_moves: float) -> None:
    """Every step clips, loss and parameters (each expert, each router) move, ranks differ strongly in what counts."""
    assert min(trajectory.norms) > clip, "clipping was not active"
    assert max(trajectory.losses) - min(trajectory.losses) > loss_moves
    assert min(trajectory.moved.values()) > 1e-3, min(trajectory.moved, key=trajectory.moved.get)
    if len(trajectory.loss_tokens[0]) > 1:
        assert all(max(row) > 3 * min(row) for row in trajectory.loss_tokens)
