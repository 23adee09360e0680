"""Values and protocols of an optimizer step: model output, objective, and the model that checkpoints see.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from moe_dist.core.batch import Batch
from moe_dist.core.routing_plan import DepthRecord, RoutingRecord


@dataclass(frozen=True)  # no slots: ZeRO-3 searches the attributes of what a model returns for tensors
class ModelOutput:
    """Logits of the next token, and the decisions of all routers."""

    logits_TV: Tensor  # in the model's dtype
    records: tuple[RoutingRecord, ...] = ()  # one for each expert layer, in order; none in a dense model
    depths: tuple[DepthRecord, ...] = ()  # one for each layer with mixture-of-depths


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Loss of one micro-batch on one rank, and the sums that are reported."""

    loss: Tensor  # 0-d; summed over micro-batches and ranks it is the objective
    sums: dict[str, Tensor]  # detached, by metric name; divided by the counts of that name they are means


class Objective(Protocol):
    """The goal of an optimizer step: sums over micro-batches and ranks, divided by counts over all of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all metrics."""
        ...

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return, for each metric, what this host batch adds to the count that its sum is divided by."""
        ...

    def __call__(self, output: ModelOutput, batch: Batch, counts: Mapping[str, int]) -> ObjectiveOutput:
        """Compute this micro-batch's part. counts: by metric name, over all ranks' micro-batches of the step."""
        ...


class ShardedModel(Protocol):
    """A model under ZeRO with its optimizer, as checkpoints see it (training/engine.py has one)."""

    steps: int
    skipped_steps: int

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer; the torch optimizer of its partitions is `.optimizer.optimizer`."""
        ...

    @property
    def zero_stage(self) -> int: ...
