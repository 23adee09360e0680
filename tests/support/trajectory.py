"""Trains a few steps at any layout and returns everything that must not depend on it: losses,
norms, weights, logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.fragments import refresh_working_parameters
from moe_dist.config.recipe import Config
from moe_dist.core.batch import IMAGE, Batch
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import Engine, init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.selections import Selections, deviation, unite, watching
from tests.support.toy_model import ToyModel, loss_count, objective, step_batches

Build = Callable[[Config, Layout], nn.Module]


@dataclass(frozen=True)
class Trajectory:
    losses: list[float]  # [step]: mean over the valid tokens of the global batch
    norms: list[float]  # [step]
    masters: list[
        dict[str, Tensor]
    ]  # [step]: full tensors before each step and after the last; experts as "name[expert]"
    loss_tokens: list[list[int]]  # [step][rank]: predictions that counted
    image_tokens: list[list[int]]  # [step][rank]
    selections: Selections

    @property
    def moved(self) -> dict[str, float]:
        """Return how far each parameter moved, relative to its largest entry."""
        first, last = self.masters[0], self.masters[-1]
        return {name: _ratio((last[name] - first[name]).abs().max(), last[name].abs().max()) for name in last}

    def deviation(self, other: Trajectory) -> dict[str, float]:
        """Return the largest difference: absolute for losses and the routers' logits, relative for norms; of a
        parameter, relative to its largest entry.

        update: of a parameter's last update, relative to that update.
        """
        mine, theirs, before = self.masters[-1], other.masters[-1], other.masters[-2]
        assert mine.keys() == theirs.keys()
        return {
            "loss": max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)),
            "norm": max(abs(a - b) / b for a, b in zip(self.norms, other.norms, strict=True)),
            "parameters": max(_ratio((mine[k] - theirs[k]).abs().max(), theirs[k].abs().max()) for k in theirs),
            "update": max(_ratio((mine[k] - theirs[k]).norm(), (theirs[k] - before[k]).norm()) for k in theirs),
            "logits": deviation(self.selections, other.selections),
        }


def _ratio(difference: Tensor, size: Tensor) -> float:
    """Divide; 0 if nothing differs, even if `size` is 0 (a frozen parameter of zeros)."""
    return float(difference / size) if difference != 0 else 0.0


def train(
    build: Build,
    config: Config,
    world: int,
    *,
    steps: int = 8,
    plant: Callable | None = None,
    follow: Trajectory | None = None,
    guide: Trajectory | None = None,
) -> Trajectory:
    """Train on `world` ranks. plant(engine, layout) -> objective plants a fault.

    follow: select as that trajectory did (see tests/support/selections.py). guide: start every step from that
    trajectory's weights, so that rounding does not accumulate from step to step. The momentum stays the run's own, so
    the last step's weights depend on every step's gradient.
    """
    selections = follow.selections if follow is not None else None
    results = run_ranks(_train, world, build, config, steps, plant, selections, guide)
    losses, norms, *_ = results[0]
    for other, others_norms, *_ in results[1:]:
        assert other == losses and others_norms == norms, "ranks report different figures"
    masters: list[dict[str, Tensor]] = [{} for _ in range(steps + 1)]
    for result in results:
        for united, held in zip(masters, result[2], strict=True):
            for name, value in held.items():
                # Ranks that share a parameter must hold the same. A planted fault may break that; then rank 0 counts.
                if name in united and plant is None:
                    assert torch.equal(value, united[name]), f"ranks hold different {name}"
                united.setdefault(name, value)
    loss_tokens, image_tokens = ([list(row) for row in zip(*(r[column] for r in results))] for column in (3, 4))
    return Trajectory(losses, norms, masters, loss_tokens, image_tokens, unite(result[5] for result in results))


def _train(
    rank: int,
    build: Build,
    config: Config,
    steps: int,
    plant: Callable | None,
    follow: Selections | None,
    guide: Trajectory | None,
) -> tuple:
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    engine = make_engine(build(config, layout), config, layout)
    goal = plant(engine, layout) if plant else objective
    losses, norms, masters, loss_tokens, image_tokens = [], [], [], [], []
    selections: Selections = {}
    for step in range(steps):
        if guide is not None:
            set_masters(engine, guide.masters[step])
        masters.append(full_masters(engine))
        batches = step_inputs(step, layout, config)
        loss_tokens.append(sum(loss_count(batch) for batch in batches))
        image_tokens.append(sum(sum(batch.info.modality_counts[IMAGE]) for batch in batches))
        with watching(follow) as watch:
            watch.step = step
            result = engine.train_step(batches, goal, config.schedule.peak_lr)
        selections |= watch.seen
        assert not result.skipped
        losses.append(result.loss_sums["loss"] / result.counts["loss"])
        norms.append(result.grad_norm)
    masters.append(full_masters(engine))
    for name, working in full_parameters(engine).items():
        rounded = masters[-1][name].to(next(engine.module.parameters()).dtype).float()
        assert torch.equal(working, rounded), f"the forward pass would not use the master weights of {name}"
    return losses, norms, masters, loss_tokens, image_tokens, selections


def step_inputs(step: int, layout: Layout, config: Config) -> list[Batch]:
    """Return this rank's micro-batches: two global batches in turn, so that the loss falls."""
    groups, micro = config.train.global_batch_groups, config.train.micro_batch_groups
    return step_batches(step % 2, layout.rank, layout.world, groups=groups, micro=micro)


def toy_engine(config: Config) -> tuple[Engine, Layout]:
    """Build an engine around the toy model, on the ranks that call it."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    return make_engine(ToyModel(config.model.ffn.router, layout), config, layout), layout


def full_parameters(engine: Engine) -> dict[str, Tensor]:
    """Return the parameters that this rank's forward pass uses, in full, with experts under their global ids."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=engine.zero_stage == 3):
            parameters |= _by_expert(name, parameter, parameter.detach().float().clone())
    return parameters


def full_masters(engine: Engine) -> dict[str, Tensor]:
    """Return the float32 weights that the optimizer steps, the frozen ones and the buffers, in full. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = full_parameters(engine) | {name: value.clone() for name, value in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            masters |= _by_expert(name, parameter, safe_get_full_fp32_param(parameter).detach().clone())
    return masters


def set_masters(engine: Engine, masters: dict[str, Tensor]) -> None:
    """Replace the float32 weights of this rank's parameters, and the weights that the forward pass uses. Collective."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        experts = getattr(parameter, "expert_ids", None)
        full = masters[name] if experts is None else torch.stack([masters[f"{name}[{e}]"] for e in experts])
        safe_set_full_fp32_param(parameter, full)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(masters[name])
    refresh_working_parameters(engine)


def _by_expert(name: str, parameter: nn.Parameter, value: Tensor) -> dict[str, Tensor]:
    experts = getattr(parameter, "expert_ids", None)
    return {name: value} if experts is None else {f"{name}[{e}]": row for e, row in zip(experts, value, strict=True)}


def assert_can_fail(trajectory: Trajectory, *, clip: float, loss_moves: float) -> None:
    """Assert that every step clips, that the loss and all parameters (each expert, each router) move, and that ranks
    differ strongly in their counts.
    """
    assert min(trajectory.norms) > clip, "clipping was not active"
    assert max(trajectory.losses) - min(trajectory.losses) > loss_moves
    assert min(trajectory.moved.values()) > 1e-3, min(trajectory.moved, key=trajectory.moved.get)
    if len(trajectory.loss_tokens[0]) > 1:
        assert all(max(row) > 3 * min(row) for row in trajectory.loss_tokens), "the ranks' loss masks are alike"
        assert all(len(set(row)) == len(row) for row in trajectory.image_tokens), "ranks have equally many image tokens"
