"""Values and interfaces of an optimizer step.

They describe the model's output, the objective and its output, and a model that ZeRO partitions.

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
    """The logits of the next token at each position, and the records of all routers."""

    logits_TV: Tensor  # in the model's dtype
    records: tuple[RoutingRecord, ...] = ()  # one for each expert layer, in order; none in a dense model
    depths: tuple[DepthRecord, ...] = ()  # one for each layer with mixture-of-depths


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """The loss of one micro-batch on one rank, and the sums of its metrics."""

    loss: Tensor  # 0-d; its sum over micro-batches and ranks is the objective
    sums: dict[str, Tensor]  # detached, keyed by metric name; divided by the count of the same name, a sum is a mean


class Objective(Protocol):
    """Interface for the objective of one optimizer step.

    Each metric is a mean: a sum over all micro-batches and ranks, divided by the number of values in the sum.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all metrics."""
        ...

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return, for each metric, the number of values that a micro-batch contributes to the metric's mean.

        batch: the micro-batch, on the host. A metric's count over a step is the sum of these numbers. The metric's mean
        is its sum over the step divided by this count.
        """
        ...

    def __call__(self, output: ModelOutput, batch: Batch, counts: Mapping[str, int]) -> ObjectiveOutput:
        """Compute the loss and the metrics of one micro-batch.

        counts: for each metric name, the sum of counts(batch) over all micro-batches and ranks of the step.
        """
        ...


class ShardedModel(Protocol):
    """Interface for a model that ZeRO partitions, together with its optimizer. Checkpointing uses this interface.

    The class Engine in training/engine.py implements it.
    """

    steps: int
    skipped_steps: int
    frozen_store: str | None  # the digest of a store of these frozen weights (checkpoint/frozen_store.py), if written

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer. Its attribute `optimizer` is the torch optimizer that updates the partitions."""
        ...

    @property
    def zero_stage(self) -> int: ...
