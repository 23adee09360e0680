"""The interface of a term of the objective. losses/loss_registry.py lists the classes that implement it.

A term is a sum over micro-batches and ranks, divided by one count over all of them, which is known before the first
backward pass. Its scale therefore depends neither on the layout nor on accumulation, and means are never averaged.
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
    """Interface of a term, which is constructed as Term(settings, context) for each optimizer step."""

    names: tuple[str, ...]  # names of the metrics that it reports; the first is the loss itself

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the count of each metric in this host batch. A mean is the step's sum divided by the step's count."""
        ...

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        """Return the 0-d sum of each metric. The first is minimised; the others are detached."""
        ...
