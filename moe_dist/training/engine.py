"""One optimizer step over all ranks, with an exact loss and an exact global gradient norm.

Each term of the objective is a sum divided by a count, such as the number of predictions. The sum and the count are
over all ranks and micro-batches. DeepSpeed divides the summed gradients of all parameters, including experts, by the
number of data-parallel ranks. To undo this, the loss of every rank is multiplied by this number. Gradients are clipped
by the norm over all parameters. Each expert counts once in this norm, even if several ranks hold it. If a loss or
gradient is non-finite, all ranks skip the step or end the run (train.non_finite).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config.recipe import TrainConfig
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.step import ModelOutput, Objective
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout
from moe_dist.training.router_state import RouterStates

Counting = Callable[[Batch, ModelOutput], StepCounts]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of one optimizer step over all its micro-batches. All fields except `counted` are equal on every rank."""

    loss_sums: dict[str, float]  # metrics of the objective, summed over all ranks
    counts: dict[str, int]  # counts that divide loss_sums, with the same keys; "loss": number of predictions
    grad_norm: float  # over all parameters, before clipping; inf if not finite
    skipped: bool  # a loss or gradient was not finite, so nothing was changed
    counted: StepCounts | None  # this rank's routing and work, on the device; None if the step was not counted

    @property
    def losses(self) -> dict[str, float]:
        """The mean of each metric: its sum divided by its count. A metric whose count is 0 is left out."""
        return {name: total / self.counts[name] for name, total in self.loss_sums.items() if self.counts[name]}


class Zero(Protocol):
    """The attributes and methods of DeepSpeed's engine that an optimizer step uses."""

    module: nn.Module
    global_steps: int
    skipped_steps: int

    @property
    def optimizer(self) -> Any: ...

    def __call__(self, *inputs: Any) -> ModelOutput: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> None: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> Any: ...
    def zero_optimization_stage(self) -> Any: ...


class Engine:
    """A model under ZeRO, with methods to take an optimizer step (`train_step`) and to evaluate (`eval_forward`).

    Both methods are collective. The attributes `steps` and `skipped_steps` are part of a run's state: a checkpoint
    stores them, and a resumed run restores them.
    """

    def __init__(self, zero: Zero, settings: TrainConfig, layout: Layout, accumulation: int) -> None:
        self._zero = zero
        self._layout = layout
        self._train = settings
        self.accumulation = accumulation
        self.frozen_store: str | None = None  # see ShardedModel
        self._states = RouterStates(zero.module)

    @property
    def steps(self) -> int:
        """The number of optimizer steps so far, including skipped steps."""
        return self._zero.global_steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._zero.global_steps = value

    @property
    def skipped_steps(self) -> int:
        return self._zero.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._zero.skipped_steps = value

    @property
    def module(self) -> nn.Module:
        return self._zero.module

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer. Its attribute `optimizer` is the torch optimizer for this rank's partition."""
        return self._zero.optimizer

    @property
    def zero_stage(self) -> int:
        return int(self._zero.zero_optimization_stage())

    def train_step(
        self, micro_batches: Iterable[Batch], objective: Objective, lr: float, count: Counting | None = None
    ) -> StepResult:
        """Accumulate gradients over this rank's micro-batches, then take one step at learning rate `lr`. Collective.

        micro_batches: the micro-batches, on the host. Each one is moved to the device once. Iterating over the
        micro-batches may read data. If reading fails on one rank, the error is raised on all ranks before anything is
        computed.
        count: if given, a function that returns the counts of a micro-batch (metrics/step_counts.py), from which
        routing metrics and FLOPs are computed. StepResult.counted is the sum of its results.

        If a loss or gradient is not finite on any rank, no rank changes its parameters or optimizer state. The setting
        train.non_finite then decides whether the run stops (UserError) or continues. After a step that was not skipped,
        stateful routers update their state (StatefulRouter).
        """
        batches, counts = self._collect(micro_batches, objective)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, Tensor] = {}
        counted: StepCounts | None = None
        self._states.start_step()
        for batch in batches:
            batch = batch.to(self._layout.device)
            output = self._zero(batch.tokens_T, batch.info)
            result = objective(output, batch, counts)
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            if count is not None:
                of_batch = count(batch, output)
                counted = of_batch if counted is None else counted + of_batch
            self._states.add(output.records)
            self._zero.backward(_poison(result.loss) * self._layout.dp)
            self._zero.step()
        loss_sums = self._sum_over_ranks(sums)
        grad_norm = float(self._zero.get_global_grad_norm())
        skipped = not self._zero.was_step_applied()
        if skipped:
            self._stop_or_go_on(loss_sums)
        else:
            self._states.after_step(self._layout.dp_group)
        return StepResult(loss_sums=loss_sums, counts=counts, grad_norm=grad_norm, skipped=skipped, counted=counted)

    @torch.no_grad()
    def eval_forward(self, batch: Batch) -> ModelOutput:
        """Return the model's output for one micro-batch in eval mode, without gradients. Collective.

        The micro-batch must already be on the device.
        """
        self._zero.eval()
        try:
            return self.module(batch.tokens_T, batch.info)
        finally:
            self._zero.train()

    def _collect(self, micro_batches: Iterable[Batch], objective: Objective) -> tuple[list[Batch], dict[str, int]]:
        """Read this rank's micro-batches, and sum each metric's count over the micro-batches and all ranks. Collective.

        The mean of a metric is its sum divided by its count. The all-reduce that sums the counts also reports failures:
        if one rank fails, its error is raised on every rank.
        """
        problem: Exception | None = None
        batches: list[Batch] = []
        try:
            batches = list(micro_batches)
            if len(batches) != self.accumulation:
                raise ValueError(f"{len(batches)} micro-batches were given for an accumulation of {self.accumulation}")
        except Exception as error:
            problem = error
        counted = [torch.tensor(objective.counts(batch)) for batch in batches]
        counts = sum(counted, torch.zeros(len(objective.names), dtype=torch.int64))
        total = torch.cat([counts, torch.tensor([int(problem is not None)])]).to(self._layout.device)
        dist.all_reduce(total, group=self._layout.dp_group)
        *totals, failed = total.tolist()
        if failed:
            with raise_on_all_ranks():
                if problem is not None:
                    raise problem
        named = dict(zip(objective.names, totals))
        if not named["loss"]:
            raise UserError("no token of this step's global batch carries a loss: check the loss mask of the data")
        return batches, named

    def _sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        total = torch.stack([sums[name].reshape(()) for name in names])
        dist.all_reduce(total, group=self._layout.dp_group)
        return dict(zip(names, total.tolist()))

    def _stop_or_go_on(self, loss_sums: dict[str, float]) -> None:
        """Apply train.non_finite to a step that DeepSpeed skipped: raise UserError, or return if the run continues.

        loss_sums: the step's metrics, summed over all ranks. They are equal on all ranks, so all ranks make the same
        decision. The error names the metrics that are non-finite.
        """
        terms = [f"loss term '{name}'" for name, value in loss_sums.items() if not math.isfinite(value)]
        problem = f"step {self.steps}: the {' and '.join(terms) or 'gradient norm'} is not finite"
        if self._train.non_finite == "stop":
            raise UserError(f"{problem}; the step changed nothing (train.non_finite=skip would continue)")
        if self.skipped_steps > self._train.max_skipped:
            raise UserError(f"{problem}, and {self.skipped_steps} skipped steps are more than train.max_skipped")


def _poison(loss: Tensor) -> Tensor:
    """If the loss is non-finite, make its gradients non-finite too.

    The gradient norm over all ranks is then non-finite, so every rank skips the step.
    """
    return loss * (loss.detach() * 0.0 + 1.0)
