"""The capacity of experts per selection group, the choice of the tokens that a full expert keeps, and the construction
of routing plans without a host sync.

Shape suffixes: T tokens, V routed tokens, b tokens of one group, E experts, k experts per token, N assignments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from moe_dist.core.routing_plan import RoutingPlan


def expert_capacity(num_tokens: int, capacity_factor: float, columns: int, top_k: int = 1) -> int:
    """Return the maximum number of tokens that an expert takes from a group: min(b, ceil(b * k * c / columns)).

    b: num_tokens, the size of the selection group. k: top_k. c: capacity_factor.
    columns: the router's number of columns, including null experts.
    The arithmetic is exact (without floating-point rounding).
    """
    return min(num_tokens, math.ceil(num_tokens * top_k * Fraction(str(capacity_factor)) / columns))


def keep_within_capacity(
    chosen_VE: Tensor, priority_VE: Tensor, group_sizes: Sequence[int], capacities: Sequence[int]
) -> Tensor:
    """Keep, for each group and expert, the tokens with the highest priority among those that chose the expert.

    Returns bool [V, E], true where an expert keeps a token. The host is not synchronised.
    chosen_VE: bool, true where a token chose an expert.
    priority_VE: int64. The priorities of the tokens for one expert must all be different.
    capacities: for each group, the maximum number of tokens that an expert keeps.
    """
    lowest = torch.iinfo(torch.int64).min
    wish_VE = priority_VE.masked_fill(~chosen_VE, lowest)
    kept = []
    for chosen_bE, wish_bE, capacity in zip(
        chosen_VE.split(list(group_sizes)), wish_VE.split(list(group_sizes)), capacities
    ):
        first = wish_bE.topk(capacity, dim=0, sorted=False).indices
        kept.append(torch.zeros_like(chosen_bE).scatter(0, first, True) & chosen_bE)
    return torch.cat(kept)


def plan_assignments(
    token_V: Tensor, expert_Vk: Tensor, weight_Vk: Tensor, num_experts: int, slots: int | None = None
) -> RoutingPlan:
    """Build a routing plan from the k experts of every token. The expert number `num_experts` means "no expert".

    slots: if given, pad every expert to exactly this number of assignments. No expert may have more assignments than
    this. A padding assignment refers to token 0 and has weight 0, so outputs and gradients do not change, and every
    shape is static.
    """
    expert_N = expert_Vk.flatten()
    order_N = expert_N.argsort(stable=True)
    counts = expert_N.new_zeros(num_experts + 1).scatter_add_(0, expert_N, torch.ones_like(expert_N))
    plan = RoutingPlan(
        token_ids_N=token_V.index_select(0, order_N // expert_Vk.shape[1]),
        weights_N=weight_Vk.flatten().index_select(0, order_N),
        counts_E=counts[:num_experts],
        complete=False,
    )
    return plan if slots is None else _pad(plan, expert_N.index_select(0, order_N), slots)


def _pad(plan: RoutingPlan, expert_N: Tensor, slots: int) -> RoutingPlan:
    num_experts = plan.counts_E.numel()
    begin_E = plan.counts_E.cumsum(0) - plan.counts_E
    begin_N = torch.cat([begin_E, begin_E.new_zeros(1)]).index_select(0, expert_N)
    slot_N = expert_N * slots + torch.arange(expert_N.numel(), device=expert_N.device) - begin_N
    slot_N = slot_N.where(expert_N < num_experts, num_experts * slots)  # "no expert": one shared slot, cut off below
    size = num_experts * slots + 1
    return RoutingPlan(
        token_ids_N=plan.token_ids_N.new_zeros(size).scatter(0, slot_N, plan.token_ids_N)[:-1],
        weights_N=plan.weights_N.new_zeros(size).scatter_add(0, slot_N, plan.weights_N)[:-1],
        counts_E=torch.full_like(plan.counts_E, slots),
    )


def join_plans(plans: Sequence[RoutingPlan]) -> RoutingPlan:
    """Concatenate plans into one plan, whose experts are numbered consecutively in the order of the plans."""
    counts_E = torch.cat([plan.counts_E for plan in plans])
    token_ids_N = torch.cat([plan.token_ids_N for plan in plans])
    weights_N = torch.cat([plan.weights_N for plan in plans])
    complete = all(plan.complete for plan in plans)
    if not complete:  # assignments to no expert belong at the end
        order_N = torch.cat([_is_surplus(plan) for plan in plans]).long().argsort(stable=True)
        token_ids_N, weights_N = token_ids_N.index_select(0, order_N), weights_N.index_select(0, order_N)
    return RoutingPlan(token_ids_N=token_ids_N, weights_N=weights_N, counts_E=counts_E, complete=complete)


def _is_surplus(plan: RoutingPlan) -> Tensor:
    return torch.arange(plan.token_ids_N.numel(), device=plan.counts_E.device) >= plan.counts_E.sum()
