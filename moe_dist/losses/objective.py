"""The training objective: a weighted sum of named terms, the language loss first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.losses import TermSettings
from moe_dist.core.batch import Batch
from moe_dist.core.step import ModelOutput, Objective, ObjectiveOutput
from moe_dist.losses.language import LanguageLoss
from moe_dist.losses.loss_registry import LOSSES
from moe_dist.losses.term import Context, Term


@dataclass(frozen=True, slots=True)
class WeightedTerms:
    """The objective of one optimizer step: a weighted sum of loss terms.

    A new objective is built for each step, because a term may keep state during a step. terms: a mapping from the name
    of each term to (weight, term).
    """

    terms: Mapping[str, tuple[float, Term]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics of all terms."""
        return tuple(name for _, term in self.terms.values() for name in term.names)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return, for each metric, the number of values that a host-side micro-batch contributes to the metric's mean.

        A metric's count over a step is the sum of these numbers. The metric's mean is its sum over the step divided by
        this count.
        """
        return tuple(count for _, term in self.terms.values() for count in term.counts(batch))

    def __call__(self, output: ModelOutput, batch: Batch, counts: Mapping[str, int]) -> ObjectiveOutput:
        """Compute the loss of one micro-batch, and the sum of each metric over it.

        counts: the count of each metric over the whole step, keyed by metric name. The loss of a term is divided by the
        term's count. A term whose count is 0 contributes 0.
        """
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for weight, term in self.terms.values():
            parts = term(output, batch)
            losses.append(parts[0] * (weight / max(counts[term.names[0]], 1)))
            sums |= {name: part.detach() for name, part in zip(term.names, parts)}
        return ObjectiveOutput(torch.stack(losses).sum(), sums)


def make_objective(losses: Mapping[str, TermSettings], context: Context, step: int) -> Objective:
    """Build the objective of optimizer step `step` (counted from 0): the language loss plus the recipe's `losses`."""
    terms: dict[str, tuple[float, Term]] = {"language": (1.0, LanguageLoss())}
    for name, settings in losses.items():
        terms[name] = (settings.weight_at(step), LOSSES[type(settings)](settings, context))
    return WeightedTerms(terms)
