"""Placement of experts on the ranks of an expert-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.core.errors import UserError


@dataclass(frozen=True, slots=True)
class Placement:
    """The global ids of the experts on each rank.

    The entry local_experts[ep_rank] lists the ids of one rank in local order. Every rank has the same number of
    experts. If experts are split into slices, the ids are slice ids: slice k of expert e has the id k * E + e, where E
    is the number of experts.
    """

    local_experts: tuple[tuple[int, ...], ...]
    slices: int = 1  # slices per expert

    @property
    def num_ranks(self) -> int:
        return len(self.local_experts)

    @property
    def order(self) -> tuple[int, ...]:
        """Return the ids on all ranks, rank by rank."""
        return tuple(expert for rank in self.local_experts for expert in rank)


def slice_id(number: int, expert: int, num_experts: int) -> int:
    """Return the global id of slice `number` of an expert."""
    return number * num_experts + expert


def make_placement(expert_groups: Sequence[Sequence[int]], ep: int, slices: int = 1) -> Placement:
    """Place the same number of experts on every rank, and nearly the same number from each group (modality).

    For each group in turn, every rank first gets an equal share, rounded down. The remaining experts of the group go to
    the ranks with the fewest experts so far. The numbers of a group's experts on any two ranks differ by at most one.

    ep: the number of ranks. slices: the number of slices per expert. Slices are placed like experts: the first slices
    of all experts in a group come before the second slices. Raises UserError if `ep` does not divide the number of
    experts multiplied by `slices`.

    If `slices` is ep / gcd(ep, *sizes of the groups), every rank holds the same number of slices from each group, and
    no rank holds two slices of one expert.
    """
    num_experts = sum(len(group) for group in expert_groups)
    if num_experts * slices % ep:
        times = f" times {slices} slices" if slices > 1 else ""
        raise UserError(f"parallel.expert={ep} does not divide the model's {num_experts} experts{times}")
    held: list[list[int]] = [[] for _ in range(ep)]
    for group in expert_groups:
        share, left = divmod(len(group) * slices, ep)
        lucky = sorted(range(ep), key=lambda rank: len(held[rank]))[:left]
        remaining = iter([slice_id(number, expert, num_experts) for number in range(slices) for expert in group])
        for rank in range(ep):
            held[rank] += [next(remaining) for _ in range(share + (rank in lucky))]
    return Placement(tuple(tuple(sorted(experts)) for experts in held), slices)
