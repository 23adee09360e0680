"""What a term of the objective is: the registry's classes (losses/loss_registry.py) all have this form.

A term is a sum over micro-batches and ranks, divided by one count over all of them that is known before the first
backward pass. So its scale depends neither on the layout nor on accumulation steps, and no rank's mean is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from moe_dist.core.batch import Batch
from moe_dist.core.step import ModelOutput
from moe_dist.core.strict import Count, Strict
from moe_dist.parallel.layout import Layout


def _as_steps(weight: Any) -> Any:
    if isinstance(weight, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in weight)
    return ((0, weight),)


def _in_order(steps: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    firsts = [first for first, _ in steps]
    if any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"the first steps {firsts} do not ascend")
    return steps


Weight = Annotated[float, Field(ge=0)]
Steps = Annotated[
    tuple[tuple[Count, Weight], ...], Field(min_length=1), BeforeValidator(_as_steps), AfterValidator(_in_order)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a term may know beside its settings, the batch and the model's output."""

    layout: Layout
    group_sequences: int  # packed sequences of a selection group


class TermSettings(Strict):
    """Base of every term's settings. `weight`: a number, or a list of [first step, weight], steps ascending from 0."""

    weight: Steps

    def weight_at(self, step: int) -> float:
        return next((weight for first, weight in reversed(self.weight) if step >= first), 0.0)


class Term(Protocol):
    """Lives for one optimizer step; constructed as Term(settings, context)."""

    names: tuple[str, ...]  # of the metrics it reports; the first is the loss itself

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """What the sum of each metric is divided by; of a host batch."""
        ...

    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, ...]:
        """The 0-d sum of each metric; the first is minimised, the others are detached."""
        ...


TermClass = Any  # a Term with a nested Settings
