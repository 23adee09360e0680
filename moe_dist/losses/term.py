"""What a term of the objective is: the registry's classes (losses/loss_registry.py) all have this form.

A term is a sum over micro-batches and ranks, divided by one count over all of them that is known before the first
backward pass. So its scale depends neither on the layout nor on accumulation steps, and no rank's mean is averaged.
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
    """What a term may know beside its settings, the batch and the model's output."""

    layout: Layout
    group_sequences: int  # packed sequences of a selection group


class Term(Protocol):
    """Lives for one optimizer step; constructed as Term(settings, context)."""

    names: tuple[str, ...]  # of the metrics it reports; the first is the loss itself

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """What the sum of each metric is divided by; of a host batch."""
        ...

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        """The 0-d sum of each metric; the first is minimised, the others are detached."""
        ...
