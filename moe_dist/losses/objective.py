"""What training minimises: a weighted sum of named terms, each a sum over the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from moe_dist.batch import MODALITIES, Batch
from moe_dist.losses.language import language_loss
from moe_dist.moe.plan import RoutingRecord


class ModelOutput(Protocol):
    """What a term may read of a forward pass (model/transformer.py returns one)."""

    @property
    def logits_TV(self) -> Tensor: ...

    @property
    def records(self) -> tuple[RoutingRecord, ...]: ...


class Term(Protocol):
    def __call__(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The 0-d sum to minimise, and detached sums to report, by metric name."""
        ...


def language_term(output: ModelOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token cross-entropy; reports `loss/text` and `loss/image`."""
    loss = language_loss(output.logits_TV, batch)
    return loss.total, {f"loss/{name}": value for name, value in zip(MODALITIES, loss.by_modality_M)}


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    loss: Tensor  # 0-d: weighted sum of the terms, each summed (not averaged) over the micro-batch
    terms: dict[str, Tensor]  # detached sums by metric name; `loss` among them


@dataclass(frozen=True, slots=True)
class Objective:
    """Weight and function of each term by name. The default is the language loss alone."""

    terms: Mapping[str, tuple[float, Term]] = field(
        default_factory=lambda: MappingProxyType({"language": (1.0, language_term)})
    )

    def __call__(self, output: ModelOutput, batch: Batch) -> ObjectiveOutput:
        losses: list[Tensor] = []
        reported: dict[str, Tensor] = {}
        for weight, term in self.terms.values():
            loss, parts = term(output, batch)
            losses.append(weight * loss)
            reported |= parts
        total = torch.stack(losses).sum()
        return ObjectiveOutput(total, {"loss": total.detach(), **reported})
