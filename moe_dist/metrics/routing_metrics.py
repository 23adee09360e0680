"""Routing metrics: how evenly experts and ranks are used, and which tokens they process.

The metrics include the number of experts per token for each modality, and the experts that receive each domain's
tokens.

Shape suffixes: L MoE layers, G expert-parallel groups, R ranks of one group, E experts, M modalities,
D domains, T tokens of a micro-batch.

An expert's utilization is its number of assignments divided by its fair share. The fair share is the mean number of
assignments of the experts in the same group (`Router.expert_groups`: the experts of one modality, or all experts). If
the experts are used evenly, every utilization is 1. The utilization of an unused expert is 0. Under expert choice,
every utilization is 1 by construction, so unrouted_fraction is the metric to watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.core.batch import MODALITIES, TokenInfo
from moe_dist.core.routing_plan import RoutingRecord
from moe_dist.parallel.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """Routing counts of one rank, on the rank's device. The counts of several micro-batches can be added."""

    layers: tuple[int, ...]
    load_LGE: Tensor  # int64 assignments; a rank fills the row of its own expert-parallel group
    dropped_LE: Tensor  # int64 assignments dropped because their expert was full
    assigned_LM: Tensor  # int64 assignments of valid tokens
    unrouted_LM: Tensor  # int64 valid tokens without an expert
    valid_M: Tensor  # int64 valid tokens
    domain_LDE: Tensor  # int64 assignments of each domain's tokens; D may be 0

    def tensors(self) -> list[Tensor]:
        return [self.load_LGE, self.dropped_LE, self.assigned_LM, self.unrouted_LM, self.valid_M, self.domain_LDE]

    def with_tensors(self, tensors: Sequence[Tensor]) -> RoutingCounts:
        load, dropped, assigned, unrouted, valid, domain = tensors
        return replace(
            self,
            load_LGE=load,
            dropped_LE=dropped,
            assigned_LM=assigned,
            unrouted_LM=unrouted,
            valid_M=valid,
            domain_LDE=domain,
        )

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        if self.layers != other.layers:
            raise ValueError(f"counts of layers {self.layers} and {other.layers} do not add up")
        return self.with_tensors([mine + theirs for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)])


def routing_counts(
    records: Sequence[RoutingRecord],
    info: TokenInfo,
    layout: Layout,
    *,
    domain_T: Tensor | None = None,
    num_domains: int = 0,
) -> RoutingCounts:
    """Count the assignments in one micro-batch of this rank.

    This needs neither communication between ranks nor synchronisation with the device.
    domain_T: int64 index of each token's domain, from Batch.sidecar; -1 for a token without a domain. It is None if the
    data have no domains.
    """
    device = records[0].plan.counts_E.device
    hits_LT = torch.stack([record.experts_of_T(info.num_tokens) for record in records])
    modality_M = torch.arange(len(MODALITIES), device=device)
    member_MT = (info.modality_T.to(device) == modality_M[:, None]) & info.valid_T.to(device)
    load_LE = torch.stack([record.load_E for record in records])
    load_LGE = load_LE.new_zeros(load_LE.shape[0], layout.edp, load_LE.shape[1])
    load_LGE[:, layout.dp_rank // layout.expert] = load_LE
    return RoutingCounts(
        layers=tuple(record.layer for record in records),
        load_LGE=load_LGE,
        dropped_LE=_dropped(records, load_LE),
        assigned_LM=(hits_LT[:, None] * member_MT).sum(-1),
        unrouted_LM=((hits_LT[:, None] == 0) & member_MT).sum(-1),
        valid_M=member_MT.sum(-1),
        domain_LDE=torch.stack([_by_domain(record, domain_T, num_domains) for record in records]),
    )


def _dropped(records: Sequence[RoutingRecord], load_LE: Tensor) -> Tensor:
    if all(part.chosen_VC is part.kept_VE for record in records for part in record.routings):
        return torch.zeros_like(load_LE)  # expert choice: an expert never chooses more tokens than its capacity
    return torch.stack([record.dropped_E for record in records])


def _by_domain(record: RoutingRecord, domain_T: Tensor | None, num_domains: int) -> Tensor:
    """Return the number of assignments of each domain's tokens to each expert, [D, E].

    Tokens without a domain are not counted.
    """
    if domain_T is None:
        return record.plan.counts_E.new_zeros(0, record.plan.counts_E.numel())
    row_T = torch.where(domain_T < 0, num_domains, domain_T)
    parts = []
    for part in record.routings:
        counts_DE = row_T.new_zeros(num_domains + 1, part.num_experts)
        parts.append(counts_DE.index_add(0, row_T[part.token_V], part.kept_VE.long())[:num_domains])
    return torch.cat(parts, dim=1)


def routing_metrics(
    total: RoutingCounts,
    *,
    expert_groups: Sequence[Sequence[int]],
    local_experts: Sequence[Sequence[int]],
    domains: Sequence[str] = (),
) -> dict[str, float | list[float]]:
    """Compute the moe/* metrics (metric_keys.py) on the host, from counts that are summed over all ranks.

    A modality's keys are left out if there are no valid tokens of that modality. A domain's keys are left out if none
    of its tokens is assigned to an expert. Any other ratio whose denominator is 0 is nan.
    local_experts: the ids of the experts, or of the slices of experts, on each expert-parallel rank
    (Placement.local_experts).
    domains: the names of the domains, in the order of the counts' domain index.
    """
    load_LE = total.load_LGE.sum(1).double()
    fair_LE = torch.zeros_like(load_LE)
    for group in map(list, expert_groups):
        fair_LE[:, group] = load_LE[:, group].mean(1, keepdim=True)
    metrics: dict[str, float | list[float]] = {}
    for i, layer in enumerate(total.layers):
        metrics[f"moe/{layer}/utilization"] = (load_LE[i] / fair_LE[i]).tolist()
        for m, modality in enumerate(MODALITIES):
            if valid := total.valid_M[m].item():
                metrics[f"moe/{layer}/experts_per_token/{modality}"] = total.assigned_LM[i, m].item() / valid
                metrics[f"moe/{layer}/unrouted_fraction/{modality}"] = total.unrouted_LM[i, m].item() / valid
        if total.dropped_LE[i].any():
            wished_E = total.dropped_LE[i] + load_LE[i]
            metrics[f"moe/{layer}/dropped_fraction"] = (total.dropped_LE[i] / wished_E).nan_to_num(0.0).tolist()
        for domain, load_E in zip(domains, total.domain_LDE[i].double(), strict=True):
            if load_E.any():
                metrics[f"moe/{layer}/domain_share/{domain}"] = (load_E / load_E.sum()).tolist()
    valid_tokens = total.valid_M.sum().item() * len(total.layers)
    return metrics | {
        "moe/experts_per_token": total.assigned_LM.sum().item() / valid_tokens if valid_tokens else float("nan"),
        "moe/rank_imbalance": _rank_imbalance(total.load_LGE, local_experts),
    }


def _rank_imbalance(load_LGE: Tensor, local_experts: Sequence[Sequence[int]]) -> float:
    """Return the highest ratio of a rank's load to the mean load of the ranks in its expert-parallel group.

    A rank's load in a layer is the number of assignments that its experts process. The maximum is over layers,
    groups and ranks. If experts are split into slices, each slice processes all assignments of its expert.
    """
    held = [[number % load_LGE.shape[-1] for number in numbers] for numbers in local_experts]
    rows_LGR = torch.stack([load_LGE[..., experts].sum(-1) for experts in held], dim=-1).double()
    ratio_LG = rows_LGR.amax(-1) / rows_LGR.mean(-1)
    known = ratio_LG[~ratio_LG.isnan()]  # a group without rows has no imbalance
    return known.max().item() if known.numel() else float("nan")
