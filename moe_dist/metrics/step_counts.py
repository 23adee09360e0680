"""Counts of the routing decisions and of the work in a step. Routing metrics and FLOPs are computed from them.

The counts stay on the device while they are summed over micro-batches. They are copied to the host at the end of the
step.

Shape suffixes: L expert layers, V tokens that a router scored, C columns of a router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.core.batch import Batch
from moe_dist.core.costs import Costed, Work
from moe_dist.core.step import ModelOutput
from moe_dist.metrics.flops import flops_saved, model_flops
from moe_dist.metrics.router_agreement import decision_counts
from moe_dist.metrics.routing_metrics import RoutingCounts, routing_counts
from moe_dist.parallel.collectives import sum_over_ranks
from moe_dist.parallel.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """The counts of a step, summed over all micro-batches and ranks, on the host."""

    routing: RoutingCounts | None
    decisions: dict[str, Tensor]  # as in StepCounts
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """The counts of one or more micro-batches on one rank. The counts of several micro-batches are added with `+`."""

    tokens: int  # without padding
    document_lengths: tuple[int, ...]
    admitted: Mapping[int, tuple[int, ...]]  # by layer with mixture-of-depths: the length of each document there
    scored: Mapping[int, tuple[int, ...]]  # by layer: tokens that each part of its router scored
    depth_scored: Mapping[int, tuple[int, ...]]  # likewise, of the router of the layer's mixture-of-depths
    routing: RoutingCounts | None  # None: a dense model
    decisions: Mapping[str, Tensor]  # by metric name: numerator and denominator

    @classmethod
    def of(cls, batch: Batch, output: ModelOutput, layout: Layout, num_domains: int = 0) -> StepCounts:
        """Compute the counts for one micro-batch from the batch and the model's output.

        This needs neither communication between ranks nor synchronisation with the device.
        num_domains: the number of domains in the data; 0 if the data have no domains.
        """
        domain_T = batch.sidecar.get("domain_T") if num_domains else None
        routing = None
        if output.records:
            routing = routing_counts(output.records, batch.info, layout, domain_T=domain_T, num_domains=num_domains)
        return cls(
            tokens=sum(batch.info.sequence_counts),
            document_lengths=batch.info.document_lengths,
            admitted={depth.layer: depth.document_lengths for depth in output.depths},
            scored={record.layer: tuple(len(part.token_V) for part in record.routings) for record in output.records},
            depth_scored={depth.layer: (len(depth.routing.token_V),) for depth in output.depths},
            routing=routing,
            decisions=decision_counts(output.records, output.depths, batch.info),
        )

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            tokens=self.tokens + other.tokens,
            document_lengths=self.document_lengths + other.document_lengths,
            admitted={layer: lengths + other.admitted[layer] for layer, lengths in self.admitted.items()},
            scored=_sums(self.scored, other.scored),
            depth_scored=_sums(self.depth_scored, other.depth_scored),
            routing=None if self.routing is None or other.routing is None else self.routing + other.routing,
            decisions={name: count + other.decisions[name] for name, count in self.decisions.items()},
        )

    def flops(self, model: Costed) -> int:
        """Return the FLOPs of the forward and backward passes over the counted micro-batches (metrics/flops.py).

        This synchronises with the device once.
        """
        load_L = [] if self.routing is None else self.routing.load_LGE.sum((1, 2)).tolist()
        work = Work(
            document_lengths=self.document_lengths,
            rows=dict(zip(self.scored, load_L, strict=True)),
            admitted=self.admitted,
            scored=self.scored,
            depth_scored=self.depth_scored,
        )
        return model_flops(model, work)

    def flops_saved(self, model: Costed, *, experts: float, top_k: int) -> float:
        """Return the fraction of FLOPs saved on this rank, compared with a model that uses `top_k` experts per token.

        experts: the mean number of experts per token. Details: metrics/flops.py.
        """
        return flops_saved(
            model,
            document_lengths=self.document_lengths,
            tokens=self.tokens,
            experts=experts,
            top_k=top_k,
            admitted=self.admitted,
        )

    def over_ranks(self, flops: int, layout: Layout) -> StepTotals:
        """Return these counts and `flops`, each summed over the data-parallel ranks. flops: the FLOPs of this rank.

        Collective: one all-reduce, followed by one copy from the device to the host.
        """
        routing = [] if self.routing is None else self.routing.tensors()
        own = torch.full((), flops, dtype=torch.float64, device=layout.device)
        totals = sum_over_ranks([own, *routing, *self.decisions.values()], layout.dp_group)
        first = 1 + len(routing)
        return StepTotals(
            routing=None if self.routing is None else self.routing.with_tensors(totals[1:first]),
            decisions=dict(zip(self.decisions, totals[first:], strict=True)),
            flops=int(totals[0]),
        )


def _sums(mine: Mapping[int, tuple[int, ...]], other: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(a + b for a, b in zip(parts, other[layer], strict=True)) for layer, parts in mine.items()}
