"""The interface for loss terms. The classes that implement it are listed in losses/loss_registry.py.

A term is a sum over all micro-batches and ranks, divided by a count over the same micro-batches and ranks. The count is
known before the first backward pass. Therefore the scale of a term depends neither on the layout nor on accumulation.
The means of single micro-batches are never averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_dist.core.batch import Batch
from moe_dist.core.step import ModelOutput
from moe_dist.parallel.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Facts about the run that a term may use, besides its settings, the batch and the model's output."""

    layout: Layout
    group_sequences: int  # packed sequences per selection group


class Term(Protocol):
    """Interface for loss terms.

    A new term is constructed for each optimizer step, as Term(settings, context).
    """

    names: tuple[str, ...]  # names of the metrics that it reports; the first is the loss itself

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return, for each metric, the number of values that a host-side micro-batch contributes to the metric's mean.

        A metric's count over a step is the sum of these numbers. The metric's mean is its sum over the step divided by
        this count.
        """
        ...

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        """Return the sum of each metric over the micro-batch, as one 0-d tensor per metric.

        These sums are divided by the numbers from `counts`. The first metric is minimised. The others are detached and
        only reported.
        """
        ...
